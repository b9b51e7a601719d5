"""`masked_winograd_conv2d_out`, a convolution with fewer multiplications for 3 x 3 filters pruned as wholes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparse_adv.ops.arguments import Pair, check_flag, check_tensors
from sparse_adv.ops.conv_geometry import read_padding
from sparse_adv.ops.masked_conv2d_pattern import Pattern, check_fits, check_pattern
from sparse_adv.ops.written import check_written, mark_written, returns_nothing

ELEMENTS = 36
"""Elements of a transformed filter: 4 x 4 pixels of the output need 6 x 6 of the input."""
_OC_BLOCKS = 4, 2, 1


class LiveFilters(NamedTuple):
    """The filters in which a mask keeps weights: a CSR matrix with a row for each block of output channels."""

    row_offsets: Tensor
    """int32 [ceil(K / oc_block) + 1]."""
    channels: Tensor
    """int32 [row_offsets[-1]], the input channels of each row."""
    oc_block: int
    """1, 2 or 4 output channels whose filters are kept together."""


class LiveWeight(NamedTuple):
    """Transformed filters, as `masked_winograd_conv2d_weight` returns them."""

    row_offsets: Tensor
    """int32 [ceil(K / oc_block) + 1]: where the input channels of each block of output channels begin."""
    channels: Tensor
    """int32 [row_offsets[-1]]: the input channels of each row."""
    values: Tensor
    """float32 [36, len(channels), oc_block], oc_block being 1, 2 or 4."""


def live_filters(pattern: Pattern, transposed: bool = False) -> LiveFilters:
    """List the filters in which a mask keeps weights; once per mask.

    Args:
        pattern: what `compile_pattern` returned for a mask [K, C, 3, 3], on the CPU. The first number of its block says
            how many output channels share a row.
        transposed: True for the convolution that gives the gradient of the input, from K channels to C; then the second
            number of the block says how many channels share a row.

    Returns:
        The filters.

    Raises:
        TypeError: if `pattern` is not a `Pattern`, or transposed is not a bool.
        ValueError: if its mask has groups, other filters than 3 x 3, or is not on the CPU.

    Examples:
        >>> from sparse_adv.ops import compile_pattern
        >>> mask = torch.zeros(2, 3, 3, 3, dtype=torch.bool)
        >>> mask[0, 2] = mask[1, 0] = True
        >>> live_filters(compile_pattern(mask, (1, 1, 3, 3))).channels.tolist()
        [2, 0]
    """
    check_pattern(pattern)
    check_flag("transposed", transposed)
    mask, groups = pattern.mask, pattern.groups
    if mask.shape[2:] != (3, 3) or groups != 1 or mask.device.type != "cpu":
        raise ValueError(
            f"pattern must be that of 3 x 3 filters on the CPU without groups, got a mask of shape "
            f"{tuple(mask.shape)} on {mask.device} with groups={groups}"
        )
    together = pattern.block[1 if transposed else 0]
    oc_block = next(size for size in _OC_BLOCKS if together % size == 0)
    live = mask.flatten(2).any(2)
    if transposed:
        live = live.t()
    rows = F.pad(live, (0, 0, 0, -len(live) % oc_block)).unflatten(0, (-1, oc_block)).any(1)
    offsets = F.pad(rows.sum(1).cumsum(0), (1, 0))
    return LiveFilters(offsets.int(), rows.nonzero()[:, 1].int(), oc_block)


def masked_winograd_conv2d_weight(weight: Tensor, pattern: Pattern, *, transposed: bool = False) -> LiveWeight:
    """Transform the live filters of a masked 3 x 3 convolution for `masked_winograd_conv2d_out`.

    u = G (w * mask) G^T for each filter in which the mask keeps weights, with the source's matrix G for tiles of 4 x 4
    pixels. The result has 4 times as many numbers as these filters.

    Args:
        weight: float32 tensor [K, C, 3, 3] on the CPU, in any layout; pruned entries count as 0.
        pattern: what `compile_pattern` returned for the weight's mask.
        transposed: True for the convolution that gives the gradient of the input: from K channels to C, with the taps
            turned by 180 degrees.

    Returns:
        The transformed filters. They are not differentiable.

    Raises:
        TypeError: if weight is no tensor, `pattern` is not a `Pattern`, or transposed is not a bool.
        ValueError: if the weight has another shape than the mask, or the mask has groups, other filters than 3 x 3, or
            is not on the CPU.
        RuntimeError: for another dtype.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016), section 4.3.

    Examples:
        >>> from sparse_adv.ops import compile_pattern
        >>> mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
        >>> mask[:, 1] = True
        >>> masked_winograd_conv2d_weight(torch.rand(4, 3, 3, 3), compile_pattern(mask, (4, 1, 3, 3))).values.shape
        torch.Size([36, 1, 4])
    """
    check_tensors(weight=weight)
    filters = live_filters(pattern, transposed)
    check_fits(pattern, weight)
    return transform_filters(weight.detach(), pattern.mask, filters, transposed)


def transform_filters(weight: Tensor, mask: Tensor, filters: LiveFilters, transposed: bool) -> LiveWeight:
    """`masked_winograd_conv2d_weight` for a weight that fits, with the filters listed before."""
    row_offsets, channels, oc_block = filters
    values = torch.ops.sparse_adv.masked_winograd_conv2d_weight(
        weight, mask, row_offsets, channels, oc_block, transposed
    )
    return LiveWeight(row_offsets, channels, values)


def masked_winograd_conv2d_out(
    input: Tensor,
    weight: LiveWeight,
    bias: Tensor | None = None,
    padding: Pair | str = 1,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    gate: Tensor | None = None,
    out: Tensor,
    gate_out: Tensor | None = None,
) -> None:
    """Convolve with the live 3 x 3 filters of a mask by Winograd's filtering, into memory that the caller provides.

    Equivalent, but for rounding, to::

        y = conv2d(input, w * mask, padding=padding) + bias[:, None, None] + residual
        out = y.relu() if relu else y.where(gate_to_bool(gate, out), 0)

    where weight is `masked_winograd_conv2d_weight(w, pattern)`, and an operand that is None is left out. For filters
    that are kept as wholes, as with blocks (bo, bi, 3, 3), it needs a quarter of the multiplications of
    `masked_conv2d`. Only there is it worthwhile. The gradient of the input is the same op with transposed weights and
    padding 2 - p. It rounds as `winograd_conv2d` with tile 4 does, and a value that is not finite reaches all pixels of
    its tile. It is not differentiable.

    Args:
        input: contiguous float32 tensor [N, C, H, W] on the CPU.
        weight: result of `masked_winograd_conv2d_weight`.
        bias: float32 tensor [K], or None.
        padding: rows and columns of zeros on each side, as one or two integers from 0 to 2, "same" or "valid".
        residual: tensor like out, or None; it may be out.
        relu: whether a ReLU follows.
        gate: uint8 tensor of the shape of `empty_gate(out)`, or None: makes the elements 0 whose bit is 0. Not with
            relu.
        out: contiguous float32 tensor [N, K, H + 2 padding - 2, W + 2 padding - 2] that is written.
        gate_out: uint8 tensor of the shape of `empty_gate(out)`, or None, only with relu: receives for each element of
            out a bit that says whether the ReLU passes the gradient.

    Raises:
        TypeError: if an operand is not a dense tensor, or weight is not a `LiveWeight`.
        ValueError: if padding is neither one or two integers nor "same" or "valid", devices differ, or a tensor
            requires grad and gradients are enabled.
        RuntimeError: if a shape, dtype or layout does not fit, or tensors overlap.
        NotImplementedError: on other devices than a CPU.

    Source: Lavin and Gray 2016, as `winograd_conv2d`; the sparse products are this library's, design page
    "masked_winograd_conv2d".

    Examples:
        >>> from sparse_adv.ops import compile_pattern
        >>> mask = torch.rand(8, 5, 1, 1).lt(0.3).expand(8, 5, 3, 3)
        >>> x, w, y = torch.rand(1, 5, 6, 6), torch.rand(8, 5, 3, 3), torch.empty(1, 8, 6, 6)
        >>> weight = masked_winograd_conv2d_weight(w, compile_pattern(mask, (1, 1, 3, 3)))
        >>> masked_winograd_conv2d_out(x, weight, out=y)
        >>> torch.allclose(y, torch.conv2d(x, w * mask, padding=1), atol=1e-4)
        True
    """
    zeros = read_padding(padding, (3, 3))
    check_flag("relu", relu)
    if not isinstance(weight, LiveWeight):
        raise TypeError(f"weight must be what masked_winograd_conv2d_weight returned, got {type(weight).__name__}")
    needed = {"input": input, **weight._asdict()}
    check_tensors(**needed)
    operands = {**needed, "bias": bias, "residual": residual, "gate": gate}
    check_written("masked_winograd_conv2d_out", out, **operands, gate_out=gate_out)
    torch.ops.sparse_adv.masked_winograd_conv2d_out(input, *weight, zeros, bias, residual, relu, gate, out, gate_out)
    mark_written(out, gate_out)


@torch.library.register_fake("sparse_adv::masked_winograd_conv2d_weight")
def _(weight: Tensor, mask: Tensor, row_offsets: Tensor, channels: Tensor, oc_block: int, transposed: bool) -> Tensor:
    return weight.new_empty(ELEMENTS, channels.shape[0], oc_block)


returns_nothing("masked_winograd_conv2d_out")


@register_flop_formula(torch.ops.sparse_adv.masked_winograd_conv2d_out)
def _operations(input: Any, row_offsets: Any, channels: Any, values: Any, *args: Any, **_: Any) -> int:
    """The operations of a direct convolution with the filters that are kept."""
    out = args[-2]  # before gate_out
    return 2 * 9 * values[1] * values[2] * out[0] * out[2] * out[3]
