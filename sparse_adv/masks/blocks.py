"""Blocks of weights: the block shapes, the largest one that a mask obeys, and a weight's grid of blocks.

A block shape is (bo, bi, br, bs): output channels, input channels, filter rows and filter columns. Blocks at the edge
of a weight are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.ops.masked_conv2d_mask import Block, check_block, check_mask, obeys

SUPPORTED_BLOCKS: tuple[tuple[int | str, ...], ...] = (
    (64, 64),
    (32, 32),
    (8, 8),
    (4, 4),
    (1, 1, "R", "S"),
    (2, 2),
    (4, 1),
    (1, 1, 1, "S"),
    (2, 1),
    (1, 1),
)
"""The block shapes that `largest_block` looks for; R and S stand for height and width of the filter.

Kernels also support others, such as (64, 32) on a GPU or (2, 2, 3, 3), if `block` names them.
"""

STRUCTURES = ("filter", "channel")
"""Names of blocks whose size depends on the layer: all weights of a filter, or all that read an input channel."""


def check_structure(block: Sequence[int] | str) -> Block | str:
    """Complete a block shape as `check_block` does; raises ValueError for a name that is not in `STRUCTURES`."""
    if not isinstance(block, str):
        return check_block(block)
    if block not in STRUCTURES:
        raise ValueError(f"block must be a block shape or one of {', '.join(STRUCTURES)}, got {block!r}")
    return block


def block_in(layer_shape: Sequence[int], block: Block | str, groups: int = 1) -> Block:
    """Return the shape that a block or structure has in a convolution or linear layer; small layers cut it.

    Examples:
        >>> block_in((16, 4, 3, 3), "filter"), block_in((16, 4, 3, 3), "channel", groups=2)
        ((1, 4, 3, 3), (8, 1, 3, 3))
    """
    shape = conv_shape(layer_shape)
    if not isinstance(block, str):
        bo, bi, br, bs = (min(size, max(1, length)) for size, length in zip(block, shape, strict=True))
        return bo, bi, br, bs
    filters, channels, height, width = shape
    if block == "filter":
        return 1, channels, height, width
    return filters // groups, 1, height, width  # only the filters of one group read an input channel


def largest_block(mask: Tensor, candidates: Sequence[Sequence[int | str]] = SUPPORTED_BLOCKS) -> Block:
    """Return the candidate block with the most elements that a mask obeys, that is, keeps or prunes as a whole.

    Args:
        mask: bool tensor [K, C/groups, R, S], or [K, C] for a linear layer, which counts as [K, C, 1, 1].
        candidates: blocks (bo, bi) or (bo, bi, br, bs); "R" and "S" stand for height and width of the filter.

    Returns:
        The block as (bo, bi, br, bs); if the mask obeys no candidate, (1, 1, 1, 1), which every mask obeys.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if the shape of the mask or a candidate is invalid.

    Examples:
        >>> import torch
        >>> from sparse_adv import masks
        >>> mask = torch.zeros(8, 8, 3, 3, dtype=torch.bool)
        >>> mask[:4, :, 1] = True
        >>> masks.largest_block(mask)
        (4, 4, 1, 1)
    """
    check_mask(mask, linear=True)
    return largest_obeyed_block(mask, candidates)


def largest_obeyed_block(mask: Tensor, candidates: Sequence[Sequence[int | str]] = SUPPORTED_BLOCKS) -> Block:
    """Return what `largest_block` returns, for a mask that has been checked."""
    height, width = conv_shape(mask.shape)[2:]
    filter_size = {"R": height, "S": width}
    blocks = []
    for candidate in candidates:
        blocks.append(check_block([filter_size[size] if isinstance(size, str) else size for size in candidate]))
    obeyed = (block for block in sorted(blocks, key=math.prod, reverse=True) if obeys(mask, block))
    return next(obeyed, (1, 1, 1, 1))


def grid_shape(shape: Sequence[int], block: Sequence[int]) -> list[int]:
    """Return the number of blocks in each dimension of a tensor of this shape."""
    return [-(-length // size) for length, size in zip(shape, block, strict=True)]


def block_sums(values: Tensor, block: Sequence[int]) -> Tensor:
    """Return the sum of the values in each block, a tensor of shape `grid_shape(values.shape, block)`."""
    grid = grid_shape(values.shape, block)
    padded_shape = [count * size for count, size in zip(grid, block, strict=True)]
    if padded_shape != list(values.shape):
        padded = values.new_zeros(padded_shape)
        padded[tuple(slice(length) for length in values.shape)] = values
        values = padded
    split = [length for pair in zip(grid, block, strict=True) for length in pair]
    return values.reshape(split).sum(tuple(range(1, len(split), 2)))


def block_sizes(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Return the number of elements of each block, int64 of shape `grid_shape(shape, block)`."""
    if all(length % size == 0 for length, size in zip(shape, block, strict=True)):  # one number, expanded
        return torch.tensor(math.prod(block), device="cpu").expand(grid_shape(shape, block))
    sizes = torch.ones(1, dtype=torch.int64, device="cpu")
    for length, size in zip(shape, block, strict=True):
        sizes = sizes.unsqueeze(-1) * torch.tensor(
            [min(size, length - start) for start in range(0, length, size)], device="cpu"
        )
    return sizes.squeeze(0)


def conv_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a weight as a convolution's: [K, C] of a linear layer becomes [K, C, 1, 1]."""
    return (*shape, 1, 1)[:4]
