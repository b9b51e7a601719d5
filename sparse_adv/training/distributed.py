"""The processes of a distributed run, and what they add up; a run of one process needs no group."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import nn


def rank() -> int:
    """The number of this process; 0 in a run of one."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched_rank() -> int:
    """The number that torchrun has given this process, before there is a group."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """The process group that `torchrun` has prepared for: gloo on the CPU, nccl on GPUs; none without torchrun.

    Raises:
        ConnectionError: in place of whatever the backend raises when another process is lost.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
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
