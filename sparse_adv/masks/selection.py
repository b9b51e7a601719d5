"""Selects an exact number of blocks by their scores.

Among equal scores the first ones are taken, in the order of layers, then of indices. So the choice is the same on every
device.
"""

import torch
from torch import Tensor


def smallest(scores: Tensor, among: Tensor, count: int) -> Tensor:
    """Select the elements of smallest score.

    Args:
        scores: float tensor [n]; NaN counts as 0.
        among: bool tensor [n]: the elements to choose from.
        count: how many to select, at most as many as there are.

    Returns:
        bool tensor [n] with exactly `count` true elements, all in `among`.

    Examples:
        >>> smallest(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, True, False]), 1)
        tensor([False,  True, False, False])
    """
    if count == 0:
        return torch.zeros_like(among)
    largest_finite = torch.finfo(scores.dtype).max
    scores = torch.nan_to_num(scores, nan=0.0, posinf=largest_finite, neginf=-largest_finite)
    candidates = torch.where(among, scores, torch.inf)
    # A threshold instead of the indices from topk, because topk may return any of several equal scores.
    threshold = candidates.topk(count, largest=False, sorted=False).values.amax()
    below = candidates < threshold
    equal = candidates == threshold
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))
