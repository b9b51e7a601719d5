"""On linear models the best adversarial example is known: attacks find it where it exists, in every ball and box."""

from functools import partial

import pytest
import torch
from helpers.searched import distances, spoil_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_adv.attacks import (
    apgd,
    apgd_t,
    bim,
    cw,
    deepfool,
    eotpgd,
    fab,
    fab_t,
    fgsm,
    fgsm_rs,
    fmn,
    mifgsm,
    n_fgsm,
    pgd,
    rfgsm,
    square,
    tpgd,
)

CHANNELS, SIDE = 2, 3
SHAPE = (CHANNELS, SIDE, SIDE)


def steps_of(attack, share, **fixed):
    """The attack with steps of a share of eps."""
    return lambda *batch, eps, **o: attack(*batch, eps=eps, alpha=share * eps, **fixed, **o)


REACHING = {
    "fgsm": fgsm,
    "pgd": steps_of(pgd, 0.25, steps=12),
    "pgd, margin": steps_of(pgd, 0.25, steps=12, loss="margin", early_stop=True),
    "pgd, restarts": steps_of(pgd, 0.25, steps=12, restarts=2),
    "bim": steps_of(bim, 0.25, steps=12),
    "mifgsm": steps_of(mifgsm, 0.25, steps=12),
    "eotpgd": steps_of(eotpgd, 0.25, steps=12),
    "apgd": partial(apgd, steps=25),
    "apgd, margin": partial(apgd, steps=25, loss="margin"),
    "apgd_t": partial(apgd_t, steps=25),
    "fab": partial(fab, steps=40),
    "fab_t": partial(fab_t, steps=40),
}
"""Attacks that reach the optimum of a linear model, so that every image breaks that can break."""

INSIDE = {
    "fgsm_rs": fgsm_rs,
    "rfgsm": steps_of(rfgsm, 0.5, steps=3),
    "square": partial(square, queries=40),
    "square, ce": partial(square, queries=40, loss="ce", resc_schedule=False),
    "tpgd": lambda model, x, y, eps, **o: tpgd(model, x, eps=eps, alpha=0.25 * eps, steps=4, **o),
}
"""Attacks of which this cannot be asked."""

FREE = {"cw": cw, "deepfool": deepfool, "fmn": partial(fmn, steps=30), "n_fgsm": n_fgsm}
"""Attacks that leave the ball."""

DRAWING = ("pgd", "eotpgd", "apgd", "fab", "fgsm_rs", "rfgsm", "square", "tpgd", "n_fgsm")


class Linear(nn.Module):
    """Two logits <w, x> + b and its negative, or that and two others which are always far lower."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([score, -score, score * 0 - 40, score * 0 - 50], 1)


@st.composite
def problems(draw):
    """A model, images, labels that are right, and a box of each channel and radii of each image or one of all."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random)

    lo, width = uniform(CHANNELS) - 0.5, 0.5 + uniform(CHANNELS)
    hi = lo + width
    spread = uniform(6, *SHAPE)
    if draw(st.booleans()):  # pixels at the ends of their range
        spread = spread.round()
    images = lo.view(-1, 1, 1) + spread * width.view(-1, 1, 1)
    images = images.clamp(lo.view(-1, 1, 1), hi.view(-1, 1, 1))
    weight = (uniform(CHANNELS * SIDE * SIDE) - 0.5) * 4
    model = Linear(weight, -(images.flatten(1) @ weight).mean()).eval()
    labels = model(images).argmax(1)
    eps = 0.3 * uniform(6)
    if draw(st.booleans()):
        eps, lo, hi = float(eps[0]), float(lo.min()), float(hi.max())
    return model, images, labels, eps, lo, hi


def least_margin(model: Linear, images: Tensor, labels: Tensor, eps, lo, hi, norm: str) -> Tensor:
    """The least of z_y - z_other in the ball of each image and the box, in float64.

    For l2 the projection x - t w onto box and sphere is found by bisection of t: a concave problem of one number.
    """
    weight, x = model.weight.detach().double().view(SHAPE), images.double()
    sign = 1 - 2 * labels.double()[:, None, None, None]
    radius = torch.as_tensor(eps).double().expand(len(images))[:, None, None, None]
    low, high = (torch.as_tensor(value).double().expand(CHANNELS).view(-1, 1, 1) for value in (lo, hi))
    if norm == "linf":
        best = (x - radius * (sign * weight).sign()).clamp(low, high)
    else:
        least, most = torch.zeros_like(radius), torch.full_like(radius, 1e4)
        for _ in range(80):
            middle = (least + most) / 2
            offset = (x - middle * sign * weight).clamp(low, high) - x
            inside = offset.square().sum((1, 2, 3), keepdim=True) <= radius**2
            least, most = middle.where(inside, least), most.where(inside, middle)
        best = (x - least * sign * weight).clamp(low, high)
    return 2 * (sign * (best * weight).sum((1, 2, 3), keepdim=True) + sign * model.bias.detach().double()).flatten()


def run(name: str, attack, problem, norm: str, seed: int = 0, **budget) -> Tensor:
    model, images, labels, eps, lo, hi = problem
    options = {"lo": lo, "hi": hi} | ({} if name in ("cw", "deepfool", "rfgsm", "bim") else {"norm": norm})
    if name.partition(",")[0] in (*DRAWING, "apgd_t", "fab_t"):
        options["generator"] = torch.Generator().manual_seed(seed)
    if name not in ("cw", "deepfool", "fmn"):
        options["eps"] = eps
    return attack(model, images, labels, **options, **budget)


def broken(problem, adv: Tensor) -> Tensor:
    model, _, labels, *_ = problem
    return model(adv).argmax(1) != labels


@settings(deadline=None, max_examples=12)
@given(problems(), st.sampled_from(["linf", "l2"]), st.data())
def test_every_image_breaks_that_can_and_no_other(problem, norm, data):
    name = data.draw(st.sampled_from(sorted(REACHING)))
    norm = "linf" if name == "bim" else norm
    margin = least_margin(*problem, norm)
    fell = broken(problem, run(name, REACHING[name], problem, norm))
    # What is left out: images that break only within the last 0.2 % of the range of pixels (l2: 1 %).
    slack = problem[0].weight.detach().abs().sum().item() * (0.002 if norm == "linf" else 0.01)
    assert not fell[margin > 1e-4].any(), "an image broke that cannot break in ball and box"
    assert fell[margin < -slack].all(), f"{name} in {norm} left {margin[~fell].tolist()}"


@settings(deadline=None, max_examples=25)
@given(problems(), st.sampled_from(["linf", "l2"]), st.data())
def test_results_lie_in_ball_and_box_without_slack(problem, norm, data):
    everything = {**REACHING, **INSIDE, **FREE}
    name = data.draw(st.sampled_from(sorted(everything)))
    norm = "linf" if name in ("bim", "rfgsm") else norm
    _, images, _, eps, lo, hi = problem
    adv = run(name, everything[name], problem, norm)
    assert adv.dtype == torch.float32
    low, high = (torch.as_tensor(value).expand(CHANNELS).view(-1, 1, 1) for value in (lo, hi))
    assert (adv >= low).all() and (adv <= high).all()
    if name not in FREE:
        # In float64: not even the rounding of the distance may hide anything, nor that of a radius in float32.
        assert (distances(adv.double(), images.double(), norm) <= torch.as_tensor(eps, dtype=torch.float64)).all()


STRONGER = {
    "pgd": (steps_of(pgd, 0.25, steps=4), ({}, {"restarts": 3})),
    "apgd": (apgd, ({"steps": 5}, {"steps": 5, "restarts": 3})),
    "apgd_t": (apgd_t, ({"steps": 5, "n_target_classes": 1}, {"steps": 5, "n_target_classes": 3})),
    "fab": (fab, ({"steps": 3}, {"steps": 3, "restarts": 3})),
    "fab_t": (fab_t, ({"steps": 3, "n_target_classes": 1}, {"steps": 3, "n_target_classes": 3})),
    "square": (square, ({"queries": 10}, {"queries": 10, "restarts": 3})),
}
"""For each attack a budget, and one that contains it."""


@settings(deadline=None, max_examples=12)
@given(problems(), st.sampled_from(["linf", "l2"]), st.sampled_from(sorted(STRONGER)))
def test_a_budget_that_contains_another_breaks_the_same_images_and_perhaps_more(problem, norm, name):
    attack, budgets = STRONGER[name]
    weak, strong = (broken(problem, run(name, attack, problem, norm, **budget)) for budget in budgets)
    assert (strong >= weak).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [*REACHING, *INSIDE, *FREE])
def test_a_gradient_that_is_not_finite_in_one_pixel_leaves_images_finite(name, value):
    torch.manual_seed(0)
    layer = nn.Linear(CHANNELS * SIDE * SIDE, 5)
    images = torch.rand(3, *SHAPE)
    labels = layer(images.flatten(1)).argmax(1)
    attack = (REACHING | INSIDE | FREE)[name]
    options = {} if name in ("cw", "deepfool", "fmn") else {"eps": 0.1}
    adv = attack(lambda x: layer(spoil_gradient(x, value, pixels=1).flatten(1)), images, labels, **options)
    assert adv.isfinite().all() and adv.min() >= 0 and adv.max() <= 1
