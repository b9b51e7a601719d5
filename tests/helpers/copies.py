"""Counts copies of tensors, which cost memory and time and change no result."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Copies(TorchDispatchMode):
    """Within the block, `count` grows with each copy of a tensor of this shape and dtype; None stands for any dtype."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape, self.dtype, self.count = shape, dtype, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.clone, aten._to_copy, aten.copy_):
            self.count += args[0].shape == self.shape and self.dtype in (None, args[0].dtype)
        return func(*args, **(kwargs or {}))
