"""`search`: find a ticket, write it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_adv import masks, runs, tickets
from sparse_adv.commands import flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.config import TrainConfig
from sparse_adv.training import distributed

DEFAULTS = TrainConfig(objective="fgsm-rs", epochs=20, lr=0.05, schedule="constant", weight_decay=1e-4)
"""The paper's search: a small constant rate without warm-up."""


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "search",
        "find a ticket: train dense and cheaply, prune, go back to the start",
        "Trains a dense network with a cheap objective, prunes it, and writes the mask with the initial weights: "
        "OUT/ticket.safetensors. Stopped at any moment, the same command continues. The defaults are those of Li et "
        "al. 2020 (arXiv 2003.05733), section 3.1.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the ticket and what led to it")
    flags.add_config(parser)
    flags.add_output(parser)
    flags.add_data(parser)
    flags.add_batches(parser)
    flags.add_network(parser, "resnet18")
    flags.add_recipe(parser, DEFAULTS)
    flags.add_rule(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    with distributed.group(options.device) as device:
        dataset = networks.dataset_of(options, device)
        recipe, rule, output = flags.recipe_of(options), flags.rule_of(options), Output(options.json)
        about = {
            "arch": options.arch,
            "width": options.width,
            "data": str(options.data),
            "seed": options.seed,
            "input_shape": list(dataset.input_shape),
        }
        model = networks.build(about, dataset, options.seed, device)
        batches = networks.batches_of(options, dataset)
        networks.begin(options, "search", densities={"weights": 1.0, "multiply_adds": 1.0})
        with output.progress(len(batches) * rule.rounds, recipe) as step:
            ticket = tickets.search(
                model,
                batches,
                recipe,
                rule,
                validation=dataset.validation,
                folder=options.out,
                about=about,
                on_epoch=output.epoch,
                on_step=step,
            )
        told = ticket.provenance
        kept = {
            "weights": masks.density(ticket.masks),
            "multiply_adds": masks.multiply_add_density(model, ticket.masks, (1, *dataset.input_shape)),
        }
        result = {name: told[name] for name in ("seconds", "multiply_adds", "checks")} | {"kept": kept}
        if distributed.rank() == 0:
            runs.write_json(options.out / runs.RESULT, result)
        path = options.out / runs.TICKET
        output.say(
            f"{path}: keeps {kept['weights']:.1%} of the weights and {kept['multiply_adds']:.1%} of the multiply-adds; "
            f"found in {told['seconds']:.1f} s",
            {"ticket": str(path), **result},
        )
    return 0
