"""Plans: which kernel each pass of a convolution runs, why, and how many multiply-adds (MACs) it executes.

The kernels of the op are chosen only here. On the CPU the plan comes from the C++ op, which the passes follow; on CUDA
the passes call `plan_on_cuda`. `nn.explain`, `nn.count_macs` and `nn.tune` call `plan`. Steps of the engine may take
Winograd's filtering instead of the op (`engine/fastest_kernel.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_adv.kernels.layout import MAX_PIXELS, output_size
from sparse_adv.ops import masked_conv2d_roofline
from sparse_adv.ops._library import has_triton
from sparse_adv.ops.arguments import Pair
from sparse_adv.ops.conv_geometry import Geometry, check_input, read_geometry
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast
from sparse_adv.ops.masked_conv2d_pattern import CPU_DTYPE, KERNELS, BlockPattern, Pattern, check_pattern

_BLOCK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

REQUESTED, TABLE, ROOFLINE = "requested", "table", "roofline"


class PassPlan(NamedTuple):
    """The plan of one pass of a convolution."""

    kernel: str
    """"sparse" or "dense"."""
    reason: str
    """"requested" (by `set_kernels`), "table" (the CPU kernels' cost model), "roofline" (the GPU kernels' cost model),
    or why there is no sparse kernel."""
    macs: int
    """Multiply-adds executed: output pixels of the whole batch times the weights that the mask keeps, or times all
    weights where the kernel is dense."""


class Plan(NamedTuple):
    """The plans of the three passes of a convolution; `plan` returns one."""

    forward: PassPlan
    grad_input: PassPlan
    grad_weight: PassPlan


def plan(pattern: Pattern, input: Tensor, stride: Pair = 1, padding: Pair | str = 0, dilation: Pair = 1) -> Plan:
    """Return which kernel each pass of `masked_conv2d` runs, why, and how many multiply-adds it executes.

    Args:
        pattern: what `compile_pattern` returned.
        input: float tensor [N, C, H, W]. Only its device, shape, layout and dtype (under autocast, autocast's dtype)
            matter. grad_output is assumed to have the layout of the output.
        stride, padding, dilation: as for `masked_conv2d`.

    Returns:
        For each of the three passes the kernel, the reason and the MACs.

    Raises:
        TypeError: if the input is not floating, or `pattern` is not a `Pattern`.
        ValueError: if the input does not fit the pattern.

    Examples:
        >>> from sparse_adv import ops
        >>> pattern = ops.compile_pattern(torch.ones(8, 4, 3, 3, dtype=torch.bool))
        >>> ops.plan(pattern, torch.empty(1, 4, 6, 6)).forward
        PassPlan(kernel='dense', reason='table', macs=4608)
    """
    check_pattern(pattern)
    geometry = read_geometry(pattern.mask.shape[2:], stride, padding, dilation)
    batch, _, rows, cols = check_input(input, pattern.mask.shape, pattern.groups, geometry)
    dtype, device = dtype_under_autocast(input), input.device.type
    if device == "cpu":
        return _plan_on_cpu(pattern, input, dtype, geometry)
    if device == "cuda":
        return Plan(*(plan_on_cuda(pattern, name, input.shape, dtype, *geometry) for name in Plan._fields))
    dense = PassPlan("dense", missing_kernel(pattern, dtype, device), batch * rows * cols * pattern.mask.numel())
    return Plan(dense, dense, dense)


def plan_on_cuda(
    pattern: Pattern,
    pass_: str,
    input_size: Sequence[int],
    dtype: torch.dtype,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> PassPlan:
    """The plan of one pass, "forward", "grad_input" or "grad_weight", on CUDA."""
    rows, cols = output_size(input_size[2:], pattern.mask.shape[2:], stride, padding, dilation)
    positions = input_size[0] * rows * cols
    kernel, reason = _kernel_on_cuda(pattern, pass_, input_size, (rows, cols), dtype)
    return PassPlan(kernel, reason, positions * (pattern.nonzeros if kernel == "sparse" else pattern.mask.numel()))


def missing_kernel(pattern: Pattern, dtype: torch.dtype, device: str) -> str:
    """Why no sparse kernel can run this pattern in this dtype on this type of device; "" if there is one."""
    kind = str(dtype).removeprefix("torch.")
    if device == "cpu":
        return "" if dtype == CPU_DTYPE else f"no sparse kernel for {kind} on cpu"
    if device != "cuda":
        return f"no sparse kernel on {device}"
    if not isinstance(pattern, BlockPattern):
        return f"no sparse kernel for block {pattern.block} on cuda"
    if dtype not in _BLOCK_DTYPES:
        return f"no sparse kernel for {kind} on cuda"
    return "" if has_triton() else "no sparse kernel without Triton"


def _plan_on_cpu(pattern: Pattern, input: Tensor, dtype: torch.dtype, geometry: Geometry) -> Plan:
    # The op reads no elements, so an input that autocast would cast need not be cast here.
    same_layout = input if input.dtype == dtype else torch.empty_like(input, dtype=dtype)
    numbers = torch.ops.sparse_adv.masked_conv2d_plan(same_layout, pattern.flatten(), *geometry)
    missing = missing_kernel(pattern, dtype, "cpu")
    passes = []
    for index, macs, request in zip(numbers[::2], numbers[1::2], pattern.requested_kernels, strict=True):
        kernel = KERNELS[index]
        if missing:
            reason = missing
        elif request == "auto":
            reason = TABLE
        else:
            reason = REQUESTED if kernel == request else "no sparse kernel for images of this size"
        passes.append(PassPlan(kernel, reason, macs))
    return Plan(*passes)


def _kernel_on_cuda(
    pattern: Pattern, pass_: str, input_size: Sequence[int], output_pixels: tuple[int, int], dtype: torch.dtype
) -> tuple[str, str]:
    """The kernel and the reason."""
    request = getattr(pattern.requested_kernels, pass_)
    missing = missing_kernel(pattern, dtype, "cuda")
    if missing:
        return "dense", missing
    if request == "dense":
        return "dense", REQUESTED
    images, channels, *pixels = input_size
    in_pixels, out_pixels = pixels[0] * pixels[1], output_pixels[0] * output_pixels[1]
    if images * max(in_pixels, out_pixels) >= MAX_PIXELS:
        return "dense", "no sparse kernel for images of this size"
    if request == "sparse":
        return "sparse", REQUESTED
    cost = masked_conv2d_roofline.PassSizes(
        images=images,
        in_elements=channels * in_pixels,
        out_elements=pattern.mask.shape[0] * out_pixels,
        out_pixels=out_pixels,
        weights=pattern.mask.numel(),
        nonzeros=pattern.nonzeros,
        element_bytes=dtype.itemsize,
        channels=(pattern.mask.shape[0], pattern.mask.shape[1]),
        block=pattern.block[:2],
    )
    faster = masked_conv2d_roofline.blocks_are_faster(cost, gradient_of_weight=pass_ == "grad_weight")
    return "sparse" if faster else "dense", ROOFLINE
