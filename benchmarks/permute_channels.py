"""How much of the scores block pruning retains after a channel permutation, in a trained and in a fresh network.

    python benchmarks/permute_channels.py RUN_FOLDER [--blocks 32,32 64,64] [--densities 0.1 0.2]

Prints for each block, scope and density the share of the squared weights that `masks.prune` keeps, and in brackets the
share of their absolute values: without a permutation, after `masks.permute_channels`, and with single weights as blocks
(an upper bound for any permutation). The gain of the fresh network is chance.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import integers, run
from torch import Tensor, nn

from sparse_adv import masks, models, runs
from sparse_adv.training.checkpoint import read_weights

COLUMNS = ("block", "scope", "density", "fresh", "fresh, permuted", "trained", "trained, permuted", "single weights")


def retained(model: nn.Module, kept: Mapping[str, Tensor]) -> str:
    """Share of the squared weights that masks keep, and of the absolute values."""
    shares = []
    for power in (2, 1):
        scores = {name: model.get_submodule(name).weight.detach().double().abs().pow(power) for name in kept}
        total = sum(float(score.sum()) for score in scores.values())
        shares.append(sum(float(score[kept[name]].sum()) for name, score in scores.items()) / total)
    return "{:.3f} ({:.3f})".format(*shares)


def permuted(model: nn.Module, density: float, block: tuple[int, ...], shape: tuple[int, ...], scope: str) -> nn.Module:
    """A copy of the model, permuted for these blocks."""
    model = copy.deepcopy(model)
    masks.permute_channels(model, density, block, shape, scope=scope).apply(model)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a dense run of `sparse-adv train`")
    parser.add_argument("--blocks", type=integers, nargs="+", default=[(32, 32), (64, 64)])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    options = parser.parse_args(arguments)
    trained_network = runs.read(options.folder).info.network
    if trained_network is None:
        raise ValueError(f"{options.folder} does not say which network it trained")
    shape = (1, *models.find(trained_network.arch).input_shape)
    fresh, trained = (models.build(trained_network.arch, seed=1, width=trained_network.width) for _ in range(2))
    trained.load_state_dict(read_weights(options.folder / runs.LAST)[0])
    logging.disable(logging.WARNING)  # about layers in which nothing is kept
    print("|", " | ".join(COLUMNS), "|\n|" + " --- |" * len(COLUMNS))
    for block in options.blocks:
        for scope in ("uniform", "global"):
            for density in options.densities:
                cells = [
                    retained(network, masks.prune(network, density, block, scope=scope))
                    for model in (fresh, trained)
                    for network in (model, permuted(model, density, block, shape, scope))
                ]
                cells.append(retained(trained, masks.prune(trained, density, (1, 1), scope=scope)))
                print("|", " | ".join([str(block), scope, str(density), *cells]), "|", flush=True)


if __name__ == "__main__":
    run(main)
