"""Versions, commit and machine, on which results and times depend; runs, tickets and benchmarks record them."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_adv.ops import build_facts, cpu_capability

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Software:
    """Versions of the software of a run."""

    sparse_adv: str
    torch: str
    python: str
    commit: str | None
    """See `commit`."""


@dataclass(frozen=True)
class Machine:
    """The hardware of a run."""

    cpu: str
    cores: int | None
    threads: int
    """Size of PyTorch's thread pool."""
    instruction_set: str
    """The instruction set that this library's CPU kernels use."""
    gpu: str | None


def software() -> Software:
    """Return the versions of this process.

    Examples:
        >>> software().torch == torch.__version__
        True
    """
    return Software(build_facts()["version"], str(torch.__version__), platform.python_version(), commit())


def machine() -> Machine:
    """Return the facts about this machine.

    Examples:
        >>> machine().threads == torch.get_num_threads()
        True
    """
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        instruction_set=cpu_capability(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def cpu_name() -> str:
    """Return name, family and model of the processor from /proc/cpuinfo; without that file, its architecture.

    Examples:
        >>> cpu_name() == machine().cpu
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in entries:
        return platform.machine()
    return f"{entries['model name']} (family {entries.get('cpu family')}, model {entries.get('model')})"


def commit() -> str | None:
    """Return the git commit of this code, with "-dirty" if files were changed since; None if it is not known.

    The environment variable COMMIT takes precedence over git: it names the commit of a copy without a repository. A
    repository around an installed package does not count.

    Examples:
        >>> commit() == software().commit
        True
    """
    if known := os.environ.get("COMMIT"):
        return known
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
