"""Attacks where numbers are not finite: masked classes, pixels without a gradient, images without a class."""

from functools import partial

import pytest
import torch
from helpers.attacked import generator
from helpers.searched import Linear, broken, distances, least_distance, linear_problem, spoil_gradient
from torch import nn

from sparse_adv.attacks import apgd, apgd_t, cw, deepfool, fab, fab_t, fmn, losses, mifgsm, pgd, square
from sparse_adv.ops.pgd_step import NORMS
from sparse_adv.training import TrainConfig, objectives

SEARCHES = {
    **{f"{search.__name__} {norm}": partial(search, norm=norm) for norm in NORMS for search in (fab, fab_t, fmn)},
    "deepfool": deepfool,
    "cw": partial(cw, c=20.0, lr=0.05, steps=100),
}
WITH_A_RADIUS = {
    "pgd": lambda *batch, **options: pgd(*batch, alpha=0.1, steps=10, generator=generator(), **options),
    "mifgsm": partial(mifgsm, alpha=0.1, steps=10),
    "apgd": lambda *batch, **options: apgd(*batch, steps=10, generator=generator(), **options),
    "apgd dlr": lambda *batch, **options: apgd(*batch, steps=10, loss="dlr", generator=generator(), **options),
    "apgd_t": lambda *batch, **options: apgd_t(*batch, steps=10, generator=generator(), **options),
    "square": lambda *batch, **options: square(*batch, queries=200, generator=generator(), **options),
}


class Masked(nn.Module):
    """A model with two more classes than another one, whose logits are this number."""

    def __init__(self, model, logit):
        super().__init__()
        self.model, self.logit = model, logit

    def forward(self, x):
        return nn.functional.pad(self.model(x), (0, 2), value=self.logit)


@pytest.mark.parametrize("logit", [-torch.inf, -1e9])
@pytest.mark.parametrize("name", SEARCHES)
def test_masked_classes_change_no_least_distance(name, logit):
    model, images, labels = linear_problem()
    adv, plain = (SEARCHES[name](each, images, labels) for each in (Masked(model, logit), model))
    norm = "linf" if "linf" in name else "l2"
    least = least_distance(model, images, labels, norm)
    assert broken(model, adv, labels).all()
    torch.testing.assert_close(distances(adv, images, norm) / least, distances(plain, images, norm) / least, **_NEAR)


@pytest.mark.parametrize("logit", [-torch.inf, -1e9])
@pytest.mark.parametrize("name", WITH_A_RADIUS)
def test_masked_classes_hide_no_adversarial_example(name, logit):
    model, images, labels = linear_problem(32)
    eps = least_distance(model, images, labels, "linf").quantile(0.6).item()
    found = [
        broken(model, WITH_A_RADIUS[name](each, images, labels, eps=eps), labels)
        for each in (model, Masked(model, logit))
    ]
    assert found[0].equal(found[1]) and 0 < found[0].sum() < 32


@pytest.mark.parametrize("logit", [-torch.inf, -1e9])
@pytest.mark.parametrize(("name", "classes"), [("apgd dlr", 2), ("apgd_t", 2), ("apgd_t", 3)])
def test_ratios_of_logits_need_no_third_class_that_is_not_masked(name, classes, logit):
    model = Linear(classes).eval()
    images = linear_problem(32)[1]
    labels = model(images).argmax(1)
    least = least_distance(model, images, labels, "linf")
    eps = least.median().item() * 1.01
    adv = WITH_A_RADIUS[name](Masked(model, logit), images, labels, eps=eps)
    assert broken(model, adv, labels).equal(least <= eps)


def test_losses_of_masked_classes_have_gradients():
    logits = torch.tensor([[3.0, 1.0, -torch.inf, -torch.inf]]).requires_grad_()
    labels, targets = torch.tensor([0]), torch.tensor([1])
    for loss in (losses.dlr(logits, labels), losses.targeted_dlr(logits, labels, targets)):
        assert loss.item() == -2
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.tolist() == [[-1, 1, 0, 0]]
    q = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    divergence = losses.kl_divergence(logits, q)
    assert torch.allclose(divergence, losses.kl_divergence(logits[:, :2], q[:, :2]))
    assert torch.autograd.grad(divergence.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("objective", ["trades", "mart", "nu-at", "fgsm-uap", "pgd"])
def test_objectives_leave_masked_classes_out(objective):
    config = TrainConfig(objective=objective, eps=0.1, steps=2, epochs=1)
    model, images, labels = linear_problem()
    results = []
    for each in (model, Masked(model, -torch.inf)):
        model.zero_grad()
        made = objectives.build(config)
        adv = made.craft(each, images, labels, generator())
        if objective == "nu-at":
            made.weight.set(1.0)
        loss = made.loss(each, images, adv, labels)
        loss.backward()
        results.append((loss.item(), model.fc.weight.grad.clone()))
    assert results[1][1].isfinite().all()
    if objective != "fgsm-uap":  # whose second term is a mean over the classes
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", {**SEARCHES, **WITH_A_RADIUS})
def test_a_pixel_without_a_gradient_does_not_stop_the_others(name, value):
    model, images, labels = linear_problem()
    attack = SEARCHES.get(name) or partial(WITH_A_RADIUS[name], eps=0.4)
    adv = attack(lambda x: model(spoil_gradient(x, value, pixels=1)), images, labels)
    assert adv.isfinite().all() and broken(model, adv, labels).all()


@pytest.mark.parametrize("name", {**SEARCHES, **WITH_A_RADIUS})
def test_an_image_without_any_gradient_stays_finite(name):
    model, images, labels = linear_problem()
    attack = SEARCHES.get(name) or partial(WITH_A_RADIUS[name], eps=0.4)
    adv = attack(lambda x: model(spoil_gradient(x, torch.nan, pixels=36)), images, labels)
    assert adv.isfinite().all() and broken(model, adv[1:], labels[1:]).all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", ["square", "fmn linf", "fab l2", "cw", "apgd"])
def test_an_image_with_nan_logits_has_no_class(name, targeted):
    model, images, labels = linear_problem()

    def of_nothing(x):
        """NaN for images that differ from the clean ones, whatever they are."""
        clean = (x[:, None] == images).flatten(2).all(2).any(1)
        return model(x).masked_fill(~clean[:, None], torch.nan)

    attack = SEARCHES.get(name) or partial(WITH_A_RADIUS[name], eps=0.01)
    goal = (labels + 1) % 4 if targeted else labels
    adv = attack(of_nothing, images, goal, targeted=targeted)
    moved = (adv != images).flatten(1).any(1)
    if not targeted:
        assert moved.all()
    elif name not in ("square", "apgd"):  # which return their best try
        assert not moved.any()
    clean = square(of_nothing, adv, labels, eps=0.01, queries=5)
    assert torch.equal(clean[moved], adv[moved])  # what has no class is attacked no further


_NEAR = {"rtol": 0.02, "atol": 0}
