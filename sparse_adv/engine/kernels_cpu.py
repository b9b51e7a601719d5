"""The arithmetic of the steps on a CPU: this library's convolutions and pointwise op, oneDNN for the rest.

The native ops are called directly, without the checks that their functions in `sparse_adv.ops` make, because these took
25 to 40 us a call. The operands need no check: they are the engine's own buffers, on one device and without gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from sparse_adv import ops
from sparse_adv.engine.fastest_kernel import is_faster_in_nchw, sparse_is_faster, takes_live_filters, winograd_tile
from sparse_adv.engine.folding import FoldedNorm
from sparse_adv.engine.kernels import Convolution, DeviceKernels, Place
from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops.masked_conv2d_pattern import pack_checked
from sparse_adv.ops.masked_winograd_conv2d import LiveWeight, live_filters, transform_filters


class CpuKernels(DeviceKernels):
    """Kernels that write into planned memory, with one bit per element of a ReLU's output as its gate."""

    any_batch = True
    writes_all_gates = True

    def memory(self, like: Tensor, place: Place) -> Tensor:
        return place()

    def new_gate(self, shape: torch.Size, device: torch.device) -> Tensor:
        return ops.empty_gate(_as_images(self.empty(shape, device)))

    def convolution(self, layer: nn.Conv2d, shape: torch.Size) -> Convolution:
        channels_last = self.memory_format == torch.channels_last
        tile = winograd_tile(layer, shape) if channels_last and self.dtype == torch.float32 else None
        if isinstance(layer, MaskedConv2d) and not channels_last and takes_live_filters(layer, shape):
            return MaskedWinogradConvolution(layer, shape, self)
        if isinstance(layer, MaskedConv2d) and (tile is None or sparse_is_faster(layer, shape)):
            return MaskedConvolution(layer, shape, self)
        if tile is not None:
            return DenseWinogradConvolution(layer, shape, self, tile)
        if channels_last and is_faster_in_nchw(layer, shape):
            return NchwConvolution(layer, shape, self)
        return Convolution(layer, shape, self)

    def max_pool(self, x: Tensor, size: tuple[int, int], index: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        if x.dtype not in (torch.float32, torch.float64):
            return super().max_pool(x, size, index, place)
        out = place()
        if index is None or index.shape != out.shape:
            index = torch.empty_like(out, dtype=torch.uint8)
        torch.ops.sparse_adv.max_pool2d_out(x, size, out, index)
        return out, index

    def max_pool_grad(
        self, grad: Tensor, index: Tensor, size: tuple[int, int], shape: torch.Size, epilogue: Epilogue, place: Place
    ) -> Tensor:
        if index.dtype != torch.uint8:
            return super().max_pool_grad(grad, index, size, shape, epilogue, place)
        out = place()
        operands = grad, index, size, epilogue.residual, epilogue.gate
        torch.ops.sparse_adv.max_pool2d_grad_input_out(*operands, out)
        return out

    def pointwise(self, x: Tensor, epilogue: Epilogue, place: Place | None = None) -> Tensor:
        out = torch.empty_like(x) if place is None else place()
        scale, bias, residual, relu, gate_out, gate = epilogue
        scale, bias = (None if vector is None else vector.to(x.dtype) for vector in (scale, bias))
        residual = None if residual is None else _as_images(residual)
        images, result = _as_images(x), _as_images(out)
        torch.ops.sparse_adv.pointwise_out(images, scale, bias, residual, relu, gate, result, gate_out)
        return out


class NchwConvolution(Convolution):
    """A dense convolution that copies its images to NCHW, where others are channels_last."""

    def folded_weight(self, norm: FoldedNorm | None) -> Tensor:
        return super().folded_weight(norm).contiguous()

    def _unread_input(self, images: int, device: torch.device) -> Tensor:
        return torch.empty(self.input_shape(images), dtype=self.kernels.dtype, device=device)

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        return super().forward(x.contiguous(), epilogue, place)

    def grad_input(self, grad: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        return super().grad_input(grad.contiguous(), epilogue, place)


class MaskedConvolution(Convolution):
    """A masked convolution, with the kernel that its plan names."""

    layer: MaskedConv2d

    def kernel(self, pass_: str) -> str:
        return str(getattr(self._plan(self.shape[0]), pass_).kernel)

    def _plan(self, images: int) -> ops.Plan:
        x = self.kernels.empty(self.input_shape(images), self.layer.weight.device)
        return ops.plan(self._packed, x, *self.geometry)

    def fold(self, norm: FoldedNorm | None) -> None:
        self.weight, self._norm = self.layer.weight.detach(), norm
        scale = None if norm is None else norm.scale.to(self.weight.dtype)
        self._packed = pack_checked(self.layer.pattern, self.weight, scale)
        self._pattern, self.bias = self._packed.flatten(), self.folded_bias(norm)
        self._weights: dict[int, Tensor] = {}
        self._whole: Tensor | None = None
        self._weight_for(self.shape[0])  # now, as the layer's weight may change before the first pass

    def _weight_for(self, images: int) -> Tensor:
        """The weight that the kernels read for a number of images; for fewer than a batch they may be dense.

        Folding and masking the whole weight takes longer than packing it, so this is done for the dense kernel alone.
        """
        if images not in self._weights:
            plan = self._plan(images)
            if plan.forward.kernel == plan.grad_input.kernel == "sparse":
                self._weights[images] = self.weight
            else:
                self._whole = self.folded_weight(self._norm) if self._whole is None else self._whole
                self._weights[images] = self._whole
        return self._weights[images]

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        out = place()
        operands = x, self._weight_for(len(x)), self._pattern, self.bias, *self.geometry, self.layer.groups
        torch.ops.sparse_adv.masked_conv2d_out(*operands, epilogue.residual, epilogue.relu, out, epilogue.gate_out)
        return out

    def grad_input(self, grad: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        out = place()
        operands = grad, self._weight_for(len(grad)), self._pattern, *self.geometry, self.layer.groups
        torch.ops.sparse_adv.masked_conv2d_grad_input_out(*operands, epilogue.residual, epilogue.gate, out)
        return out


class WinogradConvolution(Convolution, ABC):
    """A 3 x 3 convolution by Winograd's filtering, with 2.25 or 4 times fewer multiplications than the direct one."""

    _op: Callable[..., None]

    @abstractmethod
    def _transformed(self, transposed: bool) -> tuple[Tensor, ...]:
        """Return the operands that `_op` takes as the weight: of the forward pass, or transposed for the gradient."""

    def fold(self, norm: FoldedNorm | None) -> None:
        super().fold(norm)
        self._weights: list[tuple[Tensor, ...] | None] = [None, None]  # made when they are needed

    def _weight_for(self, transposed: bool) -> tuple[Tensor, ...]:
        weight = self._weights[transposed]
        if weight is None:
            weight = self._weights[transposed] = self._transformed(transposed)
        return weight

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        out, padding = place(), self.geometry[1]
        operands = x, *self._weight_for(False), padding, self.bias, epilogue.residual, epilogue.relu, None
        self._op(*operands, out, epilogue.gate_out)
        return out

    def grad_input(self, grad: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        out, (rows, cols) = place(), self.geometry[1]
        operands = grad, *self._weight_for(True), (2 - rows, 2 - cols), None, epilogue.residual, False, epilogue.gate
        self._op(*operands, out, None)
        return out


class DenseWinogradConvolution(WinogradConvolution):
    """A dense convolution, see `ops.winograd_conv2d_out`."""

    _op = torch.ops.sparse_adv.winograd_conv2d_out

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, kernels: DeviceKernels, tile: int) -> None:
        self.tile = tile
        super().__init__(layer, shape, kernels)

    def kernel(self, pass_: str) -> str:
        return "Winograd"

    def _transformed(self, transposed: bool) -> tuple[Tensor]:
        return (ops.winograd_conv2d_weight(self.weight, tile=self.tile, transposed=transposed),)


class MaskedWinogradConvolution(WinogradConvolution):
    """A masked convolution whose filters are pruned as wholes, see `ops.masked_winograd_conv2d_out`."""

    _op = torch.ops.sparse_adv.masked_winograd_conv2d_out
    layer: MaskedConv2d

    def __init__(self, layer: MaskedConv2d, shape: torch.Size, kernels: DeviceKernels) -> None:
        self._filters = [live_filters(layer.pattern, transposed) for transposed in (False, True)]
        super().__init__(layer, shape, kernels)

    def kernel(self, pass_: str) -> str:
        return "sparse Winograd"

    def masked(self, weight: Tensor) -> Tensor:
        return weight  # no pruned entry is read

    def _transformed(self, transposed: bool) -> LiveWeight:
        return transform_filters(self.weight, self.layer.weight_mask, self._filters[transposed], transposed)


def best_memory_format(convolutions: Iterable[tuple[nn.Conv2d, torch.Size]]) -> torch.memory_format:
    """NCHW if the layers for which sparse kernels are the fastest have most of the MACs; else channels_last.

    Args:
        convolutions: each with the shape of its input.
    """
    sparse = dense = 0
    for layer, shape in convolutions:
        work = layer.weight.numel() * shape[0] * shape[2] * shape[3] // math.prod(_pair(layer.stride))
        if isinstance(layer, MaskedConv2d) and (takes_live_filters(layer, shape) or sparse_is_faster(layer, shape)):
            sparse += work
        else:
            dense += work
    return torch.contiguous_format if sparse > dense else torch.channels_last


def _as_images(tensor: Tensor) -> Tensor:
    """A view [N, C, H, W] of any activation."""
    return tensor if tensor.dim() == 4 else tensor.reshape(*tensor.shape[:2], -1, 1)
