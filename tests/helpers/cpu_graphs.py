"""A stand-in for CUDA graphs on the CPU.

It captures the ops that reach the dispatcher, with the tensors that they read and write, and replays them as a CUDA
graph does: no Python code of the attack runs, and every op reads and writes the same memory again.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from sparse_adv.attacks import Graphs, zero_gradients

aten = torch.ops.aten
SYNCHRONISING = (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero, aten.masked_select)


def refuse_synchronising_op(func, args) -> None:
    """Raise if this op would make the host wait for a GPU: for a value, or for the size of its result."""
    if func.overloadpacket is aten.index and any(index is not None and index.dtype == torch.bool for index in args[1]):
        raise RuntimeError("the host reads how many entries are true")
    # Integers are exempt: reading the header of a pattern is no synchronisation, it is on the host on CUDA too.
    if func.overloadpacket in SYNCHRONISING and args[0].dtype not in (torch.int32, torch.int64):
        raise RuntimeError("the host reads a value that is only captured")


class _RefuseSynchronisingOps(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_synchronising_op(func, args)
        return func(*args, **(kwargs or {}))


class _RefuseSynchronisingMethods(TorchFunctionMode):
    """Refuses the methods that call no op on a CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        reads_header = func is Tensor.tolist and args[0].dtype == torch.int64  # exempt, as above
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu) and not reads_header:
            raise RuntimeError(f"the host reads with {func.__name__}")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within this context, every operation that would make the host wait for a GPU raises."""
    as_on_a_gpu = mock.patch.object(zero_gradients, "reads_at_once", lambda device: False)
    with as_on_a_gpu, _RefuseSynchronisingOps(), _RefuseSynchronisingMethods():
        yield


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """The same on a machine with a GPU, where CUDA itself raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _Address:
    """A tensor of which a graph knows nothing but where it lies: that keeps no memory, and counts no version."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()
        self.dtype = tensor.dtype

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"a replay reads or writes memory that was freed: {self.dtype} {self.place[1]}")
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(storage, *self.place)


class CapturedOps(TorchDispatchMode):
    """Captures ops with their tensors. A CUDA capture computes nothing, so `undo` reverts what the ops computed.

    Tensors that are made in the capture are kept; of all others the addresses are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list = []
        self.written: dict[int, tuple[Tensor, Tensor]] = {}
        """By id: each tensor that an op wrote to, and a copy from before."""
        self.created: list[Tensor] = []
        self.constants: list[Tensor] = []
        """What `torch.tensor` made of numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_synchronising_op(func, args)
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name.startswith("running_"):
                for tensor in tensors(value):  # one, or a list of them
                    self.written.setdefault(id(tensor), (tensor, tensor.clone()))
        result = func(*args, **kwargs)
        inputs = [tensor.untyped_storage()._cdata for tensor in tensors([*args, *kwargs.values()])]
        self.created += [tensor for tensor in tensors(result) if tensor.untyped_storage()._cdata not in inputs]
        if func is aten.lift_fresh.default:
            self.constants += args
        self.ops.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, before in reversed(self.written.values()):  # of views of the same memory, the first has the oldest
            tensor.data.copy_(before)  # as on CUDA, where autograd sees no new version of the tensor
        self._spoil()
        own = {tensor.untyped_storage()._cdata for tensor in [*self.created, *self.constants]}

        def known(value: object) -> object:
            is_other = isinstance(value, Tensor) and value.untyped_storage()._cdata not in own
            return _Address(value) if is_other else value

        for number, (func, args, kwargs, result) in enumerate(self.ops):
            values, structure = tree_flatten((args, kwargs))
            self.ops[number] = func, [known(value) for value in values], structure, [*map(known, tensors(result))]
        self.written.clear()

    @torch.no_grad()
    def replay(self) -> None:
        self._spoil()
        for func, values, structure, results in self.ops:
            values = [value.tensor() if isinstance(value, _Address) else value for value in values]
            args, kwargs = tree_unflatten(values, structure)
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # no view, and no op in place
                    old.data.copy_(new)

    def _spoil(self) -> None:
        """Overwrite what was made in the capture: other graphs have the same memory between replays."""
        for tensor in self.created:
            tensor.data.fill_(math.nan if tensor.is_floating_point() else 0)


def tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [part for item in value for part in tensors(item)] if isinstance(value, (tuple, list)) else []


class CpuCapturer:
    """Takes the place of `ops.cuda_graph.Capturer`, which needs a GPU, and counts captures and replays."""

    device = "cpu"
    synchronises = False

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0

    @staticmethod
    def is_capturing():
        return False

    def run(self, call):
        return call()

    def warm_up(self, call):
        return call(), self.synchronises

    def capture(self, call):
        self.captures += 1
        captured, generator = CapturedOps(), torch.get_rng_state()
        try:
            with captured, _RefuseSynchronisingMethods():
                result = call()
        finally:
            captured.undo()
            torch.set_rng_state(generator)  # a capture draws nothing

        def replay():
            self.replays += 1
            captured.replay()
            return result

        return replay


class CpuGraphs(Graphs):
    """`attacks.Graphs` that captures on the CPU."""

    capturer = CpuCapturer

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of captures and of replays."""
        (capturer,) = self.cache.capturers.values()
        return capturer.captures, capturer.replays
