"""`search`: find a ticket, write it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_adv import experiment, runs
from sparse_adv.commands import config, flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.config import NetworkConfig, TrainConfig
from sparse_adv.experiment import SearchRun
from sparse_adv.json_files import to_json
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
        train_config, output = flags.recipe_of(options), Output(options.json)
        images, network = networks.images_of(options), NetworkConfig(options.arch, options.width)
        dataset = experiment.load_data(images, options.seed, device)
        search = SearchRun(options.out, train_config, flags.rule_of(options), images, network, dataset, device)
        if distributed.rank() == 0:
            config.write_config(options.out, options)
        with output.progress(search.updates) as step:
            result = search.run(on_epoch=output.epoch, on_step=step)
        path, density = options.out / runs.TICKET, result.density
        output.say(
            f"{path}: keeps {density.weights:.1%} of the weights and {density.macs:.1%} of the multiply-adds; found in "
            f"{result.total.seconds:.1f} s",
            {"ticket": str(path), **to_json(result)},
        )
    return 0
