"""Compares what the engine made of a model with the model itself: copies of both in float64, on a few images.

This finds what a trace does not show: random numbers, and images whose results depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_adv.engine.model_state import detached_copy
from sparse_adv.engine.random_state import KeptGenerators
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.errors import first_line
from sparse_adv.ops.cudnn_benchmark import cudnn_benchmark


class Undecided(Exception):
    """A comparison that says nothing about a model: another one may have another result."""


@contextmanager
def comparing(device: torch.device) -> Iterator[KeptGenerators]:
    """A context for a comparison: without autocast, and with the random generators restored at the end.

    In training, cuDNN times its algorithms for each new shape. The shapes of a comparison never come again, so cuDNN
    does not do that here.

    Raises:
        NotTraceable: for every error except torch.OutOfMemoryError and Undecided, because the model's own code may
            raise any error.
    """
    with KeptGenerators(device) as generators, torch.autocast(device.type, enabled=False), cudnn_benchmark(False):
        try:
            yield generators
        except (NotTraceable, Undecided, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotTraceable(f"it cannot be compared in float64: {first_line(error)}") from error


@torch.no_grad()
def double_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model in float64, its parameters moved a little at random, the same for each copy.

    The present weights may make a ReLU's input exactly 0: new BatchNorm biases do so behind a layer whose mask keeps
    nothing. Rounding then decides whether the ReLU lets a gradient through, which says nothing about a model.
    """
    copied = detached_copy(model).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        noise = _drawn(torch.randn, parameter, generator)
        parameter.add_(0.01 * noise * torch.where(parameter == 0, 0.1, parameter))  # others keep their signs
    return copied


def without_ties(x: Tensor) -> Tensor:
    """Images in float64, moved by 1 % towards random ones between their bounds.

    In an area of one colour, such as the padding of a crop, several pixels of a max-pool's window are the largest.
    Rounding then decides which of them gets the gradient, which says nothing about a model.
    """
    x = x.double()
    low, high = x.min().clamp_max(0), x.max().clamp_min(1)
    noise = _drawn(torch.rand, x, torch.Generator().manual_seed(0))
    return x.lerp(low + (high - low) * noise, 0.01)


def quadratic_loss(logits: Tensor) -> Tensor:
    """sum(w * logits + logits^2 / 2) with fixed random w; its gradient depends on the logits, so wrong ones show."""
    weights = _drawn(torch.randn, logits, torch.Generator().manual_seed(0)).to(logits)
    return (logits * weights + logits.square() / 2).sum()


def _drawn(draw: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in float64, drawn on the CPU: the same on all devices."""
    return draw(like.shape, generator=generator, dtype=torch.float64, device="cpu").to(like.device)


def check_finite(results: Iterable[Tensor]) -> None:
    """Raise Undecided if PyTorch's results are not finite, for example because an image or a weight is not."""
    if not all(bool(result.isfinite().all()) for result in results):
        raise Undecided("its results are not finite")
