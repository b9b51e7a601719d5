"""`masked_conv2d`: a 2-D convolution whose weight is sparse under a fixed mask, and its gradients.

Letters: N batch, C input channels, H x W image; K output channels, R x S filter; P x Q output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from sparse_adv.ops._library import host

Pattern = list[Tensor]
"""A compiled mask: what `compile_pattern` returns and `masked_conv2d` takes. Its layout: csrc/pattern_layout.h."""

_HEADER = host.header_fields
_PLAIN_LENGTH = 6  # without packed values
_PATHS = ("auto", "sparse", "dense")


def compile_pattern(mask: Tensor, block: Sequence[int] = (1, 1), groups: int = 1) -> Pattern:
    """Compile a mask into the index lists that the sparse kernels walk; do it once per mask change, not per call.

    Args:
        mask: bool tensor [K, C/groups, R, S], true = kept.
        block: `(bo, bi)` or `(bo, bi, br, bs)`: all weights in a group of bo consecutive output channels x bi
            consecutive input channels x br x bs filter taps share their fate; `(bo, bi)` means one tap at a time.
            Blocks at an edge are smaller.
        groups: the convolution's groups.

    Returns:
        The pattern: a list of index tensors that name channels and taps, never image sizes.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if its shape, the block or the groups do not fit, or the mask does not obey the block.
    """
    block4 = check_block(block)
    check_mask(mask)
    if groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"groups must divide the mask's {mask.shape[0]} output channels, got {groups}")
    if not obeys(mask, block4):
        raise ValueError(f"mask does not obey block {tuple(block)}: some block is neither kept nor pruned as a whole")
    try:
        arrays = host.compile_pattern(mask.detach().contiguous().cpu().numpy(), block4, groups)
    except ValueError as error:
        raise ValueError(f"mask of shape {tuple(mask.shape)} cannot be compiled: {error}") from error
    header, *lists = (torch.from_numpy(array) for array in arrays)
    return [header, *(tensor.to(mask.device) for tensor in lists)]


def pack_pattern(pattern: Pattern, weight: Tensor) -> Pattern:
    """Add the weight's kept values to a pattern, so that calls read them in the kernel's order instead of gathering.

    The result stands for this weight as long as the weight does not change: use it for the passes between two
    optimiser steps. The kernels then also take for granted that pruned entries of the weight are 0.

    Args:
        pattern: what `compile_pattern` returned for the weight's mask, on the CPU.
        weight: float32 tensor [K, C/groups, R, S] on the CPU, 0 where pruned.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(f"weight must be float32 on the CPU to be packed, got {weight.dtype} on {weight.device}")
    plain = _without_values(pattern)
    values = torch.ops.sparse_adv.pack_values(weight.detach(), plain)
    return [_with_header(plain, "weight_is_masked", [1])[0], *plain[1:], *values]


def set_paths(pattern: Pattern, forward: str = "auto", grad_input: str = "auto", grad_weight: str = "auto") -> Pattern:
    """A copy of the pattern that fixes which kernel each pass takes: "sparse", "dense", or "auto", a static table.

    A pass for which there is no sparse kernel (float64, 16-bit) stays dense.
    """
    paths = (forward, grad_input, grad_weight)
    for name, path in zip(("forward", "grad_input", "grad_weight"), paths, strict=True):
        if path not in _PATHS:
            raise ValueError(f"{name} must be one of {', '.join(_PATHS)}, got {path!r}")
    return _with_header(pattern, "path", [_PATHS.index(path) for path in paths])


def chosen_paths(
    pattern: Pattern,
    input_shape: Sequence[int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> dict[str, str]:
    """The kernel that each pass takes for float32 input of shape [N, C, H, W]: {"forward": "sparse", ...}."""
    paths = torch.ops.sparse_adv.chosen_paths(
        pattern, list(input_shape), list(_pair(stride)), list(_pair(padding)), list(_pair(dilation))
    )
    return {name: _PATHS[path] for name, path in zip(("forward", "grad_input", "grad_weight"), paths, strict=True)}


def _with_header(pattern: Pattern, field: str, values: Sequence[int]) -> Pattern:
    header = pattern[0].clone()
    start = _HEADER[field]
    header[start : start + len(values)] = torch.tensor(values)
    return [header, *pattern[1:]]


def _without_values(pattern: Pattern) -> Pattern:
    if len(pattern) == _PLAIN_LENGTH:
        return pattern
    return _with_header(pattern[:_PLAIN_LENGTH], "weight_is_masked", [0])


def check_block(block: Sequence[int]) -> tuple[int, int, int, int]:
    """The block as (bo, bi, br, bs); raises ValueError if it is none."""
    sizes = tuple(block)
    if len(sizes) == 2:
        sizes = (*sizes, 1, 1)
    if len(sizes) != 4 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"block must be 2 or 4 positive integers (bo, bi) or (bo, bi, br, bs), got {tuple(block)}")
    return sizes


def check_mask(mask: Tensor) -> None:
    """Raises TypeError or ValueError if this is no convolution mask."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (true = kept), got {found}")
    if mask.dim() != 4:
        raise ValueError(f"mask must have the weight's shape [K, C/groups, R, S], got {tuple(mask.shape)}")


def obeys(mask: Tensor, block: Sequence[int]) -> bool:
    """Whether all weights of each block of the mask share their fate."""
    for dim, size in enumerate(check_block(block)):
        length = mask.shape[dim]
        if size == 1 or length == 0:
            continue
        first = torch.arange(length, device=mask.device) // size * size
        if not torch.equal(mask, mask.index_select(dim, first)):
            return False
    return True


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
    stride, dilation = _pair(stride), _pair(dilation)
    padding = _padding(padding, weight, stride, dilation)
    _check(input, weight, pattern, bias, stride, padding, dilation, groups, scale, residual)
    return torch.ops.sparse_adv.masked_conv2d(
        input, weight, pattern, bias, stride, padding, dilation, groups, scale, residual, relu
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
    return _pair(padding)


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
    if len(pattern) not in (6, 8):
        raise ValueError(f"pattern must be what compile_pattern returned, got a list of {len(pattern)} tensors")
    if weight.shape != pattern[1].shape:
        raise ValueError(
            f"pattern was made for a weight of shape {tuple(pattern[1].shape)}, weight has shape {tuple(weight.shape)}"
        )
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


def _empty_in_layout_of(like: Tensor, size: Sequence[int]) -> Tensor:
    """The layout rule of every op (csrc/cpu/convolution.h): channels_last stays so, anything else becomes NCHW."""
    channels_last = not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return like.new_empty(size).contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@torch.library.register_fake("sparse_adv::masked_conv2d")
def _(input, weight, pattern, bias, stride, padding, dilation, *_):  # type: ignore
    spans = [input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) for i in range(2)]
    return _empty_in_layout_of(input, (input.shape[0], weight.shape[0], *_output_size(spans, stride)))


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_input")
def _(grad_output, weight, pattern, input_size, *_):  # type: ignore
    return _empty_in_layout_of(grad_output, input_size)


@torch.library.register_fake("sparse_adv::masked_conv2d_grad_weight")
def _(grad_output, input, pattern, *_):  # type: ignore
    return input.new_empty(pattern[1].shape)


# Gradients. The three ops are closed under differentiation: the convolution is linear in its input and in its weight,
# so each gradient of each op is another of the three.


def _shape_args(ctx: Any) -> tuple[Any, ...]:
    return ctx.stride, ctx.padding, ctx.dilation, ctx.groups


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, pattern, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, scale, _, ctx.relu = inputs
    ctx.save_for_backward(input, weight, scale, output if ctx.relu else None, *pattern)


def _backward_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, scale, output, *pattern = ctx.saved_tensors
    needs = ctx.needs_input_grad
    needs_input, needs_weight, needs_bias, needs_scale, needs_residual = (needs[i] for i in (0, 1, 3, 8, 9))
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    shape = _shape_args(ctx)
    grad_input = grad_weight = grad_scale = None
    if needs_input:
        scaled = grad if scale is None else grad * scale[:, None, None]
        grad_input = torch.ops.sparse_adv.masked_conv2d_grad_input(scaled, weight, pattern, input.shape, *shape)
    if needs_weight or needs_scale:
        grad_weight = torch.ops.sparse_adv.masked_conv2d_grad_weight(grad, input, pattern, *shape)
    if scale is not None and grad_weight is not None:
        # <grad, conv> per channel without the unscaled output: the convolution is linear in the weight.
        grad_scale = torch.where(pattern[1], grad_weight * weight, 0).sum((1, 2, 3))
        grad_weight = torch.where(pattern[1], grad_weight * scale[:, None, None, None], 0)
    return (
        grad_input,
        grad_weight if needs_weight else None,
        [None] * len(pattern),
        grad.sum((0, 2, 3)) if needs_bias else None,
        *[None] * 4,
        grad_scale if needs_scale else None,
        grad if needs_residual else None,
        None,
    )  # type: ignore[return-value]


def _setup_grad_input(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, weight, pattern, _, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, weight, *pattern)


def _backward_grad_input(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, weight, *pattern = ctx.saved_tensors
    shape = _shape_args(ctx)
    needs_grad_output, needs_weight = ctx.needs_input_grad[:2]
    return (
        torch.ops.sparse_adv.masked_conv2d(grad, weight, pattern, None, *shape, None, None, False)
        if needs_grad_output
        else None,
        torch.ops.sparse_adv.masked_conv2d_grad_weight(grad_output, grad, pattern, *shape) if needs_weight else None,
        [None] * len(pattern),
        *[None] * 5,
    )  # type: ignore[return-value]


def _setup_grad_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_output, input, pattern, ctx.stride, ctx.padding, ctx.dilation, ctx.groups = inputs
    ctx.save_for_backward(grad_output, input, *pattern)


def _backward_grad_weight(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, input, *pattern = ctx.saved_tensors
    # Here the gradient takes the weight's place, and values packed for the weight must not.
    pattern = _without_values(pattern)
    shape = _shape_args(ctx)
    needs_grad_output, needs_input = ctx.needs_input_grad[:2]
    return (
        torch.ops.sparse_adv.masked_conv2d(input, grad, pattern, None, *shape, None, None, False)
        if needs_grad_output
        else None,
        torch.ops.sparse_adv.masked_conv2d_grad_input(grad_output, grad, pattern, input.shape, *shape)
        if needs_input
        else None,
        [None] * len(ctx.saved_tensors[2:]),
        *[None] * 4,
    )  # type: ignore[return-value]


torch.library.register_autograd("sparse_adv::masked_conv2d", _backward_forward, setup_context=_setup_forward)
torch.library.register_autograd(
    "sparse_adv::masked_conv2d_grad_input", _backward_grad_input, setup_context=_setup_grad_input
)
torch.library.register_autograd(
    "sparse_adv::masked_conv2d_grad_weight", _backward_grad_weight, setup_context=_setup_grad_weight
)


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

    _LIBRARY.impl("masked_conv2d", autocast, key)


_LIBRARY = torch.library.Library("sparse_adv", "IMPL")
for _device in ("cpu", "cuda"):
    _register_autocast(_device)
