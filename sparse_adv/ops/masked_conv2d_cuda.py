"""`masked_conv2d` and its gradients on CUDA: Triton kernels over the live blocks, or cuDNN on a masked weight.

On tensor cores unstructured masks and small blocks cannot win: of 16 weights that are multiplied together, some survive
in 56 % of cases at density 0.05; and without tensor cores the break-even lies at 96 % of zeros. So these take cuDNN's
time, on a weight that is masked once per optimiser step where the caller holds it constant (`pack_pattern`), else once
per call: 9 bytes a weight. Blocks of 32 or 64 channels take the kernels wherever `ops.block_path` expects a gain.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import masked_conv2d_roofline
from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.masked_conv2d_pattern import (
    PATHS,
    Pattern,
    asked_path,
    block_of,
    groups_of,
    has_blocks,
    kept_of,
    weight_is_masked,
)

log = logging.getLogger(__name__)

_BLOCK_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_PIXELS = 2**30  # of a batch, that the kernels can number
_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT = range(3)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    if _takes_blocks(pattern, _FORWARD, input.shape, stride, padding, dilation, input.dtype):
        from sparse_adv.kernels import masked_conv2d as kernels

        values, (rows, blocks) = _block_values(pattern, weight), pattern[2:4]
        strides, fused = (stride, padding, dilation), (scale, residual, relu)
        return kernels.forward(input, values, blocks, rows, weight.shape, bias, *strides, *fused, _precision())
    kept = _kept(weight, pattern)
    if scale is not None:
        kept = kept * scale[:, None, None, None]  # a pass over the weight instead of one over the output
    output = torch.conv2d(input, in_layout_of(input, kept), bias, stride, padding, dilation, groups)
    if residual is not None:
        output += residual
    return in_layout_of(input, output.relu_() if relu else output)


def masked_conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    pattern: Pattern,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    if _takes_blocks(pattern, _GRAD_INPUT, input_size, stride, padding, dilation, grad_output.dtype):
        from sparse_adv.kernels import masked_conv2d as kernels

        values, (blocks, rows, order) = _block_values(pattern, weight), pattern[3:6]
        strides = (stride, padding, dilation)
        return kernels.grad_input(
            grad_output, values, blocks, rows, order, input_size, *strides, precision=_precision()
        )
    kept = in_layout_of(grad_output, _kept(weight, pattern))
    # Of the input only the size is read. The weight's layout, then, is what makes cuDNN take this one.
    input = grad_output.new_empty(1).expand(*input_size)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, kept, None, *geometry, (True, False, False))[0]
    return in_layout_of(grad_output, grad)


def masked_conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    pattern: Pattern,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    mask = pattern[1]
    if _takes_blocks(pattern, _GRAD_WEIGHT, input.shape, stride, padding, dilation, input.dtype):
        from sparse_adv.kernels import masked_conv2d_grad_weight as kernels

        block, strides = block_of(pattern)[:2], (stride, padding, dilation)
        return kernels.grad_weight(grad_output, input, pattern[3], block, mask.shape, *strides, groups, _precision())
    weight = input.new_empty(1).expand(mask.shape)
    geometry = (stride, padding, dilation, False, (0, 0), groups)
    grad = torch.ops.aten.convolution_backward(grad_output, input, weight, None, *geometry, (False, True, False))[1]
    # Selected and not multiplied, as a pruned NaN or infinity counts as 0; in one pass into the layout that the op has.
    return torch.where(mask, grad, grad.new_zeros(()), out=torch.empty_like(mask, dtype=grad.dtype))


def pack_values(weight: Tensor, pattern: Pattern) -> list[Tensor]:
    """The values of the live blocks [n, bo, bi], in the order of the blocks; nothing where no kernel reads them."""
    if weight.dtype not in _BLOCK_DTYPES or not has_blocks(pattern) or not _triton():
        return []
    return [_block_values(pattern, weight)]


def chosen_paths(
    pattern: Pattern,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """For 16-bit images; see `ops.chosen_paths`."""
    chosen = [
        _takes_blocks(pattern, pass_, input_size, stride, padding, dilation, torch.bfloat16)
        for pass_ in (_FORWARD, _GRAD_INPUT, _GRAD_WEIGHT)
    ]
    return [PATHS.index("sparse" if blocks else "dense") for blocks in chosen]


def _takes_blocks(
    pattern: Pattern,
    pass_: int,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> bool:
    asked = asked_path(pattern, pass_)
    if asked == "dense" or not has_blocks(pattern) or dtype not in _BLOCK_DTYPES or not _triton():
        return False
    pixels = [
        (size + 2 * p - d * (f - 1) - 1) // step + 1
        for size, p, d, f, step in zip(input_size[2:], padding, dilation, pattern[1].shape[2:], stride, strict=True)
    ]
    if input_size[0] * max(input_size[2] * input_size[3], pixels[0] * pixels[1]) >= _MOST_PIXELS:
        return False
    if asked == "sparse":
        return True
    work = masked_conv2d_roofline.Pass(
        images=input_size[0],
        in_elements=input_size[1] * input_size[2] * input_size[3],
        out_elements=pattern[1].shape[0] * pixels[0] * pixels[1],
        out_pixels=pixels[0] * pixels[1],
        weights=pattern[1].numel(),
        kept=kept_of(pattern),
        element_bytes=dtype.itemsize,
    )
    return masked_conv2d_roofline.blocks_are_faster(work, gradient_of_weight=pass_ == _GRAD_WEIGHT)


def _block_values(pattern: Pattern, weight: Tensor) -> Tensor:
    """The packed values, which `pack_pattern` may have added in this dtype already."""
    if weight_is_masked(pattern) and len(pattern) > 6 and pattern[6].dtype == weight.dtype:
        return pattern[6]
    from sparse_adv.kernels import masked_conv2d_pack as kernels

    return kernels.pack(weight, pattern[3], block_of(pattern)[:2], groups_of(pattern), weight.dtype)


def _kept(weight: Tensor, pattern: Pattern) -> Tensor:
    return weight if weight_is_masked(pattern) else weight.where(pattern[1], 0)


def _precision() -> str:
    """How float32 blocks are multiplied: as PyTorch's convolutions are, but never without tensor cores."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"


@cache
def _triton() -> bool:
    """Whether Triton is there; says once if not. It is imported only when a block mask is first used."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        log.warning("block masks take the dense convolution: Triton cannot be imported (%s)", error)
        return False
    return True


for _function in (masked_conv2d, masked_conv2d_grad_input, masked_conv2d_grad_weight, pack_values, chosen_paths):
    IMPLEMENTATIONS.impl(_function.__name__, _function, "CUDA")
