"""`explain`: what each layer of a ticket costs, and which kernel it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from sparse_adv import experiment, masks, models, runs
from sparse_adv.commands import networks
from sparse_adv.commands.options import POSITIONAL
from sparse_adv.commands.output import Output
from sparse_adv.models.checkpoints import sizes_of
from sparse_adv.nn import explain, sparsify

_MOST_VALUES = 1 << 26
"""Largest number of values in the batch of images; a layer of 64 channels then has 6 GB."""


@dataclass(frozen=True)
class Options:
    """Show what each layer of a ticket costs and which kernel it runs.

    Loads a ticket, the weights of a run, or a pruned checkpoint of another tool, into its network and prints, layer by
    layer, shape, block, both densities and the kernels of the three passes.

    Args:
        ticket: a ticket or another file of weights, or the folder of a run, for its ticket or its best weights.
        batch: batch size to choose kernels for, at least 1.
        arch: name of an architecture of `sparse_adv.models`; the default is the ticket's.
        width: channels of the first stage; the default is the ticket's.
        input_shape: channels, height and width of the images, at least 1 each; the default is the ticket's or, in files
            that do not say it, that of the images that the architecture was published for; a line then says so.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    ticket: Path = field(metadata=POSITIONAL)
    batch: int = 128
    arch: str | None = None
    width: int | None = None
    input_shape: tuple[int, ...] | None = None
    json: bool | None = None

    def __post_init__(self) -> None:
        if self.input_shape is not None and (len(self.input_shape) != 3 or min(self.input_shape) < 1):
            raise ValueError(f"--input-shape must be 3 numbers of at least 1, as 3,32,32, got {self.input_shape}")
        if self.batch < 1:
            raise ValueError(f"--batch must be at least 1, got {self.batch}")


def run(options: Options) -> int:
    path = _file_of(options.ticket) if options.ticket.is_dir() else options.ticket
    ticket = experiment.read_pruned(path, dense=runs.of_weights(path) is not None)
    network = networks.agreed(options.arch, options.width, ticket.provenance, str(options.ticket))
    classes, channels = sizes_of(ticket.state_dict, network.arch)
    if options.input_shape and options.input_shape[0] != channels:
        raise ValueError(
            f"--input-shape must have the {channels} channels of {options.ticket}, got {options.input_shape}"
        )
    known = options.input_shape or ticket.provenance.get("input_shape")
    shape = known or (channels, *models.find(network.arch).input_shape[1:])
    build = partial(models.build, network.arch, width=network.width, input_shape=shape, classes=classes)
    _check_size(options, ticket, build(device="meta"), shape)
    model = sparsify(build(), ticket.masks)
    explanation = explain(model, (options.batch, *shape))
    output = Output(options.json)
    if not output.as_json:
        assumed = "" if known else ", which is assumed: the file does not say it, --input-shape does"
        output.line(f"{explanation}\nfor {options.batch} images of shape {list(shape)}{assumed}")
        return 0
    for row in explanation.rows:
        output.line(asdict(row))
    output.line({"density": explanation.density, "mac_density": explanation.mac_density, "input_shape": list(shape)})
    return 0


def _file_of(folder: Path) -> Path:
    """The ticket in the folder of a search, or the best weights of a training run."""
    found = [folder / name for name in (runs.TICKET, runs.BEST, runs.LAST) if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(f"{folder} has neither a ticket nor weights of a run: name a file")
    return found[0]


def _check_size(options: Options, ticket: masks.Ticket, model: nn.Module, shape: Sequence[int]) -> None:
    """Raise ValueError before allocating memory if the file claims sizes that it does not have."""
    sparsify(model, ticket.masks)
    held = sum(tensor.numel() for tensor in ticket.state_dict.values())
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > 2 * held:
        raise ValueError(f"{options.ticket} holds {held} weights, but its network would have {needed}")
    if options.batch * math.prod(shape) > _MOST_VALUES:
        raise ValueError(
            f"--batch {options.batch} of images {list(shape)}, which {options.ticket} is for, is more than "
            f"{_MOST_VALUES} values: take a smaller one"
        )
