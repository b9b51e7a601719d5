"""Processes that are forked from one that has imported everything, so that a start takes 0.1 s and not 5 to 10 s.

Each has the environment of the first call, one thread, and memory of its own.
"""

import multiprocessing
import os
import socket
import sys
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["sparse_adv.__main__", "torch._dynamo", "torch.distributed", "sklearn.datasets"])


def start_command(*arguments: str, environment: dict[str, str] | None = None) -> tuple[BaseProcess, TextIO]:
    """Start `sparse-adv` with these arguments; also return its standard output, for reading.

    With variables of the environment, its standard error is that output, too.
    """
    reading, writing = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run_command, args=(arguments, writing, environment))
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


def run_command_by_rank(folder: Path, *arguments: str) -> list[tuple[int | None, list[str]]]:
    """Run `sparse-adv` in two processes with the environment that torchrun gives; return exit code and lines of each.

    The folder is for the files by which the processes know what errors were printed.
    """
    with socket.create_server(("localhost", 0)) as server:
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1]), "GROUP_WORLD_SIZE": "1"}
    group |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    own = [{"RANK": r, "LOCAL_RANK": r, "TORCHELASTIC_ERROR_FILE": str(folder / r / "error.json")} for r in "01"]
    started = [start_command(*arguments, environment=group | variables) for variables in own]
    ends = []
    for process, output in started:
        with output:
            lines = output.read().splitlines()
        process.join()
        ends.append((process.exitcode, lines))
    return ends


def _run_command(arguments: tuple[str, ...], output: Connection, environment: dict[str, str] | None) -> None:
    from sparse_adv.__main__ import main

    torch.set_num_threads(1)
    sys.stdout = open(output.fileno(), "w", encoding="utf-8")  # noqa: SIM115
    if environment is not None:
        os.environ |= environment
        sys.stderr = sys.stdout
    sys.exit(main(arguments))
