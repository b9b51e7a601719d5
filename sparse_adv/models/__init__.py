"""Networks by name: each takes images in [0, 1] and normalises inside."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from sparse_adv.models.digits_cnn import digits_cnn
from sparse_adv.models.normalize import Normalize
from sparse_adv.models.preact_resnet import preact_resnet18
from sparse_adv.models.resnet import resnet18
from sparse_adv.models.vgg import vgg16
from sparse_adv.models.wide_resnet import wide_resnet

__all__ = ["Architecture", "Normalize", "build", "find", "names"]


class Architecture(NamedTuple):
    """How to make a network from width, classes, input shape and data set, and what these are unless told."""

    make: Callable[[int, int, tuple[int, int, int], str], nn.Module]
    width: int = 64
    input_shape: tuple[int, int, int] = (3, 32, 32)
    data: str = "cifar10"


_ARCHITECTURES = {
    "vgg16": Architecture(vgg16),
    "resnet18": Architecture(resnet18),
    "preact_resnet18": Architecture(preact_resnet18),
    "digits_cnn": Architecture(digits_cnn, input_shape=(1, 8, 8), data="digits"),
}
_WIDE = re.compile(r"wrn-(0|[1-9][0-9]*)-(0|[1-9][0-9]*)")
_KNOWN_WIDE = ("wrn-28-10", "wrn-34-10")
"""What somebody may have meant who spells a wide network wrongly."""


def build(
    name: str,
    seed: int = 0,
    *,
    width: int | None = None,
    classes: int = 10,
    input_shape: Sequence[int] | None = None,
    data: str | None = None,
) -> nn.Module:
    """A freshly initialised network; the same seed gives the same weights and leaves torch's random state alone.

    Args:
        name: "vgg16", "resnet18", "preact_resnet18", "wrn-D-K" such as "wrn-34-10", or "digits_cnn".
        seed: of the weights.
        width: channels of the first stage, of wrn-D-K those of the stem, which K multiplies; None for the published
            number.
        classes: outputs.
        input_shape: [C, H, W] of one image; None for [3, 32, 32], of "digits_cnn" [1, 8, 8].
        data: the data set whose mean and deviation normalise the images: "cifar10", "cifar100", "mnist",
            "fashion_mnist" or "digits"; mean 0.5 and deviation 0.25 for any other name, or if the number of channels
            is another. None for "cifar10", of "digits_cnn" "digits".

    Returns:
        The network, in training mode, on torch's default device; the weights do not depend on that.

    Raises:
        ValueError: if no network has that name, width, number of classes or input shape.
    """
    architecture = find(name)
    width = architecture.width if width is None else width
    shape = architecture.input_shape if input_shape is None else tuple(input_shape)
    for argument, value in (("width", width), ("classes", classes)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{argument} must be a whole number, at least 1, got {value!r}")
    if len(shape) != 3 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"input_shape must be [C, H, W], each at least 1, got {list(shape)}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        model = architecture.make(width, classes, (shape[0], shape[1], shape[2]), data or architecture.data)
    return model.to(torch.get_default_device())


def find(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        ValueError: if there is none; it names those there are, and the nearest.
    """
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    if wide := _WIDE.fullmatch(name):
        return Architecture(partial(wide_resnet, int(wide[1]), int(wide[2])), width=16)
    near = get_close_matches(name.lower(), (*_ARCHITECTURES, *_KNOWN_WIDE), n=1)
    meant = f' (did you mean "{near[0]}"?)' if near else ""
    raise ValueError(f'no architecture is called "{name}"{meant}; there are: {", ".join(names())}')


def names() -> tuple[str, ...]:
    """What networks are called; D and K of "wrn-D-K" stand for numbers."""
    return (*_ARCHITECTURES, "wrn-D-K")
