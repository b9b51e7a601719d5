"""Auto-PGD for one image, a plain loop of PyTorch written after Croce and Hein 2020, and its parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor


def length(offset: Tensor, norm: str) -> float:
    return offset.flatten().norm(p=math.inf if norm == "linf" else 2).item()


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm().clamp_min(1e-12)


def slope_of(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    x = x.detach().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x)
    return value.item(), gradient


def project(z: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    offset = z - x
    offset = offset.clamp(-eps, eps) if norm == "linf" else offset * min(1.0, eps / max(length(offset, norm), 1e-12))
    return (x + offset).clamp(0, 1)


def checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j steps), where p_0 = 0, p_1 = 0.22 and p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    p = [Fraction(0), Fraction("0.22")]
    while p[-1] <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction("0.03"), Fraction("0.06")))
    return [math.ceil(each * steps) for each in p[1:-1]]


@dataclass
class Ascent:
    """What an ascent found, and how it went there."""

    highest: float
    best: Tensor
    points: list[Tensor]
    decided: set[str] = field(default_factory=set)
    """Why the step was halved: "few" steps raised the loss, or the best point was "stuck". "tie": just enough did."""


def ascend(
    function: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, norm: str, steps: int, rho: float
) -> Ascent:
    """Algorithm 1: the highest value of the function in the ball around x."""
    value, gradient = slope_of(function, start)
    found, first = Ascent(value, start, [start]), value
    checked, at = value, frozenset(checkpoints(steps))
    z = previous = start
    best_gradient, step, halved, rises, since = gradient, 2 * eps, False, 0, 0
    for k in range(1, steps + 1):
        direction = gradient.sign() if norm == "linf" else unit(gradient)
        ahead, weight = project(z + step * direction, x, eps, norm), 0.75 if k > 1 else 1.0
        moved = project(z + weight * (ahead - z) + (1 - weight) * (z - previous), x, eps, norm)
        previous, z, last = z, moved, value
        found.points.append(z)
        value, gradient = slope_of(function, z)
        rises, since = rises + (value > last), since + 1
        if value > found.highest:
            found.highest, found.best, best_gradient = value, z, gradient
        if k in at:
            few, stuck = rises < rho * since, not halved and found.highest <= checked
            if few != stuck and (few or found.highest > first):
                found.decided.add("few" if few else "stuck")
            if rises == rho * since and not stuck:
                found.decided.add("tie")
            halved = few or stuck
            if halved:
                step, z, gradient = step / 2, found.best, best_gradient
            checked, rises, since = found.highest, 0, 0
    return found
