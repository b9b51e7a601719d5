"""Convolutions for tests: every size, layout and block that `masked_conv2d` supports.

Tensors hold small integers. Every sum of their products is then exact in float32, in whatever order it is formed, and
results are compared bit for bit with the float64 reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from hypothesis import strategies as st
from torch import Tensor

from helpers.tolerances import assert_equal
from sparse_adv.ops import Pattern, compile_pattern, reference, set_kernels
from sparse_adv.ops.masked_conv2d_mask import expand_blocks

FILTERS = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 2), (4, 3))
# R and S stand for the whole filter.
ONE_TAP_BLOCKS = ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 4), (8, 8), (3, 2), (32, 32), (64, 64))
BLOCKS = (*ONE_TAP_BLOCKS, (1, 1, "R", "S"), (1, 1, 1, "S"), (4, 4, "R", "S"), (2, 1, 2, 2))
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "sliced": lambda x: torch.nn.functional.pad(x, (1, 2), value=torch.nan)[..., 1 : x.shape[3] + 1],
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 2).flatten(1, 2)[:, ::2],
}


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def block_mask(shape: tuple[int, ...], block: tuple[int, ...], density: float, seed: int = 0) -> Tensor:
    """A random mask that obeys the block; edge blocks are smaller."""
    block = (*block, 1, 1)[:4]
    counts = [-(-size // b) for size, b in zip(shape, block, strict=True)]
    mask = torch.rand(counts, generator=torch.Generator().manual_seed(seed)) < density
    return expand_blocks(mask, block, shape)


@dataclass(frozen=True)
class Case:
    """A convolution; its tensors are made when first used, always the same ones."""

    batch: int = 2
    groups: int = 1
    group_in: int = 5
    group_out: int = 6
    image: tuple[int, int] = (9, 11)
    filter: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    block: tuple[int, ...] = (1, 1)
    density: float = 0.3
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    seed: int = 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """The last four arguments of every op."""
        return self.stride, self.padding, self.dilation, self.groups

    def with_real_numbers(self) -> Self:
        """Replace the integers by normal numbers, whose sum depends on the order of summation."""
        generator = torch.Generator().manual_seed(self.seed)
        for name in ("input", "weight", "grad_output"):
            integers = getattr(self, name)
            vars(self)[name] = torch.empty_like(integers).copy_(torch.randn(integers.shape, generator=generator))
        return self

    def on(self, device: torch.device) -> Self:
        """The same tensors on another device, in the same layouts but without gaps."""
        for name in ("mask", "input", "weight", "grad_output"):
            vars(self)[name] = getattr(self, name).to(device)
        options = self.epilogue.items()
        vars(self)["epilogue"] = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options}
        return self

    @cached_property
    def mask(self) -> Tensor:
        return block_mask(self.weight_size, self.block, self.density, self.seed)

    @property
    def weight_size(self) -> tuple[int, ...]:
        return (self.groups * self.group_out, self.group_in, *self.filter)

    @property
    def input_size(self) -> tuple[int, ...]:
        return (self.batch, self.groups * self.group_in, *self.image)

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        images = torch.empty(self.input_size, device="meta"), torch.empty(self.weight_size, device="meta")
        return tuple(torch.nn.functional.conv2d(*images, None, *self.shape).shape)

    @cached_property
    def input(self) -> Tensor:
        return LAYOUTS[self.layout](integers(*self.input_size, seed=self.seed + 1))

    @cached_property
    def weight(self) -> Tensor:
        """Not 0 where pruned."""
        return LAYOUTS[self.weight_layout](integers(*self.weight_size, seed=self.seed + 2))

    @cached_property
    def grad_output(self) -> Tensor:
        return LAYOUTS[self.layout](integers(*self.output_size, seed=self.seed + 3))

    @cached_property
    def epilogue(self) -> dict[str, Any]:
        """A subset of scale, bias, residual and ReLU, given by the last four bits of the seed."""
        channels = self.output_size[1]
        options = {
            "scale": integers(2 * channels, seed=self.seed + 4)[::2],
            "bias": integers(channels, seed=self.seed + 5),
            "residual": LAYOUTS[self.weight_layout](integers(*self.output_size, seed=self.seed + 6)),
            "relu": True,
        }
        return {name: value for i, (name, value) in enumerate(options.items()) if self.seed >> i & 1}

    def pattern(self, kernel: str = "auto") -> Pattern:
        return set_kernels(compile_pattern(self.mask, self.block, self.groups), kernel, kernel, kernel)

    def expected(self) -> dict[str, Tensor]:
        """The passes in float64; forward with the epilogue."""
        input, weight, grad = self.input.double(), self.weight.double(), self.grad_output.double()
        epilogue = {k: v.double() if isinstance(v, Tensor) else v for k, v in self.epilogue.items()}
        bias = epilogue.pop("bias", None)
        return {
            "forward": reference.masked_conv2d(input, weight, self.mask, bias, *self.shape, **epilogue),
            "grad_input": reference.masked_conv2d_grad_input(grad, weight, self.mask, self.input_size, *self.shape),
            "grad_weight": reference.masked_conv2d_grad_weight(grad, input, self.mask, *self.shape),
        }

    def results(self, pattern: Pattern) -> dict[str, Tensor]:
        """The passes as the ops compute them."""
        ops, epilogue, tensors = torch.ops.sparse_adv, self.epilogue, pattern.flatten()
        rest = (epilogue.get("scale"), epilogue.get("residual"), epilogue.get("relu", False))
        return {
            "forward": ops.masked_conv2d(self.input, self.weight, tensors, epilogue.get("bias"), *self.shape, *rest),
            "grad_input": ops.masked_conv2d_grad_input(
                self.grad_output, self.weight, tensors, self.input_size, *self.shape
            ),
            "grad_weight": ops.masked_conv2d_grad_weight(self.grad_output, self.input, tensors, *self.shape),
        }


def assert_passes_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare results of the three passes bit for bit."""
    for name, value in expected.items():
        assert_equal(actual[name], value)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any small convolution whose output has a pixel."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    filter, stride, padding, dilation = draw(st.sampled_from(FILTERS)), pair(1, 3), pair(0, 3), pair(1, 2)
    least = [max(1, d * (f - 1) + 1 - 2 * p) for f, p, d in zip(filter, padding, dilation, strict=True)]
    named = {"R": filter[0], "S": filter[1]}
    return Case(
        batch=draw(st.sampled_from((1, 2, 5, 16, 17, 33))),
        groups=draw(st.sampled_from((1, 1, 2, 3))),
        group_in=draw(st.integers(1, 9)),
        group_out=draw(st.sampled_from((1, 2, 3, 4, 5, 8, 17))),
        image=(least[0] + draw(st.integers(0, 12)), least[1] + draw(st.integers(0, 20))),
        filter=filter,
        stride=stride,
        padding=padding,
        dilation=dilation,
        block=tuple(named.get(size, size) for size in draw(st.sampled_from(BLOCKS))),
        density=draw(st.sampled_from((0.0, 0.05, 0.3, 0.7, 1.0))),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        weight_layout=draw(st.sampled_from(sorted(LAYOUTS))),
        seed=draw(st.integers(0, 1000)),
    )
