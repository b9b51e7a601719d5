"""`train`: adversarial training, dense or from a ticket."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from sparse_adv import masks, runs, tickets
from sparse_adv.commands import flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.training import TrainConfig, conclude, distributed, train

DENSE = {"weights": 1.0, "multiply_adds": 1.0}


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
        dataset = networks.dataset_of(options, device)
        recipe, output = flags.recipe_of(options), Output(options.json)
        if options.ticket is None and (options.reinit or options.shuffle):
            raise ValueError("--reinit and --shuffle are controls of a ticket: name it with --ticket")
        found = masks.load_pruned(options.ticket) if options.ticket else masks.Ticket({}, {}, {})
        about = networks.agreed(options, found.provenance, str(options.ticket or "a dense run"))
        # A seed of its own, or the fresh weights would be those that the ticket began with.
        model = networks.build(about, dataset, options.seed + options.reinit, device)
        kept, seconds, multiply_adds = DENSE, 0.0, 0
        if options.ticket:
            found = _plant(model, found, options, (1, *dataset.input_shape))
            kept = {
                "weights": masks.density(found.masks),
                "multiply_adds": masks.multiply_add_density(model, found.masks, (1, *dataset.input_shape)),
            }
            seconds, multiply_adds = (found.provenance.get(name, 0) for name in ("seconds", "multiply_adds"))
        batches = networks.batches_of(options, dataset)
        before = {"seconds": seconds, "multiply_adds": multiply_adds}
        networks.begin(
            options, "train", _identity(options), name=options.name, network=about, densities=kept, before=before
        )
        with output.progress(len(batches), recipe) as step:
            records = train(
                model,
                batches,
                recipe,
                validation=dataset.validation,
                folder=options.out,
                before=(seconds, multiply_adds),
                on_epoch=output.epoch,
                on_step=step,
            )
        checks = tickets.pruned_weights_are_zero(model, found.masks) | {"kept": kept}
        path = options.out / runs.RESULT
        result = (
            runs.read_json(path)
            if path.exists()
            else conclude(model, options.out, records, recipe, dataset.test, {"checks": checks})
        )
        tested = ", ".join(f"{attack} {accuracy:.1%}" for attack, accuracy in result["test"].items())
        output.say(
            f"{options.out}: test accuracy {tested}; {result['seconds']:.1f} s of training and search",
            {"run": str(options.out), **result},
        )
    return 0


def _plant(
    model: nn.Module, found: masks.Ticket, options: argparse.Namespace, input_shape: tuple[int, ...]
) -> masks.Ticket:
    """The network of the ticket, or of the control that was asked for."""
    kept = tickets.shuffle(found.masks, options.seed) if options.shuffle else found.masks
    planted = masks.Ticket(kept, found.state_dict, found.provenance)
    try:
        tickets.restore(model, planted, input_shape, weights=not options.reinit)
    except ValueError as error:
        raise ValueError(f"{options.ticket}: {error}") from error
    return planted


def _identity(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the run beside its flags: the ticket's contents, and how many processes share a batch."""
    content = hashlib.sha256(options.ticket.read_bytes()).hexdigest() if options.ticket else None
    return {"ticket_sha256": content, "processes": distributed.world_size()}
