"""A process group, of two processes unless more are asked for, whose results the tests of a module share."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers.forked import CONTEXT

PROCESSES = 2
SECONDS = 300
"""Of all processes together; then they are killed."""


def results_by_rank(work: Callable[[int, Path], Any], folder: Path, count: int = PROCESSES) -> list[Any]:
    """Call work(rank, folder) in each process of a gloo group, with one thread each.

    Args:
        work: a function of a module; its result is a value that `torch.save` writes and `torch.load` reads.
        folder: a folder of their own, which all processes may write to.
        count: the number of processes.
    """
    start = CONTEXT.get_start_method()
    processes = mp.start_processes(_join_and_work, (work, folder, count), count, join=False, start_method=start)
    end = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, f"the processes did not finish in {SECONDS} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(count)]


def _join_and_work(rank: int, work: Callable[[int, Path], Any], folder: Path, count: int) -> None:
    torch.set_num_threads(1)
    store, timeout = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count, timeout=timeout)
    torch.save(work(rank, folder), folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
