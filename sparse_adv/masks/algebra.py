"""What can be said about masks: how much they keep, how far apart two are, which blocks they obey."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from sparse_adv.masks.layers import Layer, run_once, unknown_module, uses
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
"""The block shapes that kernels are made for; R and S stand for the filter's height and width."""


def density(masks: Mapping[str, Tensor]) -> float:
    """The fraction of the masked weights that is kept: (number kept) / (number of elements of all masks)."""
    total = sum(mask.numel() for mask in masks.values())
    if total == 0:
        raise ValueError(f"masks must hold at least one element, got {len(masks)} masks")
    return sum(int(mask.count_nonzero()) for mask in masks.values()) / total


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The normalised Hamming distance of two sets of masks: the fraction of positions where they differ.

    Two successive masks of a training run that are nearly equal say that the ticket has been found (Early-Bird
    tickets, You et al. 2020, section 3.2, which stops at 0.1).

    Raises:
        ValueError: if the two do not have the same modules with the same shapes.
    """
    if a.keys() != b.keys():
        raise ValueError(f"a and b must mask the same modules, only one of them has {sorted(a.keys() ^ b.keys())}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"masks of {name!r} differ in shape: {tuple(a[name].shape)} and {tuple(b[name].shape)}")
    return density({name: a[name] != b[name].to(a[name].device) for name in a})


def multiply_add_density(model: nn.Module, masks: Mapping[str, Tensor], input_shape: Sequence[int]) -> float:
    """The fraction of the multiply-adds of convolutions and linear layers that remains under the masks.

    It differs from the density of weights: a convolution's weight is used once per output pixel, and early images are
    large; a linear layer's is used once per row of its input. Layers without a mask count as dense; a forward pass in
    eval mode finds the sizes.

    Args:
        model: the model that the masks belong to, sparse or dense.
        masks: bool tensors keyed by module name.
        input_shape: the model's input [N, C, H, W]; N = 1 will do.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in masks:
        if name not in modules:
            raise ValueError(unknown_module(name, modules))
    by_layer = {modules[name]: mask for name, mask in masks.items()}
    kept = dense = 0

    def visit(layer: Layer, input: Tensor, output: Tensor) -> None:
        nonlocal kept, dense
        count, weights = uses(layer, output), layer.weight.numel()
        dense += count * weights
        kept += count * (int(by_layer[layer].count_nonzero()) if layer in by_layer else weights)

    run_once(model, input_shape, visit, linear=True)
    if dense == 0:
        raise ValueError("model runs no convolution and no linear layer, so there are no multiply-adds to count")
    return kept / dense


def largest_block(mask: Tensor, candidates: Sequence[Sequence[int | str]] = SUPPORTED_BLOCKS) -> Block:
    """The block with most elements, of the candidates, that the mask obeys.

    Args:
        mask: bool tensor [K, C/groups, R, S], or [K, C] of a linear layer, which counts as [K, C, 1, 1].
        candidates: blocks (bo, bi) or (bo, bi, br, bs); "R" and "S" stand for the filter's sizes.

    Returns:
        The block as (bo, bi, br, bs); (1, 1, 1, 1), which every mask obeys, if no candidate fits.
    """
    check_mask(mask, linear=True)
    return largest_obeyed_block(mask, [check_block(_numbers(candidate, mask)) for candidate in candidates])


def largest_obeyed_block(mask: Tensor, blocks: Iterable[Block] | None = None) -> Block:
    """`largest_block` of a mask and blocks that have been checked; None stands for `SUPPORTED_BLOCKS`."""
    if blocks is None:
        blocks = (_complete(_numbers(candidate, mask)) for candidate in SUPPORTED_BLOCKS)
    obeyed = (block for block in sorted(blocks, key=math.prod, reverse=True) if obeys(mask, block))
    return next(obeyed, (1, 1, 1, 1))


def _numbers(block: Sequence[int | str], mask: Tensor) -> list[int]:
    """The block with the filter's sizes in place of "R" and "S"."""
    rows, cols = (*mask.shape, 1, 1)[2:4]
    taps = {"R": rows, "S": cols}
    return [taps[size] if isinstance(size, str) else size for size in block]


def _complete(block: Sequence[int]) -> Block:
    out, into, rows, cols = (*block, 1, 1)[:4]
    return out, into, rows, cols
