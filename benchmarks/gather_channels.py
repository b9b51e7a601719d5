"""What gathering channels before block pruning retains: tables of a run's network, as trained.

    python benchmarks/gather_channels.py RUN_FOLDER [--blocks 32,32 64,64] [--densities 0.1 0.2]

For each block, scope and density the share of the squared weights that `masks.prune` keeps, in brackets that of their
absolute values: as trained, after `masks.gather_channels`, and without blocks, which no order of channels can exceed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sparse_adv import masks, models, runs
from sparse_adv.commands.flags import whole_numbers
from sparse_adv.training.checkpoint import read_weights


def network_of(folder: Path) -> tuple[nn.Module, tuple[int, ...]]:
    """A run's network with its last weights, and its input's shape."""
    weights, _ = read_weights(folder / runs.LAST)
    told = runs.read(folder).facts["network"]
    model = models.build(told["arch"], width=told["width"])
    model.load_state_dict(weights)
    return model, (1, *models.find(told["arch"]).input_shape)


def retained(model: nn.Module, kept: Mapping[str, Tensor]) -> str:
    """Share of the squared weights that masks keep, and of the absolute values."""
    shares = []
    for power in (2, 1):
        scores = {name: model.get_submodule(name).weight.detach().double().abs().pow(power) for name in kept}
        total = sum(float(score.sum()) for score in scores.values())
        shares.append(sum(float(score[kept[name]].sum()) for name, score in scores.items()) / total)
    return "{:.3f} ({:.3f})".format(*shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a dense run")
    parser.add_argument("--blocks", type=whole_numbers, nargs="+", default=[(32, 32), (64, 64)])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.2])
    arguments = parser.parse_args()
    model, shape = network_of(arguments.folder)
    print("| block | scope | density | as trained | gathered | without blocks | s |\n|" + " --- |" * 7)
    for block in arguments.blocks:
        for scope in ("uniform", "global"):
            for density in arguments.densities:
                begin = time.perf_counter()
                order = masks.gather_channels(model, density, block, shape, scope)
                seconds = time.perf_counter() - begin
                gathered = copy.deepcopy(model)
                order.apply(gathered)
                cells = [
                    retained(model, masks.prune(model, density, block, scope)),
                    retained(gathered, masks.prune(gathered, density, block, scope)),
                    retained(model, masks.prune(model, density, (1, 1), scope)),
                ]
                print("|", " | ".join([str(block), scope, str(density), *cells, f"{seconds:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
