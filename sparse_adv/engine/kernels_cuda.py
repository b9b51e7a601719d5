"""The arithmetic of the steps on CUDA: the block kernels of this library, cuDNN with fused bias, residual and ReLU.

The block kernels and `pointwise` write a gate of one bit for each element of a ReLU's output. cuDNN does not: there the
output is its own gate, and is kept until the backward pass.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from sparse_adv import ops
from sparse_adv.engine.folding import FoldedNorm
from sparse_adv.engine.kernels import Convolution, DeviceKernels, Place
from sparse_adv.errors import first_line
from sparse_adv.kernels import masked_conv2d as block_kernels
from sparse_adv.kernels import max_pool2d
from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.kernels.layout import output_size
from sparse_adv.kernels.masked_conv2d_pack import pack
from sparse_adv.kernels.masked_conv2d_phases import select_phases
from sparse_adv.kernels.pointwise import pointwise
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops.conv_geometry import geometry_of
from sparse_adv.ops.cuda_graph import Capturer
from sparse_adv.ops.masked_conv2d_cuda import precision, runs_blocks
from sparse_adv.ops.masked_conv2d_pattern import BlockPattern

log = logging.getLogger(__name__)


class CudaKernels(DeviceKernels):
    """Kernels for images in channels_last. Memory comes from PyTorch's allocator, which reuses its blocks."""

    reuses_memory = False
    capturer = Capturer

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype, torch.channels_last)
        self._zeros: dict[torch.Size, Tensor] = {}

    def zeros(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Zeros that all convolutions of this output read. The first pass of a program is never part of a graph."""
        if shape not in self._zeros:
            self._zeros[shape] = self.empty(shape, device).zero_()
        return self._zeros[shape]

    def new_gate(self, shape: torch.Size, device: torch.device) -> Tensor | None:
        one_pixel = math.prod(shape[2:]) == 1  # channels_last cannot be told from NCHW
        if len(shape) != 4 or shape[1] % 8 or one_pixel:
            return None
        return ops.empty_gate(self.empty(shape, device))

    def writes_gate_of(self, layer: nn.Conv2d, shape: torch.Size) -> bool:
        pattern = _block_pattern(layer)
        return pattern is not None and runs_blocks(pattern, "forward", shape, self.dtype, *geometry_of(layer))

    def convolution(self, layer: nn.Conv2d, shape: torch.Size) -> Convolution:
        pattern = _block_pattern(layer)
        if pattern is not None:
            return BlockConvolution(layer, shape, self, pattern)
        return CudnnConvolution(layer, shape, self)

    def max_pool(self, x: Tensor, size: tuple[int, int], index: Tensor | None, place: Place) -> tuple[Tensor, Tensor]:
        pooled = torch.Size((*x.shape[:2], x.shape[2] // size[0], x.shape[3] // size[1]))
        out = self.empty(pooled, x.device)
        index = torch.empty_like(out, dtype=torch.uint8)
        max_pool2d.forward(x, size, out, index)
        return out, index

    def max_pool_grad(
        self, grad: Tensor, index: Tensor, size: tuple[int, int], shape: torch.Size, epilogue: Epilogue, place: Place
    ) -> Tensor:
        out = self.empty(shape, grad.device)
        max_pool2d.backward(grad, index, size, epilogue.residual, epilogue.gate, out)
        return out

    def pointwise(self, x: Tensor, epilogue: Epilogue, place: Place | None = None) -> Tensor:
        scale, bias, residual, relu, gate_out, gate = epilogue
        return pointwise(x, scale, bias, residual, relu, gate, gate_out)


def _block_pattern(layer: nn.Conv2d) -> BlockPattern | None:
    pattern = layer.pattern if isinstance(layer, MaskedConv2d) else None
    return pattern if isinstance(pattern, BlockPattern) else None


class CudnnConvolution(Convolution):
    """A convolution by cuDNN, which fuses bias, residual and ReLU forward, and nothing backward."""

    kernels: CudaKernels
    _fuses = True

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        fused = self._fuses and epilogue.relu and epilogue.gate_out is None and x.dtype != torch.float64
        if fused and not _must_be_deterministic() and (result := self._fused(x, epilogue.residual)) is not None:
            return result
        # The epilogue in one pass; PyTorch would add the bias in a pass of its own.
        y = self.kernels.plain(torch.conv2d(x, self.weight, None, *self.geometry, self.layer.groups))
        return self.kernels.finish(y, epilogue._replace(bias=self.bias))

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """relu(conv(x) + bias + residual) in one call of cuDNN; always None once cuDNN has refused such a call.

        Without a residual, zeros are given as one. `cudnn_convolution_relu` adds 0 times its output's unwritten memory:
        if that holds a NaN, the sum is NaN, and the ReLU makes it 0.
        """
        if residual is None:
            pixels = output_size(x.shape[2:], self.weight.shape[2:], *self.geometry)
            residual = self.kernels.zeros(torch.Size((len(x), len(self.weight), *pixels)), x.device)
        try:
            return torch.ops.aten.cudnn_convolution_add_relu(
                x, self.weight, residual, 1.0, self.bias, *self.geometry, self.layer.groups
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # for example for some grouped layers and some odd numbers of channels
            if self.kernels.capturer.is_capturing():
                raise
            log.info("cuDNN computes %s and its ReLU in two calls: %s", self.layer, first_line(error))
            self._fuses = False
            return None


def _must_be_deterministic() -> bool:
    """Whether results must be reproducible. Those of the fused call are not: it may use any of cuDNN's algorithms."""
    return torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()


class BlockConvolution(CudnnConvolution):
    """A convolution that computes the live blocks in each pass where that is faster than cuDNN on the masked weight.

    Args:
        pattern: of the layer.
    """

    def __init__(self, layer: nn.Conv2d, shape: torch.Size, kernels: CudaKernels, pattern: BlockPattern) -> None:
        super().__init__(layer, shape, kernels)
        self._pattern = pattern
        planned = shape, kernels.dtype, *self.geometry
        self._sparse = {pass_: runs_blocks(pattern, pass_, *planned) for pass_ in ("forward", "grad_input")}

    def kernel(self, pass_: str) -> str:
        return "sparse" if self._sparse[pass_] else super().kernel(pass_)

    def fold(self, norm: FoldedNorm | None) -> None:
        super().fold(norm)
        pattern = self._pattern
        if any(self._sparse.values()):
            block, scale = pattern.block[:2], None if norm is None else norm.scale
            weight = self.layer.weight.detach()
            self._values = pack(weight, pattern.blocks, block, pattern.groups, self.kernels.dtype, scale)
        if self._sparse["grad_input"]:
            # Selected once per attack: all its steps read these lists. The next attack selects its own lists, because
            # only replays of the same CUDA graph may read memory that the graph allocated.
            lists = pattern.blocks, pattern.grad_rows, pattern.grad_order
            self._grad_lists = select_phases(*lists, *self.geometry)

    def folded_weight(self, norm: FoldedNorm | None) -> Tensor:
        """The weight for cuDNN; if it computes no pass, only the shape is read."""
        return self.layer.weight.detach() if all(self._sparse.values()) else super().folded_weight(norm)

    def forward(self, x: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        if not self._sparse["forward"]:
            return super().forward(x, epilogue, place)
        lists = self._values, self._pattern.blocks, self._pattern.rows
        size, bias, residual, relu = self.weight.shape, self.bias, epilogue.residual, epilogue.relu
        operands = *lists, size, bias, *self.geometry, None, residual, relu, precision(), epilogue.gate_out
        return block_kernels.forward(x, *operands)

    def grad_input(self, grad: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        if not self._sparse["grad_input"]:
            return super().grad_input(grad, epilogue, place)
        lists = self._values, self._pattern.blocks, *self._grad_lists
        residual, gate = epilogue.residual, epilogue.gate
        return block_kernels.grad_input(grad, *lists, self.shape, *self.geometry, residual, gate, precision())
