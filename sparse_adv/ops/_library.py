"""Loads the native op library and the host module; everything else in `ops` imports them from here."""

from __future__ import annotations

from pathlib import Path

import torch

_OPS_CPU = Path(__file__).parent.parent / "_ops_cpu.so"

try:
    from sparse_adv import _host as host
except ImportError as error:
    raise ImportError(
        f"sparse_adv's native part cannot be loaded ({error}); build it with "
        f"`pip install --no-build-isolation .` under this Python and torch {torch.__version__}"
    ) from error

try:
    torch.ops.load_library(_OPS_CPU)
except OSError as error:
    raise ImportError(
        f"{_OPS_CPU.name} cannot be loaded under torch {torch.__version__} ({error}); it needs torch 2.10 or newer"
    ) from error


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "portable".

    The environment variable `ATEN_CPU_CAPABILITY` (avx512, avx2, default), read at the first call, lowers it.
    """
    return host.cpu_capability()


def build_facts() -> dict[str, str]:
    """The version and the compiler of the native part."""
    return {"version": host.version, "compiler": host.compiler}
