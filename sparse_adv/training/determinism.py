"""Deterministic algorithms, with which a GPU also repeats a training bit for bit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")
_COMPILER = "TORCHINDUCTOR_DETERMINISTIC"


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """Limit PyTorch to deterministic algorithms until the block ends, so that a GPU also repeats results bit for bit.

    Enter it before the first matrix product on the GPU, because cuBLAS reads its environment only then. An operation
    without a deterministic algorithm raises RuntimeError; the networks of `sparse_adv.models` use no such operation.

    Args:
        enabled: False changes nothing.

    Returns:
        A context manager.

    Raises:
        ValueError: if CUBLAS_WORKSPACE_CONFIG is set to a value for which cuBLAS is not deterministic.

    Source: PyTorch's notes on reproducibility, https://docs.pytorch.org/docs/stable/notes/randomness.html.

    Examples:
        >>> with deterministic():
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not enabled:
        yield
        return
    workspace = os.environ.setdefault(_WORKSPACE, _DETERMINISTIC_WORKSPACES[0])
    if workspace not in _DETERMINISTIC_WORKSPACES:
        choices = " or ".join(_DETERMINISTIC_WORKSPACES)
        raise ValueError(f"{_WORKSPACE} must be {choices} for deterministic algorithms, got {workspace!r}")
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = cudnn.benchmark, memory.fill_uninitialized_memory
    mode, compiler = torch.get_deterministic_debug_mode(), os.environ.get(_COMPILER)
    os.environ[_COMPILER] = "1"
    _set_deterministic_mode(2)
    # cuDNN's search for the fastest algorithm can choose differently in each run. Filling new memory would cost a pass
    # over each tensor, and this library reads no uninitialised memory.
    cudnn.benchmark = memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        _set_deterministic_mode(mode)
        cudnn.benchmark, memory.fill_uninitialized_memory = before
        if compiler is None:
            os.environ.pop(_COMPILER, None)
        else:
            os.environ[_COMPILER] = compiler


def _set_deterministic_mode(mode: int) -> None:
    """Set the mode of PyTorch's ops (0 any algorithm, 1 warnings, 2 deterministic ones) and of torch.compile.

    `use_deterministic_algorithms` does both, but imports the compiler, which took 3 of the 14 s of a short run. A
    compiler that is imported later reads its mode from the environment.
    """
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(mode > 0, warn_only=mode == 1)
    else:
        torch.set_deterministic_debug_mode(mode)
