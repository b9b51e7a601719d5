"""The processes of a distributed run: their devices, their process group, and reductions over all of them."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparse_adv.training.random_numbers import Stream, seed_of

T = TypeVar("T")


def rank() -> int:
    """Return the rank of this process; 0 in a run of one process.

    Examples:
        >>> rank()
        0
    """
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """Return the rank that torchrun gave this process in its environment; needs no process group."""
    return _launched("RANK", 0)


def launched_processes() -> int:
    """Return the number of processes that torchrun has started; 1 without torchrun. It needs no process group."""
    return _launched("WORLD_SIZE", 1)


def world_size() -> int:
    """Return the number of processes that train together.

    Examples:
        >>> world_size()
        1
    """
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(device: torch.device | str = "auto") -> Iterator[torch.device]:
    """Choose the device of this process, and under `torchrun` create the process group; both last until the block ends.

    Args:
        device: "cpu"; "cuda", which gives each process its own GPU; one GPU such as "cuda:0", which all processes of a
            machine share; or "auto", which is "cuda" if there is a GPU, else "cpu".

    Returns:
        A context manager that yields the device. The backend is nccl if each process has its own GPU, else gloo,
        because nccl refuses two processes on one GPU.

    Raises:
        ValueError: if there is no such device, or there are fewer GPUs than processes that need their own.
        ConnectionError: when another process is lost, whatever error the backend raises then.

    Examples:
        >>> with group("cpu") as device:
        ...     device
        device(type='cpu')
    """
    own, backend = _placed(str(device))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if not os.environ.get("WORLD_SIZE") or dist.is_initialized():
        yield own
        return
    for name in ("RANK", "WORLD_SIZE"):
        _launched(name, 0)  # raises for text; PyTorch's own error names neither variable nor value
    dist.init_process_group(backend)
    try:
        yield own
    except RuntimeError as error:
        _free_frames(error)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ConnectionError(f"rank {rank()} lost another process of the run") from error
        raise
    except BaseException as error:
        _free_frames(error)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()


def _placed(name: str) -> tuple[torch.device, str]:
    """The device of this process, and the backend of the process group."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or a GPU such as cuda:0, got {name!r}")
    if device.type == "cpu":
        return device, "gloo"
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: this torch has no CUDA GPU")
    gpus = torch.cuda.device_count()
    there = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    if device.index is not None:
        if device.index >= gpus:
            raise ValueError(f"device {name!r} is not available: this torch has {there}, numbered from 0")
        # The choice is the same on all machines: processes with different backends would wait for each other for ever.
        shared = launched_processes() > _launched("GROUP_WORLD_SIZE", 1)
        return device, "gloo" if shared else "nccl"
    processes = _launched("LOCAL_WORLD_SIZE", 1)
    if processes > gpus:
        raise ValueError(
            f"device {name!r} gives each process a GPU of its own, got {processes} processes and {there}: start at "
            f"most {gpus} (--nproc-per-node {gpus}), take device cpu, or name a GPU that all share, such as cuda:0"
        )
    return torch.device("cuda", _launched("LOCAL_RANK", 0)), "nccl"


def _launched(name: str, otherwise: int) -> int:
    """A number from the environment that torchrun gave this process."""
    value = os.environ.get(name) or str(otherwise)
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, as torchrun sets it, got {value!r}")
    return int(value)


def _free_frames(error: BaseException) -> None:
    """Release the DistributedDataParallel model that the stack frames of an error refer to.

    If the model is freed after its process group, it waits for the threads of the group while it holds Python's lock.
    These threads may be waiting for that lock, so the process would never end.
    """
    traceback.clear_frames(error.__traceback__)


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """Return each number's sum over all processes."""
    if world_size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def collect(own: T) -> list[T]:
    """Return the objects of all processes, ordered by rank; their tensors must be on the CPU."""
    if world_size() == 1:
        return [own]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, own)
    return gathered


def check_same(**settings: object) -> None:
    """Raise ValueError in all processes if they were not given the same.

    Args:
        settings: plain values, by their names for the error.
    """
    of_ranks = collect(settings)
    for name in settings:
        given = [own[name] for own in of_ranks]
        if any(value != given[0] for value in given):
            raise ValueError(f"{name} must be the same in all processes, got {', '.join(map(repr, given))} by rank")


def average_buffers(model: nn.Module) -> None:
    """Replace floating buffers by their mean over all processes: each has BatchNorm statistics of its own images."""
    average_each([buffer for buffer in model.buffers() if buffer.is_floating_point()])


def average_each(tensors: Sequence[Tensor]) -> None:
    """Replace floating tensors of one device by their means over all processes; 16-bit tensors are added in float32."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(torch.promote_types(tensor.dtype, torch.float32), []).append(tensor)
    for dtype, group in by_dtype.items():
        flat = torch.cat([tensor.detach().flatten().to(dtype) for tensor in group])
        dist.all_reduce(flat)
        _unflatten(flat / world_size(), group)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Replace tensors of one device and dtype by those of rank 0."""
    if world_size() > 1 and tensors:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.broadcast(flat, 0)
        _unflatten(flat, tensors)


def _unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def barrier() -> None:
    """Wait until all processes have called this function."""
    if world_size() > 1:
        dist.barrier()


def own_seed(seed: int, stream: Stream, *numbers: int) -> int:
    """Return `seed_of` these numbers and the rank.

    Examples:
        >>> own_seed(0, Stream.ATTACKS, 1) == own_seed(0, Stream.ATTACKS, 2)
        False
    """
    return seed_of(seed, stream, *numbers, rank())
