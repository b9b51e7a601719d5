"""Masked convolutions and their rivals, for the benchmarks of `masked_conv2d`.

Our forward is the public function `ops.masked_conv2d`, including its checks in Python. The gradients have no public
function: they are the ops that autograd calls, and the rival is the op that autograd calls for `torch.conv2d`. Weights
are packed, as in the passes of an attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from harness import Case
from timing import Side
from torch import Tensor

from sparse_adv import ops
from sparse_adv.ops import reference
from sparse_adv.ops.masked_conv2d_mask import expand_blocks

DENSE = {"dense": torch.contiguous_format, "dense_channels_last": torch.channels_last}
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Strides, paddings, dilations and groups."""


def dense(
    pass_: str, input: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry = ((1, 1), (1, 1), (1, 1), 1)
) -> Tensor:
    """PyTorch's convolution, "forward", or its "grad_input" or "grad_weight"."""
    if pass_ == "forward":
        return torch.conv2d(input, weight, None, *geometry)
    *lengths, groups = geometry
    needed = [pass_ == name for name in ("grad_input", "grad_weight")]
    gradients = torch.ops.aten.convolution_backward(
        grad, input, weight, None, *lengths, False, (0, 0), groups, [*needed, False]
    )
    return gradients[needed.index(True)]


class Layer(NamedTuple):
    """A convolution with padding filter // 2, and its input."""

    channels: int
    out_channels: int
    size: int
    """Pixels a side of the input."""
    batch: int
    filter: int = 3
    stride: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.out_channels, self.channels, self.filter, self.filter

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.channels, self.size, self.size


class MaskedConvolution:
    """The tensors of one masked convolution, and the timed calls on them.

    On the CPU float32: ours in NCHW, dense in NCHW and in channels_last. On a GPU bfloat16 in channels_last, all sides.
    """

    def __init__(
        self, layer: Layer, block: Sequence[int], density: float, device: str = "cpu", kernel: str = "sparse"
    ) -> None:
        """`kernel` is our kernel: "sparse", or "auto" for the library's choice."""
        torch.manual_seed(0)
        self.layer, self.device = layer, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.mask = random_mask(layer.weight_shape, block, density).to(device)
        self.geometry = ((layer.stride,) * 2, (layer.filter // 2,) * 2, (1, 1), 1)
        fan_in = layer.channels * layer.filter**2
        self.weight = self._random(layer.weight_shape) / fan_in**0.5 * self.mask
        self.input = self._random(layer.input_shape)
        self.grad = torch.randn_like(torch.conv2d(self.input, self.weight, None, *self.geometry))
        pattern = ops.compile_pattern(self.mask, block)
        self.pattern = ops.set_kernels(pattern, kernel, kernel, kernel)
        self.packed = ops.pack_pattern(self.pattern, self.weight)

    def case(self, pass_: str, labels: dict[str, str | int | float], rounds: int = 9) -> Case:
        """The case of "forward", "grad_input" or "grad_weight"; its label says which."""
        layouts = DENSE if self.device == "cpu" else {"dense": torch.channels_last}
        sides = {"ours": self._ours(pass_)}
        for side, layout in layouts.items():
            input, grad = (tensor.contiguous(memory_format=layout) for tensor in (self.input, self.grad))
            sides[side] = partial(dense, pass_, input, grad, self.weight, self.geometry)
        macs, moved = least_work(
            self.mask, self.layer.input_shape, self.layer.stride, self.layer.filter // 2, self.dtype.itemsize
        )
        labels = {"op": "masked_conv2d", "pass": pass_, **labels, "dtype": str(self.dtype).removeprefix("torch.")}
        return Case(labels, sides, tuple(layouts), macs, moved, rounds, capture=True)

    def forward(self, pattern: ops.Pattern) -> Tensor:
        """Ours, on packed or unpacked values."""
        strides, paddings, *_ = self.geometry
        return ops.masked_conv2d(self.input, self.weight, pattern, stride=strides, padding=paddings)

    def check(self) -> None:
        """Assert that our sides compute what the dense ones do; forward in float64, on two images."""
        coarse = self.dtype == torch.bfloat16
        rtol, atol = (2e-2, 2e-2) if coarse else (1e-4, 1e-4)
        close = partial(torch.testing.assert_close, rtol=rtol)
        two = self.input[:2].double()
        expected = reference.masked_conv2d(two, self.weight.double(), self.mask, None, *self.geometry)
        close(self.forward(self.packed)[:2].double(), expected, atol=atol)
        operands = self.input, self.grad, self.weight, self.geometry
        close(self._ours("grad_input")().float(), dense("grad_input", *operands).float(), atol=atol)
        products = (self.layer.batch * self.layer.size**2) ** 0.5  # the scale of a sum of this many random products
        masked = dense("grad_weight", *operands).float() * self.mask
        close(self._ours("grad_weight")().float(), masked, atol=atol * products)

    def _ours(self, pass_: str) -> Side:
        native = torch.ops.sparse_adv
        if pass_ == "forward":
            return partial(self.forward, self.packed)
        if pass_ == "grad_input":
            shape = self.layer.input_shape
            tensors = self.packed.flatten()
            return partial(native.masked_conv2d_grad_input, self.grad, self.weight, tensors, shape, *self.geometry)
        tensors = self.pattern.flatten()
        return partial(native.masked_conv2d_grad_weight, self.grad, self.input, tensors, *self.geometry)

    def _random(self, shape: Sequence[int]) -> Tensor:
        layout = torch.channels_last if self.device == "cuda" else torch.contiguous_format
        return torch.randn(shape, device=self.device, dtype=self.dtype).contiguous(memory_format=layout)


def random_mask(shape: Sequence[int], block: Sequence[int], density: float) -> Tensor:
    """A random bool mask of whole blocks, the same in each call; blocks at an edge are smaller.

    Args:
        shape: [K, C, R, S].
        block: (bo, bi) or (bo, bi, br, bs).
        density: the probability that a block is kept.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = (*block, 1, 1)[:4]
    counts = [-(-length // size) for length, size in zip(shape, sizes, strict=True)]
    return expand_blocks(torch.rand(counts, generator=generator) < density, sizes, shape)


def least_work(
    mask: Tensor, shape: Sequence[int], stride: int = 1, padding: int = 1, element_bytes: int = 4
) -> tuple[int, int]:
    """The least MACs and bytes of a masked convolution on input of `shape`, the same in each of its passes.

    Taps that fall on padding do not count. Input, output and the weights that the mask keeps, or their gradients, move
    once.
    """
    ones = torch.ones(1, *shape[1:])
    products = torch.conv2d(ones, mask.cpu().float(), None, stride, padding)
    moved = shape[0] * (ones.numel() + products.numel()) + int(mask.count_nonzero())
    return shape[0] * int(products.sum(dtype=torch.float64)), element_bytes * moved
