"""Networks by name: each takes images in [0, 1] and normalises inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from sparse_adv.models.digits_cnn import INPUT_SHAPE as DIGITS_SHAPE
from sparse_adv.models.digits_cnn import digits_cnn


class Architecture(NamedTuple):
    """How to make a network, and the [C, H, W] of one image for it."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, int, int]


ARCHITECTURES = {"digits_cnn": Architecture(digits_cnn, DIGITS_SHAPE)}


def build(name: str, seed: int = 0) -> nn.Module:
    """A freshly initialised network; the same seed gives the same weights and leaves torch's random state alone.

    Raises:
        ValueError: if no network has that name.
    """
    architecture = find(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture.make()


def find(name: str) -> Architecture:
    """The architecture of that name; ValueError names those there are."""
    if name not in ARCHITECTURES:
        raise ValueError(f'no architecture is called "{name}"; there are: {", ".join(ARCHITECTURES)}')
    return ARCHITECTURES[name]
