"""`max_pool2d_out` and `max_pool2d_grad_input_out` on CUDA: the checks before the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_adv.kernels.layout import layout_of
from sparse_adv.kernels.tensor_checks import check, check_apart, check_dtype, check_floating, check_layout, check_size
from sparse_adv.ops._library import IMPLEMENTATIONS, has_triton
from sparse_adv.ops.gate import check_gate


def max_pool2d_out(input: Tensor, kernel_size: Sequence[int], out: Tensor, index: Tensor | None) -> None:
    rows, cols = _check_geometry(input, out, kernel_size, index)
    check_apart("out", out, "input", input)
    if index is not None:
        check_apart("index", index, "input", input)
        check_apart("index", index, "out", out)
    if out.numel():
        from sparse_adv.kernels import max_pool2d as kernels

        kernels.forward(input, (rows, cols), out, index)


def max_pool2d_grad_input_out(
    grad_output: Tensor,
    index: Tensor,
    kernel_size: Sequence[int],
    residual: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
) -> None:
    rows, cols = _check_geometry(out, grad_output, kernel_size, index)
    check_apart("out", out, "grad_output", grad_output)
    check_apart("out", out, "index", index)
    if residual is not None:
        check_floating("residual", residual, out)
        check_size("residual", residual, out.shape)
        check_dtype("residual", residual, out.dtype)
        if residual.data_ptr() != out.data_ptr():
            check_apart("out", out, "residual", residual)
    if gate is not None:
        check_gate(gate, out)
        check_apart("gate", gate, "out", out)
    if out.numel():
        from sparse_adv.kernels import max_pool2d as kernels

        kernels.backward(grad_output, index, (rows, cols), residual, gate, out)


def _check_geometry(image: Tensor, pooled: Tensor, kernel_size: Sequence[int], index: Tensor | None) -> tuple[int, int]:
    check(has_triton(), "max_pool2d on CUDA needs Triton, which cannot be imported")
    check(image.dim() == 4, f"the images must have 4 dimensions, got {image.dim()}")
    check_floating("the images", image, image)
    layout = layout_of(image)
    check_layout("the images", image, layout)
    fits = len(kernel_size) == 2 and min(kernel_size) >= 1 and kernel_size[0] * kernel_size[1] <= 255
    check(fits, f"kernel_size must be rows and columns of a window of 1 to 255 elements, got {list(kernel_size)}")
    rows, cols = kernel_size
    pooled_size = *image.shape[:2], image.shape[2] // rows, image.shape[3] // cols
    check_floating("the pooled images", pooled, image)
    check_size("the pooled images", pooled, pooled_size)
    check_dtype("the pooled images", pooled, image.dtype)
    check_layout("the pooled images", pooled, layout)
    if index is not None:
        check_size("index", index, pooled_size)
        check_dtype("index", index, torch.uint8)
        check_layout("index", index, layout)
    return rows, cols


for _function in (max_pool2d_out, max_pool2d_grad_input_out):
    IMPLEMENTATIONS.impl(_function.__name__, _function, "CUDA")
