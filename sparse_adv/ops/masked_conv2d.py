"""`masked_conv2d`: a 2-D convolution whose weight is sparse under a fixed mask.

Letters: N batch, C input channels, H x W image; K output channels, R x S filter; P x Q output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.masked_conv2d_pattern import Pattern, check_groups, check_pattern


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolve with a weight of which only the kept entries count.

    Equivalent to::

        y = conv2d(input, weight * mask, None, stride, padding, dilation, groups)
        y = y * scale[:, None, None] + bias[:, None, None] + residual
        y = y.relu() if relu else y

    for any weight: pruned entries are never read as anything but 0, and their gradient is exactly 0. The time follows
    the mask: where the sparse kernels would be slower, the dense convolution runs instead. Differentiable any number
    of times; works under autocast, `torch.compile(fullgraph=True)` and `torch.export`.

    Args:
        input: float tensor [N, C, H, W], NCHW or channels_last (others are copied); the output keeps the layout.
        weight: float tensor [K, C/groups, R, S], of the input's dtype.
        pattern: what `compile_pattern` returned for the weight's mask.
        bias: float tensor [K], or None.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding may be "same" or "valid" where
            it is the same on both sides.
        scale: float tensor [K], or None: a factor per output channel, before the bias (a folded BatchNorm).
        residual: float tensor [N, K, P, Q], or None: added before the ReLU.
        relu: whether to end with a ReLU.

    Returns:
        float tensor [N, K, P, Q].

    Raises:
        TypeError: if dtypes differ or are not floating.
        ValueError: if shapes or devices do not fit together, or the pattern belongs to another weight.
    """
    strides, dilations = _two("stride", stride), _two("dilation", dilation)
    paddings = _padding(padding, weight, strides, dilations)
    _check(input, weight, pattern, bias, strides, paddings, dilations, groups, scale, residual)
    return torch.ops.sparse_adv.masked_conv2d(
        input, weight, pattern, bias, strides, paddings, dilations, groups, scale, residual, relu
    )


def _padding(
    padding: int | tuple[int, int] | str, weight: Tensor, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got stride {stride}')
        total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        if any(t % 2 for t in total):
            raise ValueError(
                f'padding="same" with filter {tuple(weight.shape[2:])} and dilation {dilation} is not the same on both '
                "sides: pad the input with torch.nn.functional.pad first"
            )
        return (total[0] // 2, total[1] // 2)
    if isinstance(padding, str):
        raise ValueError(f'padding must be numbers, "same" or "valid", got "{padding}"')
    return _two("padding", padding)


def _two(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = tuple(_pair(value))
    if len(pair) != 2:
        raise ValueError(f"{name} must be one or two integers, got {value}")
    return pair


def _check(
    input: Tensor,
    weight: Tensor,
    pattern: Pattern,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    scale: Tensor | None,
    residual: Tensor | None,
) -> None:
    if input.dim() != 4:
        raise ValueError(f"input must be [N, C, H, W], got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"input must be a floating point tensor, got {input.dtype}")
    check_pattern(pattern)
    if weight.shape != pattern[1].shape:
        raise ValueError(
            f"pattern was made for a weight of shape {tuple(pattern[1].shape)}, weight has shape {tuple(weight.shape)}"
        )
    check_groups(pattern, groups)
    if input.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"input has {input.shape[1]} channels, weight of shape {tuple(weight.shape)} with groups={groups} needs "
            f"{weight.shape[1] * groups}"
        )
    if min(stride) < 1 or min(dilation) < 1 or min(padding) < 0:
        raise ValueError(
            f"stride and dilation must be positive and padding not negative, got {stride}, {dilation}, {padding}"
        )
    spans = [
        size + 2 * p - d * (f - 1)
        for size, p, d, f in zip(input.shape[2:], padding, dilation, weight.shape[2:], strict=True)
    ]
    if min(spans) < 1:
        raise ValueError(
            f"input of {input.shape[2]} x {input.shape[3]} pixels with padding {padding} is smaller than the filter "
            f"{tuple(weight.shape[2:])} with dilation {dilation}"
        )
    others = {"weight": weight, "bias": bias, "scale": scale, "residual": residual}
    autocast = torch.is_autocast_enabled(input.device.type)
    for name, tensor in others.items():
        if tensor is None:
            continue
        if tensor.device != input.device:
            raise ValueError(f"{name} is on {tensor.device}, input on {input.device}")
        if tensor.dtype != input.dtype and not autocast:
            raise TypeError(f"{name} is {tensor.dtype}, input is {input.dtype}: they must agree")
    for name in ("bias", "scale"):
        vector = others[name]
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape [{weight.shape[0]}], got {tuple(vector.shape)}")
    if residual is not None:
        expected = (input.shape[0], weight.shape[0], *_output_size(spans, stride))
        if tuple(residual.shape) != expected:
            raise ValueError(f"residual must have the output's shape {expected}, got {tuple(residual.shape)}")


def _output_size(spans: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    return ((spans[0] - 1) // stride[0] + 1, (spans[1] - 1) // stride[1] + 1)


@torch.library.register_fake("sparse_adv::masked_conv2d")
def _(input, weight, pattern, bias, stride, padding, dilation, *_):  # type: ignore
    spans = [input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    return in_layout_of(input, input.new_empty((input.shape[0], weight.shape[0], *_output_size(spans, stride))))


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_input")
def _(grad_output, weight, pattern, input_size, *_):  # type: ignore
    return in_layout_of(grad_output, grad_output.new_empty(input_size))


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_weight")
def _(grad_output, input, pattern, *_):  # type: ignore
    return input.new_empty(pattern[1].shape)


def _register_autocast(device: str) -> None:
    """Cast to autocast's dtype of the moment; torch.library.register_autocast would fix one for ever."""
    key = f"Autocast{device.upper()}"
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(tensor: Tensor | None) -> Tensor | None:
        # As torch.amp does: float64 is left alone.
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device))

    def autocast(input: Tensor, weight: Tensor, pattern: Pattern, bias: Tensor | None, *rest: Any) -> Tensor:
        rest = tuple(cast(argument) if isinstance(argument, Tensor) else argument for argument in rest)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.sparse_adv.masked_conv2d(cast(input), cast(weight), pattern, cast(bias), *rest)

    IMPLEMENTATIONS.impl("masked_conv2d", autocast, key)


for _device in ("cpu", "cuda"):
    _register_autocast(_device)
