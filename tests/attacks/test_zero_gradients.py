"""A gradient of 0 for a whole batch is told once for each model, where it shows that the attack cannot work."""

import pytest
import torch
import torch.nn.functional as F
from helpers.attacked import batch, make_model
from helpers.cpu_graphs import CpuGraphs
from torch import nn

from sparse_adv import sparsify
from sparse_adv.attacks import AutoAttack, apgd, fgsm, fmn, losses, pgd, tpgd
from sparse_adv.attacks.zero_gradients import warn_if_zero
from sparse_adv.training import TrainConfig, adversarial_loss, train

IMAGES, LABELS = batch()


def cut() -> nn.Module:
    """A network without a weight left in its second convolution."""
    model = make_model().eval()
    mask = torch.zeros(16, 8, 3, 3, dtype=torch.bool)
    return sparsify(model, {"3.0": mask})


def right_labels(model: nn.Module) -> torch.Tensor:
    return model(IMAGES).argmax(1)


def told(caplog) -> int:
    return sum("the gradient of the loss is 0 for all images" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "attack",
    [
        pgd,
        fgsm,
        apgd,
        lambda *batch: pgd(*batch, loss="margin", early_stop=True, restarts=2),
        lambda *batch: pgd(*batch, loss=losses.SmoothedCrossEntropy(0.1)),
        lambda *batch: pgd(*batch, check=False, engine=False),
        lambda *batch: AutoAttack(batch[0], eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False)(
            *batch[1:]
        ),
        lambda *batch: adversarial_loss(*batch, "pgd"),
        lambda model, *batch: train(model, [batch], TrainConfig("n-fgsm", epochs=1)),
    ],
    ids=["pgd", "fgsm", "apgd", "margin", "smoothed", "unchecked", "autoattack", "loss", "training"],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_network_in_two_parts_is_told_once_whatever_the_batches(attack, training, caplog):
    model = cut()
    labels = right_labels(model)
    model.train(training)
    for _ in range(2):
        attack(model, IMAGES, labels)
    assert told(caplog) == 1
    attack(cut(), IMAGES, labels)
    assert told(caplog) == 2


class Callable(list):
    """An object that has no hash."""

    def __call__(self, x):
        return self[0](x)


def test_graphs_and_gradients_on_a_gpu_are_not_looked_at(caplog):
    """The host would wait for a GPU; a tensor without values shows that nothing is read."""
    model, graphs = cut(), CpuGraphs()
    for _ in range(3):
        pgd(model, IMAGES, LABELS, steps=1, graphs=graphs)
    warn_if_zero(model, torch.zeros(2, 3, device="meta"))
    assert graphs.counts[0] == 1 and not told(caplog)


def test_a_function_in_a_loop_is_told_once(caplog):
    model = cut()
    for scale in (0.5, 0.6):
        pgd(lambda x, by=scale: model(x * by), IMAGES, LABELS)
        assert told(caplog) == 1
    for _ in range(2):
        pgd(Callable([model]), IMAGES, LABELS)
        assert told(caplog) == 2


@pytest.mark.parametrize(
    "attack",
    [
        lambda model, images, labels: pgd(model, images, labels, targeted=True),
        lambda model, images, labels: apgd(model, images, labels, targeted=True, steps=2),
        lambda model, images, labels: pgd(model, images, labels, loss="dlr"),
        lambda model, images, labels: pgd(model, images, labels, loss=lambda z, y: F.relu(-losses.margin(z, y))),
        lambda model, images, labels: tpgd(model, images),
        lambda model, images, labels: fmn(model, images, labels, steps=2),
        lambda model, images, labels: pgd(model, images, labels, steps=0),
        lambda model, images, labels: pgd(model, images[:0], labels[:0]),
    ],
    ids=["targeted", "targeted apgd", "dlr", "function", "tpgd", "fmn", "no steps", "no images"],
)
def test_where_a_gradient_may_be_0_nothing_is_told(attack, caplog):
    model = cut()
    attack(model, IMAGES, right_labels(model))
    assert not told(caplog)


def test_one_image_with_a_gradient_is_enough(caplog):
    """Also one that is misclassified from the start."""

    class Dark(nn.Module):
        def forward(self, x):
            return (x.flatten(1) - 0.5).relu()[:, :5]

    images = torch.zeros(4, 3, 8, 8)
    pgd(Dark().eval(), images, LABELS[:4], eps=0.1, alpha=0.1, steps=1, random_start=False)
    assert told(caplog) == 1
    images[2] = 1.0
    pgd(Dark().eval(), images, LABELS[:4], eps=0.1, alpha=0.1, steps=1, random_start=False)
    pgd(make_model(), IMAGES, (right_labels(make_model().eval()) + 1) % 5)
    assert told(caplog) == 1


def test_a_gradient_that_is_no_number_is_not_0(caplog):
    warn_if_zero(nn.ReLU(), torch.full((2, 3), torch.nan))
    assert not told(caplog)
