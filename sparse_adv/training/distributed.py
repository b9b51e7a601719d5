"""The processes of a distributed run, their devices, and what they add up; a run of one process needs no group."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process; 0 in a run of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """The number that torchrun has given this process, before there is a group."""
    return _launched("RANK", 0)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(device: torch.device | str = "auto") -> Iterator[torch.device]:
    """The process group that `torchrun` has prepared for, and the device of this process; no group without torchrun.

    Args:
        device: "cpu"; "cuda", a GPU of its own for each process; a GPU such as "cuda:0", for all processes of a machine
            together; or "auto", which is "cuda" where there is a GPU and "cpu" elsewhere.

    Returns:
        A context that gives this process's device. The processes talk over nccl where each has a GPU of its own, and
        else over gloo, because nccl refuses two processes on one GPU.

    Raises:
        ValueError: if there is no such device, or "cuda" finds fewer GPUs than processes.
        ConnectionError: in place of whatever the backend raises when another process is lost.
    """
    own, backend = _placed(str(device))
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield own
        return
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
    """The device of this process, and over which backend the run's processes talk."""
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
        raise ValueError(f"device {name!r} is not there: this torch sees no CUDA GPU")
    gpus = torch.cuda.device_count()
    there = f"{gpus} GPU{'s' if gpus > 1 else ''}"
    if device.index is not None:
        if device.index >= gpus:
            raise ValueError(f"device {name!r} is not there: this torch sees {there}, numbered from 0")
        # On every machine the same answer, or the processes would wait for each other with unlike backends.
        shared = _launched("WORLD_SIZE", 1) > _launched("GROUP_WORLD_SIZE", 1)
        return device, "gloo" if shared else "nccl"
    processes = _launched("LOCAL_WORLD_SIZE", 1)
    if processes > gpus:
        raise ValueError(
            f"device {name!r} gives each process a GPU of its own, got {processes} processes and {there}: start at "
            f"most {gpus} (--nproc-per-node {gpus}), take device cpu, or name a GPU that all share, such as cuda:0"
        )
    return torch.device("cuda", _launched("LOCAL_RANK", 0)), "nccl"


def _launched(name: str, otherwise: int) -> int:
    """A number that torchrun has given this process."""
    return int(os.environ.get(name, otherwise))


def _free_frames(error: BaseException) -> None:
    """Let go of the DistributedDataParallel model that the frames of an error hold.

    Freed after its group, it would wait for the group's threads with Python's lock held, which they may be waiting for:
    seen as a process that never ends.
    """
    traceback.clear_frames(error.__traceback__)


def all_reduce_sum(values: list[float], device: torch.device) -> list[float]:
    """The sum over all processes of each number."""
    if world_size() == 1:
        return values
    summed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def collect(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of all processes by rank, on the CPU."""
    own = {name: tensor.cpu() for name, tensor in state.items()}
    if world_size() == 1:
        return [own]
    found: list[dict[str, Tensor]] = [{} for _ in range(world_size())]
    dist.all_gather_object(found, own)
    return found


def average_buffers(model: nn.Module) -> None:
    """Give all processes the mean of their floating buffers: BatchNorm's statistics, each of its own images."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if world_size() == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().flatten().float() for buffer in buffers])
    dist.all_reduce(flat)
    parts = (flat / world_size()).split([buffer.numel() for buffer in buffers])
    with torch.no_grad():
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def own_seed(*numbers: int) -> int:
    """A seed that follows from these numbers and this process's, and from nothing else."""
    return int(np.random.SeedSequence([*numbers, rank()]).generate_state(1, np.uint64)[0] >> np.uint64(1))
