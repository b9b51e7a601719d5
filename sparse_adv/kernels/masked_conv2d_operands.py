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
    """What is done to a result: act(result * scale + bias + residual), where act is a ReLU or a gate or nothing."""

    scale: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    gate: Tensor | None = None
    """As the output: the result becomes 0 where this is not positive. Or bytes: it becomes 0 where its bit is 0."""
    gate_out: Tensor | None = None
    """Receives the gate of the ReLU in bits."""
