"""`load_checkpoint`: networks with the weights and masks of other code; its names are mapped to the names here."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks import Ticket, from_state_dict, load_pruned
from sparse_adv.masks.interchange.formats import WRAPPERS, GivenDensity
from sparse_adv.models.architectures import build, find
from sparse_adv.models.normalize import STATISTICS, Normalize
from sparse_adv.nn import sparsify

log = logging.getLogger(__name__)

_WRAPPERS = rf"^(?:(?:{'|'.join(WRAPPERS)}|net|1)\.)+"
"""Prefixes of names; net and 1 come from `nn.Sequential(normalize, net)` and other code's wrappers."""

_NORMALIZATION = (
    (r"^(?:0|normalizer|normalization)\.(mean|std)$", r"normalize.\1"),
    (r"^(?:mu|mean)$", "normalize.mean"),
    (r"^(?:sigma|std)$", "normalize.std"),
)

_RESNET = ((r"\bshortcut\.", "downsample."), (r"^linear\.", "fc."))
_PREACT = ((r"\bshortcut\.0\.", "downsample."), (r"^linear\.", "fc."), (r"^bn\.", "bn1."))
_WIDE = (
    (r"^block(\d+)\.layer\.", r"layer\1."),
    (r"\bconvShortcut\b", "downsample"),
    # DeepMind's networks.
    (r"^layer\.(\d+)\.block\.", lambda match: f"layer{int(match[1]) + 1}."),
    (r"\bbatchnorm_0\b", "bn1"),
    (r"\bbatchnorm_1\b", "bn2"),
    (r"\bconv_0\b", "conv1"),
    (r"\bconv_1\b", "conv2"),
    (r"\bshortcut\b", "downsample"),
    (r"^batchnorm\b", "bn1"),
    (r"^init_conv\b", "conv1"),
    (r"^logits\b", "fc"),
)
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]

_NAMES: dict[str, Rules] = {"resnet": _RESNET, "preact_resnet": _PREACT, "wrn": _WIDE}
"""For each family of networks, patterns of the names in other code and the names here."""

_NEVER_RUN = {"wrn": "sub_block1."}
"""Names of modules that other code makes but never calls: TRADES, HYDRA and RobustBench have the first stage twice."""


@checks_types
def load_checkpoint(
    source: str | os.PathLike[str] | Mapping[str, Any] | Ticket,
    name: str,
    *,
    normalize: str | Normalize | None = None,
    density: GivenDensity = None,
    width: int | None = None,
    classes: int = 10,
    input_shape: Sequence[int] | None = None,
) -> nn.Module:
    """Build a network by name and give it the weights and masks of a checkpoint, of this library or of other code.

    The names in the checkpoints of kuangliu's pytorch-cifar, TRADES, HYDRA, HARP, the Adversarial Pruning Benchmark,
    RobustBench and DeepMind are mapped to those of `build`'s networks; prefixes such as "module." and dicts around the
    state dict are removed. Masks in any format of `masks.load_pruned`, including zeros, make the layers sparse. No code
    in a file is executed.

    Args:
        source: a file, a state dict or checkpoint in memory, or a ticket.
        name: the architecture, see `build`.
        normalize: how the network normalises images in [0, 1]: a layer, the name of a data set of `Normalize.of`, or
            "none" for a network without normalisation, such as those of TRADES and HYDRA. None if the checkpoint
            contains it (buffers "mu" and "sigma", or "mean" and "std").
        density: fraction of weights that each layer keeps, if the checkpoint has scores, see `masks.load_pruned`.
        width, classes, input_shape: as in `build`.

    Returns:
        The network in eval mode, on PyTorch's default device.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the name is unknown, the file is damaged or contains other objects than tensors, or a tensor is
            left over, missing or of another shape; the message names it.

    Examples:
        >>> import torch
        >>> from sparse_adv import models
        >>> state = models.build("resnet18", width=4).state_dict()
        >>> other = {f"module.{key.replace('downsample', 'shortcut')}": value for key, value in state.items()}
        >>> model = models.load_checkpoint({"state_dict": other}, "resnet18", width=4)
        >>> bool((model.fc.weight == state["fc.weight"]).all())
        True
    """
    if isinstance(source, Ticket):
        origin = str(source.provenance.get("file", "the ticket"))
        kept, state = source.masks, source.state_dict
    elif isinstance(source, Mapping):
        origin = "the state dict"
        kept, state = from_state_dict(source, density=density, dense=True)
    else:
        origin = repr(os.fspath(source))
        ticket = load_pruned(source, density=density, dense=True)
        kept, state = ticket.masks, ticket.state_dict
    sized = partial(build, name, width=width, classes=classes, input_shape=input_shape)
    shapes = sized(device="meta")  # takes no memory: the size may come from a file
    kept, state = _fitted(kept, state, name, normalize, shapes, origin)
    model = sized()
    with torch.no_grad():
        model.load_state_dict(state, strict=False)
    return sparsify(model, kept).eval()


@checks_types
def fit_ticket(
    ticket: Ticket, name: str, *, normalize: str | Normalize | None = None, width: int | None = None
) -> Ticket:
    """Give the masks and weights of a checkpoint of other code the names that they have in a network of `build`.

    `masks.load_pruned` keeps the names of the file. `tickets.restore` cannot use them if they come from other code.

    Args:
        ticket: from `masks.load_pruned`.
        name, normalize, width: as in `load_checkpoint`. The numbers of classes and channels follow from the tensors.

    Returns:
        The ticket with other names and, if `normalize` is given, that normalisation; the provenance is the same.

    Raises:
        ValueError: as in `load_checkpoint`.

    Examples:
        >>> from sparse_adv import masks, models
        >>> model = models.build("resnet18", width=4)
        >>> state = {key.replace("downsample", "shortcut"): value for key, value in model.state_dict().items()}
        >>> ticket = models.fit_ticket(masks.Ticket({}, state), "resnet18", width=4)
        >>> ticket.state_dict.keys() == model.state_dict().keys()
        True
    """
    origin = str(ticket.provenance.get("file", "the ticket"))
    classes, channels = sizes_of(ticket.state_dict, name)
    shape = (channels, *find(name).input_shape[1:])
    shapes = build(name, width=width, classes=classes, input_shape=shape, device="meta")
    kept, state = _fitted(ticket.masks, ticket.state_dict, name, normalize, shapes, origin)
    uncounted = {key: torch.zeros((), dtype=torch.int64) for key in shapes.state_dict() if key not in state}
    return replace(ticket, masks=kept, state_dict=state | uncounted)


def sizes_of(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Return the numbers of classes and of image channels, from the weights of a network of `build` in any order.

    They are the outputs of its last linear layer and the inputs of its first convolution. If the weights lack such a
    layer, because their names come from other code, the numbers are those of the network itself.

    Examples:
        >>> sizes_of(build("digits_cnn", classes=7).state_dict(), "digits_cnn")
        (7, 1)
    """
    own = build(name, device="meta").state_dict()
    last = [key for key, value in own.items() if value.dim() == 2][-1]
    first = next(key for key, value in own.items() if value.dim() == 4)
    named = _renamed(state, name, "the ticket")
    of_last, of_first = (named[key][1] if key in named else own[key] for key in (last, first))
    return len(of_last), of_first.shape[1]


def _fitted(
    kept: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    name: str,
    normalize: str | Normalize | None,
    shapes: nn.Module,
    origin: str,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and weights under the names of a network, which is on the meta device."""
    named = _renamed(state, name, origin)
    mask_of = _renamed({f"{module}.weight": mask for module, mask in kept.items()}, name, origin)
    if len(named) < len(state):
        log.info("%s: left out %d tensors of a block that %s never runs", origin, len(state) - len(named), name)
    _set_normalization(named, normalize, shapes, origin)
    _check_fit(shapes.state_dict(), named, name, origin)
    masks = {key.removesuffix(".weight"): mask for key, (_, mask) in mask_of.items()}
    return masks, {key: value for key, (_, value) in named.items()}


Named = dict[str, tuple[str, Tensor]]
"""Maps the name here to the name in the checkpoint and the tensor."""


def _renamed(state: Mapping[str, Tensor], network: str, origin: str) -> Named:
    family = next((family for family in _NAMES if network.startswith(family)), "")
    named: Named = {}
    for theirs, value in state.items():
        key = re.sub(_WRAPPERS, "", theirs)
        if family in _NEVER_RUN and key.startswith(_NEVER_RUN[family]):
            continue
        for pattern, replacement in (*_NORMALIZATION, *_NAMES.get(family, ())):
            key = re.sub(pattern, replacement, key)
        if key in named:
            raise ValueError(
                f"{origin} has both {named[key][0]!r} and {theirs!r}, which are the same tensor of {network}"
            )
        named[key] = theirs, value
    return named


def _set_normalization(named: Named, normalize: str | Normalize | None, model: nn.Module, origin: str) -> None:
    """Add mean and standard deviation to the tensors, in the shapes that the network has for them."""
    layer = model.get_submodule("normalize")
    assert isinstance(layer, Normalize)
    keys = ("normalize.mean", "normalize.std")
    present = [key for key in keys if key in named]
    if normalize is None and not present:
        raise ValueError(
            f"{origin} does not say how its images were normalised: name it with --normalize (in Python normalize), a "
            'data set such as "cifar10", or "none" for images in [0, 1] as they are'
        )
    if normalize is not None:
        if present:
            raise ValueError(f"{origin} has the normalisation {named[present[0]][0]!r} itself: leave normalize out")
        layer = _normalization(normalize, len(layer.mean))
        named |= {f"normalize.{part}": (f"normalize.{part}", getattr(layer, part)) for part in ("mean", "std")}
    for key in keys:
        if key in named:
            theirs, value = named[key]
            named[key] = theirs, value.reshape(-1, 1, 1)


def _normalization(normalize: str | Normalize, channels: int) -> Normalize:
    if isinstance(normalize, Normalize):
        return normalize
    if normalize == "none":
        return Normalize([0.0] * channels, [1.0] * channels)
    if normalize not in STATISTICS or len(STATISTICS[normalize][0]) != channels:
        known = ", ".join(name for name, (mean, _) in STATISTICS.items() if len(mean) == channels)
        raise ValueError(f'normalize must be "none", {known} or a layer for {channels} channels, got {normalize!r}')
    return Normalize.of(normalize, channels)


def _check_fit(wanted: Mapping[str, Tensor], named: Named, name: str, origin: str) -> None:
    """Raise ValueError for the first tensor that does not fit the network, whose state dict is `wanted`."""
    for key, (theirs, value) in named.items():
        if key not in wanted:
            raise ValueError(f"{origin} does not fit {name}: it has {theirs!r}, for which {name} has no place")
        if value.shape != wanted[key].shape:
            shapes = f"{tuple(value.shape)}, in {name} {tuple(wanted[key].shape)}"
            raise ValueError(f"{origin} does not fit {name}: {theirs!r} has shape {shapes}")
    for key, own in wanted.items():
        # PyTorch before 0.4.1 did not count batches; nothing here reads the count.
        if key not in named and not key.endswith("num_batches_tracked"):
            raise ValueError(f"{origin} does not fit {name}: it lacks {key!r}, under this name and under other code's")
        if key in named and not named[key][1].is_floating_point() and own.is_floating_point():
            raise ValueError(f"{origin} does not fit {name}: {named[key][0]!r} is {named[key][1].dtype}")
