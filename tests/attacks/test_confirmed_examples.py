"""The examples of the searches for the least distance are misclassified by the model itself, and lie hardly farther."""

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.searched import broken, distances
from torch import Tensor, nn

from sparse_adv import models
from sparse_adv.attacks import deepfool, fab, fab_t, fmn
from sparse_adv.attacks.ball import Ball
from sparse_adv.attacks.confirmation import confirmed
from sparse_adv.attacks.queries import Queries
from sparse_adv.data.digits import read_digits
from sparse_adv.ops.pgd_step import NORMS

SEARCHES = {
    "deepfool": deepfool,
    **{f"fab {norm}": partial(fab, norm=norm, steps=10) for norm in NORMS},
    **{f"fab_t {norm}": partial(fab_t, norm=norm, steps=5, n_target_classes=3) for norm in NORMS},
    **{f"fmn {norm}": partial(fmn, norm=norm, steps=20) for norm in NORMS},
}


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network trained a little, digits that it classifies correctly, and their classes."""
    torch.manual_seed(0)
    train = read_digits().train
    images, labels = train.images / 255, train.labels
    model = models.build("digits_cnn", width=8)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        chosen = torch.randint(len(labels), (64,))
        sgd.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        sgd.step()
    images, labels = images[:48], labels[:48]
    correct = ~broken(model.eval(), images, labels)
    return model, images[correct], labels[correct]


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("name", SEARCHES)
def test_the_model_itself_misclassifies_every_example(digits, name, engine):
    model, images, labels = digits
    adv = SEARCHES[name](model, images, labels, engine=engine)
    wrong = broken(model, adv, labels)
    assert wrong.equal((adv != images).flatten(1).any(1)) and wrong.all()


@pytest.mark.parametrize("name", SEARCHES)
def test_an_example_is_moved_on_by_hardly_anything(digits, name, monkeypatch):
    model, images, labels = digits
    search, norm = SEARCHES[name], "linf" if "linf" in name else "l2"
    lengths = distances(search(model, images, labels), images, norm)
    module = importlib.import_module(f"sparse_adv.attacks.{name.split()[0].removesuffix('_t')}")
    monkeypatch.setattr(module, "confirmed", lambda model, found, *rest: found)
    ratio = lengths / distances(search(model, images, labels), images, norm)
    assert (ratio >= 0.9999).all() and (ratio <= 1.0101).all() and ratio.median() <= 1.00011


def test_deepfool_crosses_the_boundary_where_the_range_of_pixels_cuts_its_steps_off(digits):
    """In few steps: an overshoot of the last step alone would leave a part of the way before each boundary."""
    model, images, labels = digits
    few, many = (distances(deepfool(model, images, labels, steps=n), images, "l2") for n in (12, 50))
    assert (few > 0).all() and few.equal(many)
    on_boundary = deepfool(model, images, labels, overshoot=0.0)
    assert broken(model, on_boundary, labels).all()
    assert (few / distances(on_boundary, images, "l2")).median() <= 1.02


class Answers(nn.Module):
    """Logits [scale, scale + rise of the first pixel above 0.5]."""

    def __init__(self, scale: float, rise: float) -> None:
        super().__init__()
        self.scale, self.rise = scale, rise

    def forward(self, x: Tensor) -> Tensor:
        over = x.flatten(1)[:, 0] - 0.5
        return torch.stack([torch.full_like(over, self.scale), self.scale + self.rise * over], 1)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)


def confirmed_by(model: nn.Module, engine: nn.Module, found: Tensor, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return confirmed(
        Queries(model, engine, None, model), found, images, labels, Ball(0.2, "linf", 0.0, 1.0), targeted=False
    )


def test_where_model_and_engine_disagree_the_model_itself_decides():
    images = torch.full((2, 1, 2, 2), 0.5)
    found = images + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1)
    adv = confirmed_by(Answers(1.0, 1.0), Answers(1.0, -1.0), found, images)
    assert torch.equal(adv, torch.stack([found[0], images[1]]))


def test_an_example_counts_although_its_margin_never_exceeds_rounding():
    """Here a unit in the last place of the logits is 6e-5, the margin 0.001."""
    images, model = torch.full((1, 1, 2, 2), 0.5), Answers(1000.0, 0.01)
    found = images + 0.1
    adv = confirmed_by(model, model, found, images)
    assert model(adv).argmax(1).item() == 1 and torch.allclose(adv, images + 0.1 * 1.01)
