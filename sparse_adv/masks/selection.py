"""Selects an exact number of blocks by their scores.

Among equal scores the first ones are taken, in the order of layers, then of indices. So the choice is the same on every
device.
"""

from collections.abc import Mapping

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


def select_blocks(
    scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], targets: Mapping[tuple[str, ...], int]
) -> dict[str, Tensor]:
    """Select the blocks with the highest scores, so that the number of their weights is as near the target as possible.

    Args:
        scores: score of each block, by layer; all on one device.
        sizes: int64, number of weights of each block, by layer, on the same device.
        targets: for each set of layers that is ranked together, the number of weights to keep.

    Returns:
        For each layer a bool tensor of the shape of its scores: true = kept.
    """
    kept: dict[str, Tensor] = {}
    for names, target in targets.items():
        if not names:
            continue
        flat_scores, flat_sizes = (torch.cat([grid[name].flatten() for name in names]) for grid in (scores, sizes))
        flags = _highest(flat_scores, flat_sizes, target)
        parts = flags.split([scores[name].numel() for name in names])
        kept |= {name: part.reshape(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return kept


def _highest(scores: Tensor, sizes: Tensor, target: int) -> Tensor:
    """True for the highest scores whose sizes add up nearest to the target; tensors of one dimension."""
    size = int(sizes[0]) if len(sizes) else 1
    if bool((sizes == size).all()):  # then a threshold is enough: for single weights it takes a third of the time
        count = min((2 * target + size - 1) // (2 * size), len(scores))
        return smallest(-scores, torch.ones_like(scores, dtype=torch.bool), count)
    order = scores.argsort(descending=True, stable=True)
    totals = sizes[order].cumsum(0)
    count = int(torch.searchsorted(totals, target, right=True))
    missing = target - int(totals[count - 1]) if count else target
    if count < len(totals) and int(totals[count]) - target < missing:
        count += 1
    flags = torch.zeros_like(order, dtype=torch.bool)
    flags[order[:count]] = True
    return flags
