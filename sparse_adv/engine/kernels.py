"""What a device supplies to the engine's steps, and the parts that plain PyTorch computes on every device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv.engine.folding import FoldedNorm
from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops.conv_geometry import geometry_of
from sparse_adv.ops.cuda_graph import Capturer

Place = Callable[[], Tensor]
"""Returns the memory planned for a result; a kernel may use it or allocate its own."""


class Convolution:
    """A convolution with the BatchNorm behind it folded in. In eval mode, both stay constant between updates.

    Call `fold` before the first pass.

    Args:
        layer: the convolution.
        shape: of the input, for a whole batch; CPU kernels also compute fewer images.
        kernels: of the device.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, kernels: DeviceKernels) -> None:
        self.layer, self.shape, self.kernels = layer, shape, kernels
        self.geometry = geometry_of(layer)
        self.weight: Tensor
        self.bias: Tensor | None

    def fold(self, norm: FoldedNorm | None) -> None:
        """Read the weights again, and fold in the BatchNorm behind them, if there is one."""
        self.bias = self.folded_bias(norm)
        self.weight = self.folded_weight(norm)

    def folded_bias(self, norm: FoldedNorm | None) -> Tensor | None:
        """The bias that the passes add."""
        bias = None if self.layer.bias is None else self.layer.bias.detach()
        if norm is not None:
            bias = norm.bias if bias is None else norm.shift + bias * norm.scale
        return None if bias is None else bias.to(self.kernels.dtype)

    def folded_weight(self, norm: FoldedNorm | None) -> Tensor:
        """The weight that the passes read."""
        weight, kernels = self.layer.weight.detach(), self.kernels
        if norm is not None:  # in one pass
            memory = torch.empty_like(weight, dtype=kernels.dtype, memory_format=kernels.memory_format)
            weight = torch.mul(weight, norm.scale[:, None, None, None], out=memory)
        return self.masked(weight).to(kernels.dtype, memory_format=kernels.memory_format)

    def masked(self, weight: Tensor) -> Tensor:
        """The weight with zeros where it is pruned; kernels that read only kept weights may skip this."""
        return torch.where(self.layer.weight_mask, weight, 0) if isinstance(self.layer, MaskedConv2d) else weight

    def kernel(self, pass_: str) -> str:
        """Name of the kernel of a whole batch for "forward" or "grad_input"."""
        return "dense"

    def input_shape(self, images: int) -> torch.Size:
        """The shape of the input for a number of images."""
        return torch.Size((images, *self.shape[1:]))

    def _unread_input(self, images: int, device: torch.device) -> Tensor:
        """Memory with the shape and memory format of an input, whose values the gradient of the input does not need."""
        return self.kernels.empty(self.input_shape(images), device)

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        """conv(x) + bias, with an epilogue."""
        y = self.kernels.plain(F.conv2d(x, self.weight, self.bias, *self.geometry, self.layer.groups))
        return self.kernels.finish(y, epilogue)

    def grad_input(self, grad: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        """The gradient of the input, with an epilogue."""
        result = torch.ops.aten.convolution_backward(
            grad,
            self._unread_input(len(grad), grad.device),
            self.weight,
            None,
            *self.geometry,
            False,
            (0, 0),
            self.layer.groups,
            (True, False, False),
        )[0]
        return self.kernels.finish(self.kernels.plain(result), epilogue)


class DeviceKernels(ABC):
    """The functions that a device supplies, with a memory format for images and for gates.

    Attributes:
        any_batch: whether the kernels compute any number of images, and not whole batches only.
        writes_all_gates: whether all kernels write gates, and not only the pointwise one and some of convolutions.
        reuses_memory: whether each pass writes its results where the one before did. A graph must not: another thread
            may make a pass while it is replayed.
        capturer: captures passes that are made often as graphs; None if calling the kernels takes no time.

    Args:
        dtype: of the arithmetic.
        memory_format: of the images.
    """

    any_batch = False
    writes_all_gates = False
    reuses_memory = True
    capturer: ClassVar[type[Capturer] | None] = None

    def __init__(self, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
        self.dtype, self.memory_format = dtype, memory_format

    def plain(self, x: Tensor) -> Tensor:
        """The tensor in the engine's memory format and dtype; without a copy if it has both already."""
        # `to(memory_format=...)` would return a slice of channels of a channels_last tensor unchanged.
        memory_format = self.memory_format if x.dim() == 4 else torch.contiguous_format
        return x.to(self.dtype).contiguous(memory_format=memory_format)

    def empty(self, shape: torch.Size, device: torch.device) -> Tensor:
        memory_format = self.memory_format if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=memory_format)

    def memory(self, like: Tensor, place: Place) -> Tensor:
        """Memory for a result with the shape of another tensor: the planned memory, or new one."""
        return torch.empty_like(like)

    @abstractmethod
    def new_gate(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        """Memory for the gate of a value of this shape; None if the value is its own gate."""

    def writes_gate_of(self, layer: nn.Conv2d, shape: torch.Size) -> bool:
        """Whether the forward kernel of a convolution, with an input of this shape, writes a gate."""
        return True

    @abstractmethod
    def convolution(self, layer: nn.Conv2d, shape: torch.Size) -> Convolution:
        """The convolution of a layer with the kernel that is the fastest for inputs of this shape."""

    def max_pool(self, x: Tensor, size: tuple[int, int], index: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        """The maximum of windows that do not overlap, and its position in each, which may be written to `index`."""
        return F.max_pool2d_with_indices(x, size)

    def max_pool_grad(
        self, grad: Tensor, index: Tensor, size: tuple[int, int], shape: torch.Size, epilogue: Epilogue, place: Place
    ) -> Tensor:
        """The gradient of an input of this shape, with an epilogue."""
        unread = self.empty(shape, grad.device)  # only its shape and memory format are read
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return self.finish(self.plain(backward(grad, unread, size, size, (0, 0), (1, 1), False, index)), epilogue)

    def finish(self, result: Tensor, epilogue: Epilogue) -> Tensor:
        """Apply an epilogue in place to the result of a kernel that cannot apply it."""
        return result if epilogue.is_empty else self.pointwise(result, epilogue, lambda: result)

    @abstractmethod
    def pointwise(self, x: Tensor, epilogue: Epilogue, place: Place | None = None) -> Tensor:
        """An epilogue as a step of its own."""
