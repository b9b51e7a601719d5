"""Masks of a weight: which masks are valid, and blocks of weights that a mask keeps or prunes as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.ops.arguments import as_integer, check_tensors, is_integer

Block = tuple[int, int, int, int]
"""(bo, bi, br, bs): output channels x input channels x filter rows x filter columns."""


def check_block(block: Sequence[int]) -> Block:
    """Complete a block (bo, bi) to (bo, bi, 1, 1); raises ValueError unless it is 2 or 4 positive integers."""
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) == 2:
        sizes = (*sizes, 1, 1)
    if len(sizes) != 4 or not all(is_integer(size) and size >= 1 for size in sizes):
        raise ValueError(f"block must be 2 or 4 positive integers (bo, bi) or (bo, bi, br, bs), got {shortened(block)}")
    bo, bi, br, bs = map(as_integer, sizes)
    return bo, bi, br, bs


def check_mask(mask: Tensor, linear: bool = False) -> None:
    """Raises TypeError or ValueError unless this is a mask of a convolution; `linear` allows shape [K, C] too."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (true = kept), got {kind}")
    check_tensors(mask=mask)
    if mask.dim() != 4 and not (linear and mask.dim() == 2):
        shapes = "[K, C/groups, R, S] or [K, C]" if linear else "[K, C/groups, R, S]"
        raise ValueError(f"mask must have the weight's shape {shapes}, got {tuple(mask.shape)}")


def check_shape(mask: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the mask is for a weight of another shape."""
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, weight has shape {tuple(weight.shape)}")


def obeys(mask: Tensor, block: Sequence[int]) -> bool:
    """Whether the mask keeps or prunes each block as a whole.

    Args:
        mask: bool tensor [K, C/groups, R, S], or [K, C] for a linear layer, which counts as [K, C, 1, 1].
        block: (bo, bi) or (bo, bi, br, bs), sizes not checked; blocks at an edge are smaller.

    Examples:
        >>> mask = torch.tensor([[True, False], [True, False]])
        >>> obeys(mask, (2, 1)), obeys(mask, (1, 2))
        (True, False)
    """
    for dim, (length, size) in enumerate(zip(mask.shape, block, strict=False)):
        if size == 1 or length == 0:
            continue
        first = torch.arange(length, device=mask.device) // size * size
        if not torch.equal(mask, mask.index_select(dim, first)):
            return False
    return True


def check_obeys(mask: Tensor, block: Sequence[int]) -> None:
    """Raises ValueError unless the mask keeps or prunes each block as a whole."""
    if not obeys(mask, block):
        raise ValueError(f"mask does not obey block {tuple(block)}: some block is neither kept nor pruned as a whole")


def block_grid(mask: Tensor, block: Sequence[int]) -> Tensor:
    """Return a view with one element per block of a tensor that has the same value in each block.

    Examples:
        >>> block_grid(torch.tensor([[1, 1, 2]]), (1, 2))
        tensor([[1, 2]])
    """
    return mask[tuple(slice(None, None, size) for size in block)]


def expand_blocks(grid: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Repeat the value of each block for all of its weights; blocks at an edge are smaller.

    Args:
        grid: tensor with one element per block, `ceil(shape[i] / block[i])` along dimension i.
        block: the block's size along each dimension; missing sizes count as 1.
        shape: the shape of the result.

    Returns:
        contiguous tensor of this shape and the grid's dtype.

    Examples:
        >>> expand_blocks(torch.tensor([[1, 2]]), (1, 2), (1, 3))
        tensor([[1, 1, 2]])
    """
    for dim, size in enumerate(block):
        if size > 1:
            grid = grid.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return grid.contiguous()
