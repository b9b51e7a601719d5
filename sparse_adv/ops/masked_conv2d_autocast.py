"""`masked_conv2d` under autocast: it computes in autocast's dtype, as `torch.nn.functional.conv2d` does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_adv.ops._library import IMPLEMENTATIONS
from sparse_adv.ops.masked_conv2d_gradients import keep_known_through

_DEVICES = ("cpu", "cuda")


def dtype_under_autocast(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast casts the tensor to; its own where autocast is off or does not cast it."""
    device = tensor.device.type
    # float64 is not cast, as in torch.amp.
    if device not in _DEVICES or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _register(device: str) -> None:
    """Register a cast to autocast's current dtype; torch.library.register_autocast would fix it once and for all."""
    key = f"Autocast{device.upper()}"
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(argument: Any) -> Any:
        return argument.to(dtype_under_autocast(argument)) if isinstance(argument, Tensor) else argument

    def autocast(input: Tensor, weight: Tensor, pattern: list[Tensor], *rest: Any) -> Tensor:
        operands = cast(input), cast(weight), pattern, *map(cast, rest)
        if operands[1] is not weight and not torch.compiler.is_compiling():
            keep_known_through(operands[1])
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return torch.ops.sparse_adv.masked_conv2d(*operands)

    IMPLEMENTATIONS.impl("masked_conv2d", autocast, key)


for _device in _DEVICES:
    _register(_device)
