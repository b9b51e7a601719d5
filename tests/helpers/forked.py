"""Processes that are forked from one that has imported everything, so that a start takes 0.1 s and not 5 to 10 s.

Each has the environment of the first call, one thread, and memory of its own.
"""

import multiprocessing
import os
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TextIO

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sparse_adv.__main__", "torch._dynamo", "torch.distributed", "sklearn.datasets"])


def start_command(*arguments: str) -> tuple[BaseProcess, TextIO]:
    """Start `sparse-adv` with these arguments; also return its standard output, for reading."""
    reading, writing = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run_command, args=(arguments, writing))
    process.start()
    writing.close()
    return process, os.fdopen(os.dup(reading.fileno()))


def run_command(*arguments: str) -> list[str]:
    """Run `sparse-adv` with these arguments to its end, which must be a success; return the lines that it printed."""
    process, output = start_command(*arguments)
    with output:
        lines = output.read().splitlines()
    process.join()
    assert process.exitcode == 0, lines
    return lines


def _run_command(arguments: tuple[str, ...], output: Connection) -> None:
    from sparse_adv.__main__ import main

    torch.set_num_threads(1)
    sys.stdout = open(output.fileno(), "w", encoding="utf-8")  # noqa: SIM115
    sys.exit(main(arguments))
