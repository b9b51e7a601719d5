"""Plans the memory of an engine: results that are never needed at the same time share it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from sparse_adv.engine.kernels import DeviceKernels, Place
from sparse_adv.engine.steps import Step
from sparse_adv.engine.values import Value


@dataclass(eq=False)
class Buffer:
    """Memory for several results, one after the other; allocated when the first of them is computed."""

    elements: int
    memory: Tensor | None = None

    def tensor(self, shape: torch.Size, kernels: DeviceKernels, device: torch.device) -> Tensor:
        """A tensor of this shape in the buffer, in the memory format of the kernels."""
        if self.memory is None:
            self.memory = torch.empty(self.elements, dtype=kernels.dtype, device=device)
        return self.memory.as_strided(shape, kernels.empty(shape, torch.device("meta")).stride())


@dataclass(eq=False)
class _Lifetime:
    """From the step that computes a result to the last one that reads it; forward and backward steps are numbered."""

    value: Value
    begin: int
    end: int


def plan_memory(
    steps: Sequence[Step],
    input: Value,
    output: Value,
    gates: Collection[Value],
    kernels: DeviceKernels,
    device: torch.device,
) -> tuple[Mapping[Value, Place], Mapping[Value, Place]]:
    """Return where each value and each gradient is written, if the kernel can choose.

    Outputs of a ReLU that are not in `gates` are their own gates, and last as long.
    """
    forward = {step: moment for moment, step in enumerate(steps)}
    backward = {step: 2 * len(steps) - moment for step, moment in forward.items()}
    values: list[_Lifetime] = []
    gradients = {input: _Lifetime(input, len(steps), 2 * len(steps) + 1)}
    made = [(value, step) for step in steps for value in step.outputs]
    for value, step in made:
        reads = [forward[reader] for reader in value.readers]
        if value.kept or (value.rectified and value not in gates):
            reads.append(backward[step])
        if value is output:
            reads.append(len(steps))
        values.append(_Lifetime(value, forward[step], max(reads, default=forward[step])))
        first = min((backward[reader] for reader in value.readers), default=len(steps))
        gradients[value] = _Lifetime(value, first, backward[step])
    for step in steps:
        # The gradient of a sum is passed on as that of its residual without a copy, so it lives as long as that one.
        passed_on = max((gradients[value].end for value in step.passes_on()), default=0)
        for value in step.outputs:
            gradients[value].end = max(gradients[value].end, passed_on)
    places = partial(_places, kernels=kernels, device=device)
    buffers = _share([*values, *gradients.values()])
    return places(values, buffers), places(gradients.values(), buffers)


def _places(
    lifetimes: Iterable[_Lifetime], buffers: Mapping[_Lifetime, Buffer], kernels: DeviceKernels, device: torch.device
) -> Mapping[Value, Place]:
    return {
        # A view takes longer to make than the call of a kernel.
        lifetime.value: cache(partial(buffers[lifetime].tensor, lifetime.value.shape, kernels, device))
        for lifetime in lifetimes
    }


def gates(steps: Sequence[Step], kernels: DeviceKernels, device: torch.device) -> dict[Value, Tensor]:
    """Return memory for the gates of outputs of a ReLU, but for those that are their own gates."""
    rectified = {value: step for step in steps for value in step.outputs if value.rectified}
    made = {value: kernels.new_gate(step, value.shape, device) for value, step in rectified.items()}
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
