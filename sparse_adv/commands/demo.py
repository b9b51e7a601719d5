"""`demo`: the whole way on real digits, in about two minutes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_adv import demo
from sparse_adv.commands import flags


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "demo",
        "search a ticket on real digits, train it and its controls, compare",
        "Searches a ticket on scikit-learn's digits, then trains the ticket, the same mask with fresh weights "
        "and the dense network with PGD-10 at eps 0.2; writes a run folder for each and a report of tables and plots. "
        "About two minutes on two cores.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for what it finds")
    parser.add_argument(
        "--epochs", type=flags.whole, default=demo.TRAINING.epochs, help="of adversarial training, for each run"
    )
    parser.add_argument("--search-epochs", type=flags.whole, default=demo.SEARCH.epochs, help="of the search")
    parser.add_argument("--density", type=flags.number, default=0.1, help="share of the weights that the ticket keeps")
    parser.add_argument("--block", type=flags.whole_numbers, default=(1, 1), help="block shape of the mask")
    parser.add_argument("--seed", type=flags.whole, default=0, help="of split, weights, order of images and attacks")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(
        demo.run(
            options.out,
            epochs=options.epochs,
            search_epochs=options.search_epochs,
            density=options.density,
            block=options.block,
            seed=options.seed,
        )
    )
    return 0
