"""Plans the memory of an engine: results that are never needed at the same time share it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from sparse_adv.engine.kernels import DeviceKernels, Place
from sparse_adv.engine.steps import Step
from sparse_adv.engine.values import PassMemory, Value

_META = torch.device("meta")


@dataclass(eq=False)
class Buffer:
    """Memory for several results, one after the other; allocated when the first of them is computed."""

    elements: int
    memory: Tensor | None = None

    def tensor(self, shape: torch.Size, kernels: DeviceKernels, device: torch.device) -> Tensor:
        """A tensor of this shape in the buffer, in the memory format of the kernels."""
        if self.memory is None:
            self.memory = torch.empty(self.elements, dtype=kernels.dtype, device=device)
        return self.memory.as_strided(shape, kernels.empty(shape, _META).stride())


@dataclass(eq=False)
class _Lifetime:
    """From the step that computes a result to the last one that reads it; forward and backward steps are numbered."""

    value: Value
    begin: int
    end: int


class Memory:
    """The memory of a program; results that are never needed at the same time share it.

    Args:
        steps, input, output: of the program.
        kernels, device: compute the results.
    """

    def __init__(
        self, steps: Sequence[Step], input: Value, output: Value, kernels: DeviceKernels, device: torch.device
    ) -> None:
        self._kernels, self._device = kernels, device
        self.gates = gates(steps, kernels, device if kernels.reuses_memory else _META)
        """Gates of ReLU outputs, for a whole batch. An output without an entry is its own gate and is kept until the
        backward pass needs it."""
        self._values, self._gradients = _lifetimes(steps, input, output, self.gates)
        self._buffers = _share([*self._values, *self._gradients])
        self._last: PassMemory | None = None

    def for_images(self, images: int, differentiable: bool) -> PassMemory:
        """The memory of a pass over a number of images, at most a whole batch."""
        if self._last is None or self._last.images != images:
            gates = {value: gate[: value.shape_for(images)[0]] for value, gate in self.gates.items()}
            self._last = PassMemory(
                images, gates, self._places(self._values, images), self._places(self._gradients, images)
            )
        if self._kernels.reuses_memory:
            return self._last
        planned = self._last.gates.items() if differentiable else ()
        return replace(
            self._last, gates={value: torch.empty_like(gate, device=self._device) for value, gate in planned}
        )

    def _places(self, lifetimes: Iterable[_Lifetime], images: int) -> Mapping[Value, Place]:
        return {
            # A view takes longer to make than the call of a kernel.
            lifetime.value: cache(partial(self._tensor, lifetime, images))
            for lifetime in lifetimes
        }

    def _tensor(self, lifetime: _Lifetime, images: int) -> Tensor:
        return self._buffers[lifetime].tensor(lifetime.value.shape_for(images), self._kernels, self._device)


def _lifetimes(
    steps: Sequence[Step], input: Value, output: Value, gates: Collection[Value]
) -> tuple[list[_Lifetime], list[_Lifetime]]:
    """Return when the values and their gradients are needed."""
    forward = {step: moment for moment, step in enumerate(steps)}
    backward = {step: 2 * len(steps) - moment for step, moment in forward.items()}
    values: list[_Lifetime] = []
    gradients = {input: _Lifetime(input, len(steps), 2 * len(steps) + 1)}
    readers: defaultdict[Value, list[Step]] = defaultdict(list)
    for step in steps:
        for value in step.inputs:
            readers[value].append(step)
    made = [(value, step) for step in steps for value in step.outputs]
    for value, step in made:
        reads = [forward[reader] for reader in readers[value]]
        if value.kept or (value.rectified and value not in gates):
            reads.append(backward[step])
        if value is output:
            reads.append(len(steps))
        values.append(_Lifetime(value, forward[step], max(reads, default=forward[step])))
        first = min((backward[reader] for reader in readers[value]), default=len(steps))
        gradients[value] = _Lifetime(value, first, backward[step])
    for step in steps:
        # The residual of a sum gets the sum's gradient itself, not a copy, so both must live equally long.
        passed_on = max((gradients[value].end for value in step.passes_on()), default=0)
        for value in step.outputs:
            gradients[value].end = max(gradients[value].end, passed_on)
    return values, list(gradients.values())


def gated(steps: Sequence[Step], kernels: DeviceKernels) -> Collection[Value]:
    """The outputs of a ReLU that get memory for a gate."""
    return gates(steps, kernels, _META).keys()


def gates(steps: Sequence[Step], kernels: DeviceKernels, device: torch.device) -> dict[Value, Tensor]:
    """Return memory for the gates of ReLU outputs, except those that are their own gates."""
    rectified = {value: step for step in steps for value in step.outputs if value.rectified}
    made = {
        value: kernels.new_gate(value.shape, device) for value, step in rectified.items() if step.writes_gate(kernels)
    }
    return {value: gate for value, gate in made.items() if gate is not None}


def read_last(steps: Sequence[Step], output: Value, gates: Collection[Value]) -> list[list[Value]]:
    """For each step the values that no later step reads, forward or backward."""
    last = {value: step for step in steps for value in step.inputs}
    needed = {value for value in last if value.kept or (value.rectified and value not in gates)} | {output}
    return [[value for value in {*step.inputs} - needed if last[value] is step] for step in steps]


def _share(lifetimes: Sequence[_Lifetime]) -> dict[_Lifetime, Buffer]:
    """Give each result the free buffer whose size is nearest to its own, or a new one."""
    result: dict[_Lifetime, Buffer] = {}
    busy: list[tuple[int, Buffer]] = []
    free: list[Buffer] = []
    for lifetime in sorted(lifetimes, key=lambda lifetime: lifetime.begin):
        free += [buffer for end, buffer in busy if end < lifetime.begin]
        busy = [(end, buffer) for end, buffer in busy if end >= lifetime.begin]
        elements = math.prod(lifetime.value.shape)
        buffer = min(free, key=lambda buffer: abs(buffer.elements - elements), default=None)
        if buffer is None:
            buffer = Buffer(elements)
        else:
            free.remove(buffer)
            buffer.elements = max(buffer.elements, elements)
        result[lifetime] = buffer
        busy.append((lifetime.end, buffer))
    return result
