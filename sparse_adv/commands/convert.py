"""`convert`: masks and weights of other tools, in and out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_adv import masks, models
from sparse_adv.commands import flags
from sparse_adv.commands.output import Output

SHAPES = ("ticket", "dense", "prune")


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "convert",
        "read a pruned model of another tool, write it for this one or for PyTorch",
        "Reads checkpoints of torch.nn.utils.prune and parametrize, TurboPrune, OpenLTH, HYDRA and HARP, ticket_robust "
        "(with its .npy masks), plain zeros, safetensors and tickets, with or without prefixes. Writes a ticket, a "
        "plain dense state dict (zeros where pruned), or one shaped like torch.nn.utils.prune's.",
    )
    parser.add_argument("source", type=Path, help="checkpoint to read")
    parser.add_argument("target", type=Path, help="file to write: *.safetensors, *.pt or *.pth")
    parser.add_argument("--to", default="ticket", metavar="SHAPE", help=f"what to write: {', '.join(SHAPES)}")
    parser.add_argument("--masks", type=Path, metavar="FILE", help="file of the masks, where they are in another")
    parser.add_argument("--format", help="format of the source; left out, it is recognised")
    parser.add_argument("--density", type=flags.number, help="kept share of a checkpoint that has scores and no masks")
    flags.add_output(parser)
    flags.add_network(parser, None)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.to not in SHAPES:
        raise ValueError(f"--to must be one of {', '.join(SHAPES)}, got {options.to!r}")
    model = models.build(options.arch, width=options.width) if options.arch else None
    found = masks.load_pruned(
        options.source, options.masks, model=model, density=options.density, format=options.format
    )
    if options.to == "ticket":
        about = {name: getattr(options, name) for name in ("arch", "width") if getattr(options, name) is not None}
        ticket = masks.Ticket(found.masks, found.state_dict, found.provenance | about)
        masks.save_ticket(options.target, ticket)
    else:
        masks.save_pruned(options.target, found.masks, found.state_dict, options.to)
    density = masks.density(found.masks)
    Output(options.json).say(
        f"{options.target}: {len(found.masks)} masks that keep {density:.1%} of their weights, from "
        f"{found.provenance.get('format')}",
        {"written": str(options.target), "to": options.to, "masks": len(found.masks), "density": density},
    )
    return 0
