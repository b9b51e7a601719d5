"""The epilogue of a kernel: what is done to its result before it is written."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
    bit for each element, or a tensor like the result, the ReLU's output itself: the gradient passes where it is
    positive."""

    @property
    def is_empty(self) -> bool:
        """Whether the result is written unchanged."""
        return not self.relu and all(operand is None for operand in self[:3]) and self.gate is None
