"""`train`: adversarial training, dense or from a ticket."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from sparse_adv import experiment, masks
from sparse_adv.commands import config, flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.config import TrainConfig
from sparse_adv.experiment import TrainRun
from sparse_adv.json_files import to_json
from sparse_adv.runs import TicketSource
from sparse_adv.training import distributed


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "train",
        "train a network adversarially, dense or from a ticket",
        "Trains a network and tests it once, at the end. Stopped at any moment, the same command continues and ends "
        "with the same weights. Under torchrun --nproc-per-node N the N processes share each batch and exchange only "
        "the gradients of kept weights; each takes a GPU of its own, or all take the one that --device names.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--name", help="what reports call the run; left out, the folder's name")
    ticket = parser.add_argument_group("ticket")
    ticket.add_argument("--ticket", type=Path, help="ticket, or pruned checkpoint of another tool; left out, dense")
    ticket.add_argument(
        "--reinit", action=argparse.BooleanOptionalAction, default=False, help="control: the mask with fresh weights"
    )
    ticket.add_argument(
        "--shuffle", action=argparse.BooleanOptionalAction, default=False, help="control: each layer's mask at random"
    )
    flags.add_config(parser)
    flags.add_output(parser)
    flags.add_data(parser)
    flags.add_batches(parser)
    flags.add_network(parser, None)
    flags.add_recipe(parser, TrainConfig())
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with distributed.group(options.device) as device:
        train_config, output = flags.recipe_of(options), Output(options.json)
        images = networks.images_of(options)
        dataset = experiment.load_data(images, options.seed, device)
        if options.ticket is None and (options.reinit or options.shuffle):
            raise ValueError("--reinit and --shuffle are controls of a ticket: name it with --ticket")
        ticket, source = None, None
        if options.ticket:
            ticket = masks.load_pruned(options.ticket)
            digest = hashlib.sha256(options.ticket.read_bytes()).hexdigest()
            source = TicketSource(digest, options.reinit, options.shuffle)
        known = ticket.provenance if ticket is not None else {}
        network = networks.agreed(options, known, str(options.ticket or "a dense run"))
        run = TrainRun(
            options.out,
            train_config,
            images,
            network,
            dataset,
            device,
            ticket=ticket,
            source=source,
            name=options.name,
        )
        if distributed.rank() == 0:
            config.write_config(options.out, options)
        with output.progress(run.updates) as step:
            for record in run.epochs(step):
                output.epoch(record)
        result = run.finish()
        tested = ", ".join(f"{attack} {accuracy:.1%}" for attack, accuracy in (result.test or {}).items())
        output.say(
            f"{options.out}: test accuracy {tested}; {result.total.seconds:.1f} s of training and search",
            {"run": str(options.out), **to_json(result)},
        )
    return 0
