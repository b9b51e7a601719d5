"""What training does differently on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED_WORKSPACES = (":4096:8", ":16:8")


def reads_at_once(device: torch.device) -> bool:
    """Whether reading a number there is free; a GPU would have to finish first all that it was given."""
    return device.type != "cuda"


def wants_channels_last(device: torch.device, precision: str) -> bool:
    """Whether convolutions run on tensor cores, which take 16-bit images with their channels last."""
    return device.type == "cuda" and precision != "float32"


@contextmanager
def deterministic(wanted: bool = True) -> Iterator[None]:
    """Have PyTorch take deterministic algorithms only, if wanted: on a GPU, too, the same work gives the same bits.

    Begin it before the first product of matrices on the GPU, as cuBLAS reads its environment once. Under it an
    operation that has no deterministic algorithm raises RuntimeError; the networks of `sparse_adv.models` have none.

    Args:
        wanted: False changes nothing.

    Raises:
        ValueError: if CUBLAS_WORKSPACE_CONFIG is set to what is not deterministic.

    Examples:
        >>> with deterministic():
        ...     torch.are_deterministic_algorithms_enabled()
        True

    Source: PyTorch's notes on reproducibility, https://docs.pytorch.org/docs/stable/notes/randomness.html.
    """
    if not wanted:
        yield
        return
    workspace = os.environ.setdefault(_WORKSPACE, _FIXED_WORKSPACES[0])
    if workspace not in _FIXED_WORKSPACES:
        known = " or ".join(_FIXED_WORKSPACES)
        raise ValueError(f"{_WORKSPACE} must be {known} for deterministic algorithms, got {workspace!r}")
    cudnn: Any = torch.backends.cudnn
    memory: Any = torch.utils.deterministic
    before = cudnn.benchmark, memory.fill_uninitialized_memory
    enabled = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    # A search for the fastest algorithm finds another one in each run. Filling new memory costs a pass over each
    # tensor, and nothing here reads what nobody wrote.
    cudnn.benchmark = memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled[0], warn_only=enabled[1])
        cudnn.benchmark, memory.fill_uninitialized_memory = before
