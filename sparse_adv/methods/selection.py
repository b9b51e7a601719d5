"""Selects the blocks that a change drops and grows (an exact number) or prunes (to a number of weights), by scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_adv.masks.selection import select_blocks, smallest

Grids = Mapping[str, Tensor]
"""A tensor for each layer, with an element for each block."""


def drop_and_grow(
    grids: Grids,
    drop: Grids,
    grow: Callable[[], Grids],
    groups: Sequence[Sequence[str]],
    fraction: float,
    more_dropped: float = 0.0,
    more_grown: float = 0.0,
) -> dict[str, Tensor]:
    """Drop the kept blocks with the smallest scores, and grow as many: those with the largest scores of all pruned
    blocks.

    A block just dropped may be grown again. Layers that keep all of their blocks, or none, stay as they are.

    Args:
        grids: bool tensor for each layer: true = the block is kept.
        drop: scores by which kept blocks are dropped.
        grow: returns the scores by which pruned blocks are grown; called only if blocks are replaced.
        groups: sets of layers that are ranked together.
        fraction: fraction of a group's kept blocks that is dropped, in [0, 1]; the number is rounded up.
        more_dropped, more_grown: additional blocks dropped and grown, as fractions of `fraction` times the kept blocks,
            rounded to the nearest integer. A group keeps at least one block.

    Returns:
        The new grids of the layers that change. Of n kept blocks a group keeps n - dropped + grown: exactly n without
        additional blocks.
    """
    live = _count(grids, groups)
    new: dict[str, Tensor] = {}
    growth: Grids | None = None
    for group, n in zip(groups, live, strict=True):
        total = sum(grids[name].numel() for name in group)
        replaced = math.ceil(fraction * n) if n < total else 0
        if not replaced:
            continue
        dropped = min(n, replaced + round(more_dropped * fraction * n))
        grown = min(total - n + dropped, replaced + round(more_grown * fraction * n))
        growth = grow() if growth is None else growth
        kept = _flat(grids, group)
        kept = kept & ~smallest(_flat(drop, group), kept, dropped)
        kept = kept | smallest(-_flat(growth, group), ~kept, grown)
        new |= _split(kept, grids, group)
    return new


def prune(grids: Grids, scores: Grids, sizes: Grids, targets: Mapping[tuple[str, ...], int]) -> dict[str, Tensor]:
    """Drop the kept blocks with the smallest scores, so that each group keeps a number of weights; grows no block.

    Args:
        grids: bool tensor for each layer: true = the block is kept.
        scores: of the blocks, at least 0.
        sizes: int64, the number of weights of each block.
        targets: for each set of layers that is ranked together, the number of weights to keep; it is met as nearly as
            whole blocks allow. A group that already keeps fewer does not change.

    Returns:
        The new grids of the layers that change.

    Examples:
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}
        >>> grids = {"a": torch.tensor([True, True]), "b": torch.tensor([True])}
        >>> sizes = {"a": torch.tensor([4, 4]), "b": torch.tensor([2])}
        >>> prune(grids, scores, sizes, {("a", "b"): 6})
        {'a': tensor([ True, False])}
    """
    ranked = {name: scores[name].where(grid, -1.0) for name, grid in grids.items()}  # pruned blocks come last
    selected = select_blocks(ranked, sizes, targets)
    new = {name: grids[name] & grid for name, grid in selected.items()}
    return {name: grid for name, grid in new.items() if not grid.equal(grids[name])}


def _count(grids: Grids, groups: Sequence[Sequence[str]]) -> list[int]:
    """The number of kept blocks of each group; the host waits for the device once."""
    if not groups:
        return []
    counts: list[int] = torch.stack([_flat(grids, group).sum() for group in groups]).tolist()
    return counts


def _flat(grids: Grids, group: Sequence[str]) -> Tensor:
    return torch.cat([grids[name].flatten() for name in group])


def _split(flat: Tensor, grids: Grids, group: Sequence[str]) -> dict[str, Tensor]:
    parts = flat.split([grids[name].numel() for name in group])
    return {name: part.view_as(grids[name]) for name, part in zip(group, parts, strict=True)}
