"""APGD, FAB, FMN and CW move each image as a plain loop of PyTorch for one image does, written after their papers."""

import math

import pytest
import torch
from helpers.attacked import generator, philox_state
from helpers.plain_apgd import ascend, length, project, slope_of, unit
from helpers.searched import moved_over
from torch import Tensor, nn

from sparse_adv import ops
from sparse_adv.attacks import apgd, apgd_t, cw, fab, fab_t, fmn, losses
from sparse_adv.attacks.ball import Ball
from sparse_adv.attacks.hyperplane import onto_hyperplane
from sparse_adv.ops.pgd_step import NORMS

DUAL = {"linf": 1, "l2": 2}


def problem(size: int = 5, first_weights: float = 1.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network in float64, where rounding decides nothing, images, and the classes that it predicts.

    The larger its first weights, which are multiplied by `first_weights`, the more its boundaries curve.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)).double().eval()
    with torch.no_grad():
        model[1].weight.mul_(first_weights)
    images = torch.rand(size, 3, 2, 2, dtype=torch.float64)
    return model, images, model(images).argmax(1)


@pytest.mark.parametrize(
    ("norm", "loss", "rho"),
    [
        *[(norm, *each) for norm in NORMS for each in (("ce", 0.75), ("dlr", 0.4), ("margin", 0.9))],
        ("linf", "ce", 0.0),  # in the corners of the ball no step raises the loss
    ],
)
def test_apgd_is_algorithm_1(norm, loss, rho):
    model, images, labels = problem()
    eps = {"linf": 1e-3, "l2": 1e-2}[norm]  # so small that no image falls
    adv = apgd(model, images, labels, norm=norm, eps=eps, steps=30, rho=rho, loss=loss, generator=generator())
    starts = ops.random_start(images, eps, norm=norm, seed=generator())
    assert (model(adv).argmax(1) == labels).all()
    for x, y, start, found in zip(images, labels, starts, adv, strict=True):
        expected = ascend(
            lambda z, y=y: losses.LOSSES[loss](model(z[None]), y[None]).sum(), x, start, eps, norm, 30, rho
        )
        assert torch.allclose(found, expected.best, rtol=0, atol=1e-9)


class Waves(nn.Module):
    """Class 0 wins everywhere; the other logits rise and fall many times within a ball."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        waves = (9 * self.inner(x)).sin()
        return torch.cat([torch.full_like(waves[:, :1], 9.0), waves], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_halves_its_steps_and_goes_back_to_its_best_points_from_every_start(norm):
    """The path of `test_apgd_is_algorithm_1` leads to a corner of the ball at once, wherever it starts."""
    model, images, _ = problem(4)
    model, labels = Waves(model), torch.zeros(4, dtype=torch.int64)
    eps = {"linf": 0.3, "l2": 0.8}[norm]
    options = {"norm": norm, "eps": eps, "steps": 25, "restarts": 3, "loss": "margin"}
    adv = apgd(model, images, labels, generator=generator(), **options)
    starts = [
        ops.random_start(images, eps, norm=norm, seed=philox_state() + torch.tensor([0, n * -(-images.numel() // 4)]))
        for n in range(3)
    ]
    chosen = set()
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):

        def loss(z, y=y):
            return losses.margin(model(z[None]), y[None]).sum()

        found = [ascend(loss, x, start[i], eps, norm, 25, 0.75) for start in starts]
        best = max(range(3), key=lambda n, found=found: found[n].highest)
        assert torch.allclose(adv[i], found[best].best, rtol=0, atol=1e-6)
        chosen.add(best)
    assert len(chosen) > 1


def test_targeted_apgd_takes_the_nearest_classes_in_turn():
    model, images, labels = problem()
    adv = apgd_t(model, images, labels, eps=1e-3, steps=20, n_target_classes=2, restarts=2, generator=generator())
    ranked = model(images).argsort(1, descending=True)[:, 1:3]
    key = philox_state()
    for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        found = []
        for ascent, rank in enumerate((0, 1, 0, 1)):
            words = key + torch.tensor([0, ascent * -(-images.numel() // 4)])
            start = ops.random_start(images, 1e-3, norm="linf", seed=words)[i]

            def loss(z, y=y, target=ranked[i, rank]):
                return losses.targeted_dlr(model(z[None]), y[None], target[None]).sum()

            found.append(ascend(loss, x, start, 1e-3, "linf", 20, 0.75))
        assert torch.allclose(adv[i], max(found, key=lambda each: each.highest).best, rtol=0, atol=1e-9)


class Alternating(nn.Module):
    """The gradient of the margin is 1 in even calls and -3 in odd ones: -1 in the mean."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        slope = -3.0 if self.calls % 2 else 1.0
        return torch.stack([torch.full((len(x),), 9.0).to(x), slope * x.flatten(1).sum(1)], 1)


def test_apgd_follows_the_mean_of_its_gradients():
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    adv = apgd(Alternating(), x, y, eps=0.1, steps=2, eot_iter=2, loss="margin", generator=generator(), engine=False)
    start = ops.random_start(x, 0.1, norm="linf", seed=generator())
    assert (adv < start).all()


class Blinking(nn.Module):
    """Misclassifies all images in every second call, beginning with the second one."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        lead = 1.0 if self.calls % 2 else -1.0
        return torch.stack([lead + 1e-3 * x.flatten(1).sum(1), torch.zeros(len(x)).to(x)], 1)


def test_the_ascent_of_apgd_goes_on_if_one_of_the_averaged_passes_misclassifies_an_image():
    """The gradient leads to the lowest values of the ball; which point one pass of two misclassifies says nothing."""
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    adv = apgd(Blinking(), x, y, eps=0.1, steps=3, eot_iter=2, generator=generator(), engine=False)
    assert adv.equal((x - 0.1).expand_as(x))


def boundary_of(model: nn.Module, x: Tensor, y: Tensor, norm: str, target: int | None = None) -> tuple[float, Tensor]:
    """The lead of the label over the class whose linearised boundary is nearest, or over the target; its gradient."""
    found = []
    for k in range(5) if target is None else (target,):
        if k != y:
            lead, slope = slope_of(lambda z, k=k: (lambda logits: logits[y] - logits[k])(model(z[None])[0]), x)
            found.append((abs(lead) / slope.flatten().norm(p=DUAL[norm]).item(), lead, slope))
    return min(found, key=lambda each: each[0])[1:]


def plain_fab(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int, target: int | None, settings) -> Tensor:
    """Algorithm 1 of Croce and Hein 2020 (FAB) without a radius, with three steps of the final search."""
    ball, best, least = Ball(math.inf, norm, 0.0, 1.0), x, math.inf

    def lead(z: Tensor) -> float:
        logits = model(z[None])[0].detach()
        others = torch.cat([logits[:y], logits[y + 1 :]])
        return (logits[y] - others.max()).item()

    def keep(z: Tensor) -> bool:
        nonlocal best, least
        if lead(z) < 0 and length(z - x, norm) < least:
            best, least = z, length(z - x, norm)
        return lead(z) < 0

    z = x
    for _ in range(steps):
        value, slope = boundary_of(model, z, y, norm, target)
        at_clean = value + ((x - z) * slope).sum().item()
        from_z, from_clean = (
            onto_hyperplane(point[None], torch.tensor([each]).double(), slope[None], ball)[0]
            for point, each in ((z, value), (x, at_clean))
        )
        share = length(from_z, norm) / max(length(from_z, norm) + length(from_clean, norm), 1e-12)
        share = min(share, settings["alpha_max"])
        z = (1 - share) * (z + settings["eta"] * from_z) + share * (x + settings["eta"] * from_clean)
        z = z.clamp(0, 1)
        if keep(z):
            z = x + settings["beta"] * (z - x)
    if least < math.inf:
        near, far = x, best
        for _ in range(3):
            share = min(max(lead(near) / max(lead(near) - lead(far), 1e-12), 0.0), 1.0)
            middle = near + share * (far - near)
            near, far = (near, middle) if keep(middle) else (middle, far)
    return moved_over(model, x, y, best)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "settings", [{"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}, {"alpha_max": 0.4, "eta": 1.2, "beta": 0.6}]
)
def test_fab_is_its_algorithm(norm, settings):
    # The final search ends exactly on a boundary that is almost straight. Rounding then decides on which side, and so
    # how far the image is moved at last. It ends at some distance from a curved boundary.
    model, images, labels = problem(first_weights=6)
    for attack, target in ((fab, None), (fab_t, 1)):
        more = {} if target is None else {"n_target_classes": target}
        adv = attack(model, images, labels, norm=norm, steps=6, **more, **settings)
        runner_up = model(images).argsort(1, descending=True)[:, 1]
        for x, y, near, found in zip(images, labels, runner_up, adv, strict=True):
            expected = plain_fab(model, x, y, norm, 6, None if target is None else int(near), settings)
            assert torch.allclose(found, expected, rtol=0, atol=1e-6) and not torch.equal(found, x)


def plain_fmn(model: nn.Module, x: Tensor, y: Tensor, norm: str, steps: int, alpha: float, gamma: float) -> Tensor:
    """Algorithm 1 of Pintor et al. 2021, step sizes along half cosines."""
    eps, least, best, z = 0.0, math.inf, x, x
    widest = length(torch.maximum(x, 1 - x), norm)
    for k in range(steps):
        cosine = (1 + math.cos(math.pi * k / steps)) / 2
        share = 0.001 + (gamma - 0.001) * cosine
        value, slope = slope_of(lambda each: losses.margin(model(each[None]), y[None]).sum(), z)
        far = length(z - x, norm)
        if value > 0:
            if far < least:
                best, least = z, far
            eps = min(eps * (1 - share), least)
        else:
            ahead = far + abs(value) / slope.flatten().norm(p=DUAL[norm]).item()
            eps = (max(ahead, eps) if least == math.inf else eps) * (1 + share)
        eps = min(eps, widest)
        z = project(z + (alpha / 100 + (alpha - alpha / 100) * cosine) * unit(slope), x, eps, norm)
    return moved_over(model, x, y, best)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.05), (0.5, 0.1)])
def test_fmn_is_its_algorithm(norm, alpha, gamma):
    model, images, labels = problem()
    adv = fmn(model, images, labels, norm=norm, steps=25, alpha=alpha, gamma=gamma)
    for x, y, found in zip(images, labels, adv, strict=True):
        expected = plain_fmn(model, x, y, norm, 25, alpha, gamma)
        assert not torch.equal(found, x) and torch.allclose(found, expected, rtol=0, atol=1e-9)


def plain_cw(
    model: nn.Module, x: Tensor, y: Tensor, c: float, kappa: float, steps: int, lr: float, rounds: int
) -> Tensor:
    """Carlini and Wagner 2017, sections V and VI: change of variable, Adam, binary search for c."""
    best, least, failed, succeeded = x, math.inf, 0.0, math.inf
    for _ in range(rounds):
        w = torch.atanh((2 * x - 1) * (1 - 1e-6)).requires_grad_()
        adam, success = torch.optim.Adam([w], lr=lr), False
        for _ in range(steps):
            z = (w.tanh() + 1) / 2
            lead = -losses.margin(model(z[None]), y[None]).sum()
            far = (z - x).square().sum()
            if lead < 0 and -lead >= kappa:
                success = True
                if far.sqrt() < least:
                    best, least = z.detach(), far.sqrt().item()
            adam.zero_grad()
            (far + c * lead.clamp_min(-kappa)).backward()
            adam.step()
        succeeded, failed = (c, failed) if success else (succeeded, c)
        c = (failed + succeeded) / 2 if succeeded < math.inf else 10 * c
    return best


@pytest.mark.parametrize(("c", "kappa", "lr"), [(0.01, 0.0, 0.05), (20.0, 0.1, 0.2)])
def test_cw_is_its_algorithm(c, kappa, lr):
    model, images, labels = problem(3)
    adv = cw(model, images, labels, c=c, kappa=kappa, steps=20, lr=lr, binary_search_steps=4)
    assert (model(adv).argmax(1) != labels).any()
    for x, y, found in zip(images, labels, adv, strict=True):
        expected = plain_cw(model, x, y, c, kappa, 20, lr, 4)
        assert torch.allclose(found, expected, rtol=0, atol=1e-7)
