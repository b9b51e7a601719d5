"""`convert`: masks and weights of other tools, into a ticket or a file for PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparse_adv import experiment, masks, models
from sparse_adv.commands.options import POSITIONAL
from sparse_adv.commands.output import Output, check_new


@dataclass(frozen=True)
class Options:
    """Read a pruned model of another tool, write it for this one or for PyTorch.

    Reads checkpoints of torch.nn.utils.prune and parametrize, TurboPrune, OpenLTH, HYDRA and HARP, ticket_robust (with
    its .npy masks), plain zeros, safetensors and tickets, with or without prefixes. Writes a ticket, a plain dense
    state dict (zeros where pruned), or one shaped like that of torch.nn.utils.prune.

    Args:
        source: checkpoint to read.
        target: file to write: *.safetensors, *.pt or *.pth; neither one that is read nor one of a run.
        to: what to write.
        masks: file of the masks, where they are in another file than the weights.
        format: format of the source: parametrize, prune, masked, popup_scores (HYDRA, HARP), open_lth, turboprune,
            zeros or ticket; the default is to recognise it.
        density: density of a checkpoint that has scores and no masks.
        arch: name of an architecture of `sparse_adv.models`, whose names masks and weights then get; needed to train a
            checkpoint of other code.
        width: channels of the first stage of that architecture.
        normalize: with --arch, mean and standard deviation of a checkpoint that has none: of cifar10, cifar100, mnist,
            fashion_mnist or digits, or none for images in [0, 1] as they are.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    source: Path = field(metadata=POSITIONAL)
    target: Path = field(metadata=POSITIONAL)
    to: Literal["ticket", "dense", "prune"] = "ticket"
    masks: Path | None = None
    format: str | None = None
    density: float | None = None
    arch: str | None = None
    width: int | None = None
    normalize: str | None = None
    json: bool | None = None

    def __post_init__(self) -> None:
        check_new("target", self.target, self.source, self.masks)
        suffixes = (".safetensors",) if self.to == "ticket" else (".safetensors", ".pt", ".pth")
        if self.target.suffix not in suffixes:
            names = " or ".join(f"*{suffix}" for suffix in suffixes)
            raise ValueError(f"target must be {names} for --to {self.to}, got {self.target}")
        if self.width is not None and self.arch is None:
            raise ValueError(f"--width is for the network of --arch, which is missing, got --width {self.width}")
        if self.normalize is not None and (self.arch is None or self.masks is not None):
            raise ValueError(f"--normalize is for the network of --arch without --masks, got {self.normalize}")


def run(options: Options) -> int:
    # Masks in another file may be a list in the order of the network's layers; the weights then have its names.
    model = models.build(options.arch, width=options.width) if options.arch and options.masks else None
    pruned = experiment.read_pruned(
        options.source, options.masks, model=model, density=options.density, format=options.format
    )
    if options.arch and model is None:
        pruned = models.fit_ticket(pruned, options.arch, normalize=options.normalize, width=options.width)
    if options.to == "ticket":
        about = {name: getattr(options, name) for name in ("arch", "width") if getattr(options, name) is not None}
        ticket = masks.Ticket(pruned.masks, pruned.state_dict, pruned.provenance | about)
        masks.save_ticket(options.target, ticket)
    else:
        masks.save_pruned(options.target, pruned.masks, pruned.state_dict, options.to)
    density = masks.density(pruned.masks)
    Output(options.json).print(
        f"{options.target}: {len(pruned.masks)} masks that keep {density:.1%} of their weights, from "
        f"{pruned.provenance.get('format')}",
        {"written": str(options.target), "to": options.to, "masks": len(pruned.masks), "density": density},
    )
    return 0
