"""What the kernel of `masked_conv2d` and its input gradient takes beside images and geometry."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Lists(NamedTuple):
    """The live blocks, and which of them each tile of channels reads; `ops.masked_conv2d_live_blocks` makes them."""

    values: Tensor
    """[n, bo, bi]: the weights of the blocks."""
    blocks: Tensor
    """int32 [n, 4]: (first output channel, first input channel, filter row, filter column)."""
    rows: Tensor
    """int32 [tiles, 3], or [phases, tiles, 3]: (first channel, start, end)."""
    order: Tensor | None
    """int32 [n], or [phases, n]: indices into `blocks` that `rows` counts; None: `rows` counts `blocks` itself."""


class Epilogue(NamedTuple):
    """What is done to a result y before it is written: act(scale[c] * y + bias[c] + residual), act a ReLU or a gate."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    gate_out: Tensor | None = None
    """Memory for the gate of the ReLU."""
    gate: Tensor | None = None
    """The gate of a ReLU, in the backward pass: the result is 0 where that ReLU's output was 0. Either bytes, with a
    bit for each element, or a tensor like the result, which passes where it is positive: that output itself."""

    @property
    def is_empty(self) -> bool:
        """Whether the result is written as it is."""
        return not self.relu and all(operand is None for operand in self[:3]) and self.gate is None
