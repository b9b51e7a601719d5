"""The values that steps of an engine exchange, and the tensors of these values in one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_adv.engine.kernels import DeviceKernels, Place
from sparse_adv.kernels.epilogue import Epilogue


@dataclass(eq=False)
class Value:
    """A tensor that one step makes and others read."""

    name: str
    shape: torch.Size
    """Of a whole batch."""
    dtype: torch.dtype
    shape_for: Callable[[int], torch.Size]
    """The shape for a number of images."""
    has_gradient: bool = True
    """Whether a gradient passes through it; not if it is computed from parameters alone."""
    rectified: bool = False
    """Whether it is the output of a ReLU."""
    kept: bool = False
    """Whether it must last until the backward pass of the steps that read it."""
    reads: int = 0
    """How often steps read it: a step may read it twice."""


@dataclass(frozen=True)
class PassMemory:
    """Memory for the results of a forward and a backward pass over a number of images."""

    images: int
    gates: Mapping[Value, Tensor]
    """Gates of ReLU outputs, except those that are their own gates."""
    places: Mapping[Value, Place]
    """Where each value is written, if the kernel can choose."""
    gradient_places: Mapping[Value, Place]
    """Where the gradient of each value is written, if the kernel can choose."""


class PassTensors:
    """The tensors of one forward pass, and of the backward pass that may follow.

    For the output of a ReLU the gradient of the ReLU's *input* is stored: the last step that contributes to it also
    applies the gate (the gradient is 0 where the ReLU's output was 0). So no extra pass over memory is needed to gate
    or add gradients.
    """

    images: int
    """The number of images."""
    differentiable: bool
    """Whether a backward pass may follow."""

    def __init__(self, kernels: DeviceKernels, memory: PassMemory, differentiable: bool) -> None:
        self.kernels, self.images, self.differentiable = kernels, memory.images, differentiable
        self._memory = memory
        self._gates = memory.gates if differentiable else {}
        self._values: dict[Value, Tensor] = {}
        self._gradients: dict[Value, Tensor] = {}
        self._unread: dict[Value, int] = {}
        """For each value the number of its reads that have not contributed to its gradient yet."""

    def __getitem__(self, value: Value) -> Tensor:
        return self._values[value]

    def __setitem__(self, value: Value, tensor: Tensor) -> None:
        self._values[value] = tensor

    def discard(self, value: Value) -> None:
        self._values.pop(value, None)

    def place(self, value: Value) -> Place:
        return self._memory.places[value]

    def gate(self, value: Value) -> Tensor | None:
        """The memory for the gate of a value; None if no gradient is wanted or the value is its own gate."""
        return self._gates.get(value)

    def start_gradient(self, value: Value, gradient: Tensor) -> None:
        """Begin the backward pass with the gradient of the model's output."""
        gate = self._gate_of(value) if value.rectified else None
        self._gradients[value] = gradient if gate is None else self.kernels.pointwise(gradient, Epilogue(gate=gate))

    def take_gradient(self, value: Value) -> Tensor | None:
        """The gradient of a value, for the step that made it; None if nothing contributed to it."""
        return self._gradients.pop(value, None)

    def contribute(self, value: Value, compute: Callable[[Epilogue, Place], Tensor | None]) -> None:
        """Add to the gradient of a value.

        Args:
            value: a value that the step reads.
            compute: returns the new gradient for an epilogue and the place of the result. The epilogue's residual is
                the sum of the earlier contributions, and its gate is to be applied; either may be None.
        """
        if not value.has_gradient:
            return
        self._unread[value] = unread = self._unread.get(value, value.reads) - 1
        gate = self._gate_of(value) if value.rectified and not unread else None
        epilogue = Epilogue(residual=self._gradients.pop(value, None), gate=gate)
        gradient = compute(epilogue, self._memory.gradient_places[value])
        if gradient is not None:
            self._gradients[value] = gradient

    def pass_on(self, value: Value, gradient: Tensor | None) -> None:
        """Add a gradient as it is, without a copy if it is the first; None adds nothing."""

        def compute(epilogue: Epilogue, place: Place) -> Tensor | None:
            terms = [self.kernels.plain(term) for term in (gradient, epilogue.residual) if term is not None]
            if not terms or (len(terms) == 1 and epilogue.gate is None):
                return terms[0] if terms else None
            first, *others = terms
            epilogue = epilogue._replace(residual=others[0] if others else None)
            return self.kernels.pointwise(first, epilogue, place)

        self.contribute(value, compute)

    def _gate_of(self, value: Value) -> Tensor:
        gate = self._gates.get(value)
        return self._values[value] if gate is None else gate
