"""The networks by name: `build`, `find` and `names`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from sparse_adv.argument_types import check_count, checks_types
from sparse_adv.errors import first_line
from sparse_adv.models.digits_cnn import digits_cnn
from sparse_adv.models.resnet import preact_resnet18, resnet, wide_resnet
from sparse_adv.models.vgg import vgg16, vgg16_hydra, vgg16_kuangliu


class Architecture(NamedTuple):
    """A function that makes a network from (width, classes, input_shape, data), and the arguments' defaults."""

    make: Callable[[int, int, tuple[int, int, int], str], nn.Module]
    width: int = 64
    input_shape: tuple[int, int, int] = (3, 32, 32)
    data: str = "cifar10"


_ARCHITECTURES = {
    "vgg16": Architecture(vgg16),
    "vgg16_kuangliu": Architecture(vgg16_kuangliu),
    "vgg16_hydra": Architecture(vgg16_hydra),
    "resnet18": Architecture(partial(resnet, (2, 2, 2, 2))),
    "resnet34": Architecture(partial(resnet, (3, 4, 6, 3))),
    "resnet50": Architecture(partial(resnet, (3, 4, 6, 3), bottleneck=True)),
    "preact_resnet18": Architecture(preact_resnet18),
    "preact_resnet18_kuangliu": Architecture(partial(preact_resnet18, last_norm=False)),
    "preact_resnet18_wong": Architecture(partial(preact_resnet18, raw_shortcut=True)),
    "preact_resnet18_robustbench": Architecture(partial(preact_resnet18, last_norm=False, raw_shortcut=True)),
    "digits_cnn": Architecture(digits_cnn, input_shape=(1, 8, 8), data="digits"),
}
_WIDE = re.compile(r"wrn-(0|[1-9][0-9]*)-(0|[1-9][0-9]*)(-silu)?")
_COMMON_WIDE = ("wrn-28-10", "wrn-34-10", "wrn-70-16-silu")
"""Suggested in the error message if a misspelt name resembles them."""


@checks_types
def build(
    name: str,
    seed: int = 0,
    *,
    width: int | None = None,
    classes: int = 10,
    input_shape: Sequence[int] | None = None,
    data: str | None = None,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Build a freshly initialised network.

    The same seed gives the same weights, on every device. PyTorch's global random state does not change.

    Args:
        name: "resnet18", "resnet34", "resnet50", "vgg16", "preact_resnet18", "wrn-D-K" such as "wrn-34-10", or
            "digits_cnn". As other code has them: "vgg16_kuangliu" and "preact_resnet18_kuangliu" (pytorch-cifar),
            "vgg16_hydra" (also of HARP and the Adversarial Pruning Benchmark), "preact_resnet18_wong"
            (fast_adversarial), "preact_resnet18_robustbench" (its Wong2020Fast and Andriushchenko2020Understanding),
            "wrn-D-K-silu" (DeepMind's, such as Gowal2020Uncovering and Rebuffi2021Fixing of RobustBench).
        seed: seed of the weights.
        width: channels of the first stage (of wrn-D-K: of the first convolution, K times as many in the first stage);
            None for the published number.
        classes: number of outputs.
        input_shape: [C, H, W] of one image; None for [3, 32, 32], for "digits_cnn" [1, 8, 8].
        data: name of the data set whose mean and standard deviation normalise the images, see `Normalize.of`; None
            for "cifar10", for "digits_cnn" "digits".
        device: of the network; None for torch's default device. On "meta" it takes no memory: for its shapes.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: if the name is unknown, or seed, width, classes or input_shape is out of range or of another type.

    Examples:
        >>> import torch
        >>> from sparse_adv import models
        >>> model = models.build("resnet18", width=16, classes=100)
        >>> model(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 100])
        >>> sum(parameter.numel() for parameter in models.build("resnet18").parameters())
        11173962
    """
    architecture = find(name)
    width = architecture.width if width is None else width
    shape = architecture.input_shape if input_shape is None else input_shape
    check_count("width", width, least=1)
    check_count("classes", classes, least=1)
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"input_shape must be [C, H, W], each at least 1, got {_listed(shape)}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2**63, 2**64), got {seed}")
    device = torch.get_default_device() if device is None else torch.device(device)
    with torch.random.fork_rng(devices=[]), torch.device("meta" if device.type == "meta" else "cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        try:
            model = architecture.make(width, classes, (shape[0], shape[1], shape[2]), data or architecture.data)
        except RuntimeError as error:  # raised by the allocator, or for sizes beyond 64 bits
            raise ValueError(f"{name} of width {width} cannot be built: {first_line(error)}") from error
    return model.to(device)


def _listed(shape: object) -> str:
    return repr(list(shape) if isinstance(shape, Sequence) else shape)[:100]


@checks_types
def find(name: str) -> Architecture:
    """Return the architecture of a name.

    Args:
        name: as for `build`.

    Returns:
        The function that makes the network, and the defaults of its arguments.

    Raises:
        ValueError: if there is no such architecture; the message lists all names and the most similar one.

    Examples:
        >>> from sparse_adv import models
        >>> models.find("digits_cnn").input_shape
        (1, 8, 8)
    """
    if name in _ARCHITECTURES:
        return _ARCHITECTURES[name]
    if wide := _WIDE.fullmatch(name):
        return Architecture(partial(wide_resnet, int(wide[1]), int(wide[2]), silu=bool(wide[3])), width=16)
    similar = get_close_matches(name.lower(), (*_ARCHITECTURES, *_COMMON_WIDE), n=1)
    suggestion = f' (did you mean "{similar[0]}"?)' if similar else ""
    raise ValueError(f'there is no architecture "{name}"{suggestion}, only {", ".join(names())}')


def names() -> tuple[str, ...]:
    """Return the names of all architectures; D (depth) and K (width factor) of "wrn-D-K" stand for numbers.

    Examples:
        >>> from sparse_adv import models
        >>> "resnet18" in models.names(), models.names()[-1]
        (True, 'wrn-D-K-silu')
    """
    return (*_ARCHITECTURES, "wrn-D-K", "wrn-D-K-silu")
