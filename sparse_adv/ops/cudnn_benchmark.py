"""cuDNN's search for the fastest algorithm of each convolution, `torch.backends.cudnn.benchmark`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def cudnn_benchmark(enabled: bool) -> Iterator[None]:
    """Turn the search on or off until the block ends.

    Examples:
        >>> with cudnn_benchmark(True):
        ...     torch.backends.cudnn.benchmark
        True
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    cudnn.benchmark = enabled
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextmanager
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN time its algorithms for each new shape, and take the fastest, until the block ends.

    Nothing changes on a CPU or if deterministic algorithms are requested, because the choice can differ from run to
    run.

    Args:
        device: the device on which the convolutions run.

    Returns:
        A context manager.

    Examples:
        >>> with fastest_convolutions(torch.device("cuda")):
        ...     torch.backends.cudnn.benchmark
        True
    """
    cudnn: Any = torch.backends.cudnn
    is_deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    with cudnn_benchmark(cudnn.benchmark or (device.type == "cuda" and not is_deterministic)):
        yield
