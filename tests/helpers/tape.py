"""A stand-in for CUDA graphs that runs on the CPU.

It records the ops that reach the dispatcher, with the very tensors that they read and wrote, and plays them as a CUDA
graph does: no Python of the attack runs, every op reads and writes the same memory again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv.attacks import Graphs

aten = torch.ops.aten
READING = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select)


def refuse_reading(func, args) -> None:
    """Raises if the host would wait for a GPU to tell it a number, or how many there are."""
    if func.overloadpacket is aten.index and any(index is not None and index.dtype == torch.bool for index in args[1]):
        raise RuntimeError("the host reads how many are true")
    # Whole numbers are of a pattern's header, which lies on the host beside a GPU as well.
    if func.overloadpacket in READING and args[0].dtype not in (torch.int32, torch.int64):
        raise RuntimeError("the host reads what is only recorded")


class _NoReadingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_reading(func, args)
        return func(*args, **(kwargs or {}))


class _NoReadingMethods(TorchFunctionMode):
    """Those that on a CPU do without an op."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            raise RuntimeError(f"the host reads with {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reading() -> Iterator[None]:
    """While this lasts, whatever would make the host wait for a GPU fails."""
    with _NoReadingOps(), _NoReadingMethods():
        yield


class Tape(TorchDispatchMode):
    """Ops in order, with their tensors; as a GPU runs nothing that it records, what they did is undone afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list = []
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        self.own: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_reading(func, args)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if (writes or argument.name.startswith("running_")) and isinstance(value, Tensor):
                self.found.setdefault(id(value), (value, value.clone()))
        made = func(*args, **kwargs)
        given = [tensor.untyped_storage().data_ptr() for tensor in tensors([*args, *kwargs.values()])]
        self.own += [tensor for tensor in tensors(made) if tensor.untyped_storage().data_ptr() not in given]
        self.ops.append((func, args, kwargs, made))
        return made

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, before in self.found.values():
            tensor.copy_(before)
        for tensor in self.own:
            tensor.fill_(math.nan if tensor.is_floating_point() else 0)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, made in self.ops:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(made), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or an op in place
                    old.copy_(new)


def tensors(made: object) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    return [part for item in made for part in tensors(item)] if isinstance(made, (tuple, list)) else []


class CpuRecorder:
    """Stands in for `attacks.graph.Recorder`, which is what needs a GPU."""

    device = "cpu"
    waits = False

    def __init__(self, device: torch.device) -> None:
        self.recordings = self.replays = 0

    def run(self, work):
        return work()

    def rehearse(self, work):
        return work(), self.waits

    def record(self, work):
        self.recordings += 1
        tape = Tape()
        try:
            with tape, _NoReadingMethods():
                result = work()
        finally:
            tape.undo()

        def replay():
            self.replays += 1
            tape.play()
            return result

        return replay


class TapedGraphs(Graphs):
    recorder = CpuRecorder

    @property
    def counts(self) -> tuple[int, int]:
        """Recordings and replays."""
        (recorder,) = self._recorders.values()
        return recorder.recordings, recorder.replays
