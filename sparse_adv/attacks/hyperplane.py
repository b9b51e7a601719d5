"""Linearised boundaries between classes: finding the nearest one, and projecting images onto it within their range."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.attacks.ball import Ball
from sparse_adv.attacks.geometry import divisor
from sparse_adv.attacks.queries import Queries


def nearest_boundary(model: Queries, x: Tensor, labels: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """The lead of the label, z_y - z_k [N], and its gradient [N, ...], for the class k whose boundary is nearest.

    That is the k != y with the least |z_y - z_k| / |gradient|_dual; the dual norm is l1 for linf and l2 for l2. Entries
    of a gradient that are not finite count as 0.
    """
    logits, gradients = model.logits_and_gradients(x)
    rows = torch.arange(len(x), device=x.device)
    leads = logits[rows, labels][:, None] - logits
    slopes = (gradients[rows, labels][:, None] - gradients).nan_to_num(0.0, 0.0, 0.0)
    lengths = torch.linalg.vector_norm(slopes.flatten(2), 1 if norm == "linf" else 2, dim=2)
    k = (leads.abs() / divisor(lengths)).scatter(1, labels[:, None], torch.inf).argmin(1)
    return leads[rows, k], slopes[rows, k]


def onto_hyperplane(x: Tensor, value: Tensor, slope: Tensor, ball: Ball) -> Tensor:
    """The least change d with value + <slope, d> = 0 and x + d in [lo, hi]; if there is none, the one nearest to 0.

    For value > 0 (otherwise all signs are reversed)::

        d_i(t) = -sign(slope_i) min(rate_i t, room_i),  rate_i = 1 for linf, |slope_i| for l2

    room_i is the distance of x_i from the end of [lo, hi] that it moves to. The value falls by
    sum_i |slope_i| min(rate_i t, room_i), which is piecewise linear in t with the breakpoints t_i = room_i / rate_i.
    The t at which the value is 0 is found by sorting the breakpoints.

    Args:
        x: float tensor [N, ...], in [lo, hi].
        value: float tensor [N], the affine function at x.
        slope: float tensor [N, ...], its gradient.
        ball: the norm and the range, `on` these images; the radius is not used.

    Returns:
        The changes d, float tensor [N, ...].

    Source: Croce and Hein (ICML 2020), equations 3 to 6.
    """
    weight = slope.flatten(1) * value.sign()[:, None]
    room = torch.where(weight > 0, (x - ball.lo).flatten(1), (ball.hi - x).flatten(1)).clamp_min(0)
    rate = torch.ones_like(weight) if ball.norm == "linf" else weight.abs()
    falls = weight.abs() * rate
    rate, room = rate.where(falls != 0, 0), room.where(falls != 0, 0)
    ends, order = (room / rate.where(rate > 0, 1)).sort(dim=1)
    falls = falls.gather(1, order)
    # By how much the value has fallen at each breakpoint: through coordinates that reached an end before (finite even
    # if [lo, hi] is not), and through coordinates that still move.
    met = F.pad((falls * ends).cumsum(1)[:, :-1], (1, 0))
    speed = falls.flip(1).cumsum(1).flip(1)
    goal = value.abs()[:, None]
    piece = torch.searchsorted(met + speed * ends, goal).clamp(max=falls.shape[1] - 1)
    start, speed = met.gather(1, piece), speed.gather(1, piece)
    t = ((goal - start) / speed.where(speed > 0, 1)).clamp_min(0).minimum(ends[:, -1:])
    return (-weight.sign() * (rate * t).minimum(room)).view_as(x)
