"""`explain`: what each layer of a ticket costs, and which kernel it takes."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparse_adv import masks, models
from sparse_adv.commands import flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.nn import explain, sparsify


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "explain",
        "show what each layer of a ticket costs and which kernel it takes",
        "Loads a ticket, or a pruned checkpoint of another tool, into its network and prints, layer by layer, shape, "
        "block, both densities and the kernels that the passes take.",
    )
    parser.add_argument("ticket", type=Path, help="a ticket file, such as runs/demo/search/ticket.safetensors")
    parser.add_argument("--batch", type=flags.whole, default=128, help="batch size to choose kernels for")
    flags.add_output(parser)
    flags.add_network(parser, None)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {options.batch}")
    ticket = masks.load_pruned(options.ticket)
    about = networks.agreed(options, ticket.provenance, str(options.ticket))
    shape = tuple(ticket.provenance.get("input_shape") or models.find(about.arch).input_shape)
    model = models.build(about.arch, width=about.width, input_shape=shape, classes=_classes(ticket))
    sparsify(model, ticket.masks)
    found = explain(model, (options.batch, *shape))
    output = Output(options.json)
    if not output.as_json:
        output.say(str(found), {})
        return 0
    for row in found.rows:
        output.say("", asdict(row))
    output.say("", {"density": found.density, "multiply_add_density": found.mac_density})
    return 0


def _classes(ticket: masks.Ticket) -> int:
    """As many as the last linear layer has outputs."""
    outputs = [len(value) for value in ticket.state_dict.values() if value.dim() == 2]
    return outputs[-1] if outputs else 10
