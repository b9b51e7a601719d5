"""`masked_conv2d`: a 2-D convolution whose weight is sparse under a fixed mask.

Letters: N batch, C input channels, H x W image; K output channels, R x S filter; P x Q output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.kernels.layout import empty_in_layout_of, output_size
from sparse_adv.ops import reference
from sparse_adv.ops.arguments import Pair, check_flag, check_tensors
from sparse_adv.ops.conv_geometry import check_input, read_geometry
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast
from sparse_adv.ops.masked_conv2d_pattern import Pattern, check_fits, check_groups, check_pattern, unflatten
from sparse_adv.ops.transforms import is_transformed


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve with the entries of a weight that the mask keeps; all others count as 0.

    Equivalent to::

        y = conv2d(input, weight * mask, None, stride, padding, dilation, groups)
        y = y * scale[:, None, None] + bias[:, None, None] + residual
        y = y.relu() if relu else y

    for any weight: pruned entries count as 0 whatever their values are, and their gradient is exactly 0. Where the
    sparse kernels would be slower, the dense convolution runs instead. Differentiable any number of times; works under
    autocast, `torch.compile(fullgraph=True)` and `torch.export`. Under `torch.func` (jvp, vmap, grad) and forward-mode
    AD, plain PyTorch computes the formula above, without sparse kernels.

    If only pruned entries read a pixel that is NaN or infinite, the formula and the dense kernels give NaN, but the
    sparse kernels do not read the pixel.

    Args:
        input: float tensor [N, C, H, W], NCHW or channels_last (others are copied); the output keeps the layout.
        weight: float tensor [K, C/groups, R, S], of the input's dtype.
        pattern: what `compile_pattern` returned for the weight's mask.
        bias: float tensor [K], or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding may be "valid", or "same" where
            that is equal on both sides.
        scale: float tensor [K], or None: a factor per output channel, before the bias (a folded BatchNorm).
        residual: float tensor [N, K, P, Q], or None: added before the ReLU.
        relu: whether to end with a ReLU.

    Returns:
        float tensor [N, K, P, Q].

    Raises:
        TypeError: if dtypes differ or are not floating, or an argument has another type.
        ValueError: if shapes or devices do not fit together, or the pattern belongs to another weight.

    Source: this library's design page "masked_conv2d" has the algorithm and its measurements. The idea of a direct
    sparse convolution, there for inference, is that of Park et al., "Faster CNNs with direct sparse convolutions and
    guided pruning" (ICLR 2017).

    Examples:
        >>> from sparse_adv import ops
        >>> weight = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> pattern = ops.compile_pattern(weight != 0)
        >>> ops.masked_conv2d(torch.ones(1, 2, 1, 3), weight, pattern)
        tensor([[[[2., 2., 2.]]]])
    """
    check_pattern(pattern)
    check_tensors(weight=weight)
    check_flag("relu", relu)
    geometry = read_geometry(pattern.mask.shape[2:], stride, padding, dilation)
    check_fits(pattern, weight)
    check_groups(pattern, groups)
    output_shape = check_input(input, pattern.mask.shape, groups, geometry)
    _check_operands(input, output_shape, {"weight": weight, "bias": bias, "scale": scale, "residual": residual})
    mask = pattern.mask
    if weight.shape[0] == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} has no output channels")
    if weight.shape[1] == 0:  # PyTorch turns no channels into no channels; one channel of zeros per group gives zeros
        input, weight, mask = (F.pad(x, (0, 0, 0, 0, 0, n)) for x, n in ((input, groups), (weight, 1), (mask, 1)))
    if is_transformed() or mask is not pattern.mask:
        return reference.masked_conv2d(
            input, weight, mask, bias, *geometry, groups, scale=scale, residual=residual, relu=relu
        )
    return torch.ops.sparse_adv.masked_conv2d(
        input, weight, pattern.flatten(), bias, *geometry, groups, scale, residual, relu
    )


def _check_operands(input: Tensor, output_shape: tuple[int, ...], operands: dict[str, Tensor | None]) -> None:
    for name, tensor in operands.items():
        if tensor is None:
            continue
        check_tensors(**{name: tensor})
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}")
        if dtype_under_autocast(tensor) != dtype_under_autocast(input):
            raise TypeError(f"{name} is {tensor.dtype}, input is {input.dtype}: they must agree")
    for name in ("bias", "scale"):
        vector = operands[name]
        if vector is not None and vector.shape != output_shape[1:2]:
            raise ValueError(f"{name} must have shape [{output_shape[1]}], got {tuple(vector.shape)}")
    residual = operands["residual"]
    if residual is not None and tuple(residual.shape) != output_shape:
        raise ValueError(f"residual must have the output's shape {output_shape}, got {tuple(residual.shape)}")


@torch.library.register_fake("sparse_adv::masked_conv2d")
def _(input, weight, pattern, bias, stride, padding, dilation, *_):  # type: ignore
    pixels = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_in_layout_of(input, (input.shape[0], weight.shape[0], *pixels))


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_input")
def _(grad_output, weight, pattern, input_size, *_):  # type: ignore
    return empty_in_layout_of(grad_output, input_size)


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_weight")
def _(grad_output, input, pattern, *_):  # type: ignore
    size = unflatten(pattern).mask.shape
    return empty_in_layout_of(input, size) if input.device.type == "cuda" else input.new_empty(size)
