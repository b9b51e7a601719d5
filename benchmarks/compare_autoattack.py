"""Seconds of AutoAttack (standard, linf, 8/255) on trained networks: this library's and torchattacks'.

    python benchmarks/compare_autoattack.py RUN [RUN ...] --images 32 [--out FILE.csv]

A RUN is a folder of `sparse-adv train`, dense or with masks, on 32 x 32 images. The images are the first test images
that the network classifies correctly. torchattacks gets the network with its masks multiplied in, in channels_last
(PyTorch alone can do no more with a ticket), and the budgets of the reference, because its own AutoAttack has 10 steps
instead of 100. After one image to warm up, each side attacks all of them `--rounds` times.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import harness
import torch
from harness import Case, Value
from torch import Tensor, nn

from sparse_adv import attacks, data, experiment, masks, runs
from sparse_adv import nn as sparse_nn
from sparse_adv.config import DataConfig, NetworkConfig

EPS, SEED = 8 / 255, 0


def network_of(run: runs.Run) -> tuple[nn.Module, str, Tensor, Tensor]:
    """The run's best network, in eval mode, its mask in words, and the test images that it classifies correctly."""
    images, network = run.info.data or DataConfig(), _network_config(run)
    dataset = experiment.load_data(images, run.info.train.seed, torch.device("cpu"))
    pruned = masks.load_pruned(run.folder / runs.BEST, dense=True)
    model = experiment.build_network(network, dataset, 0, torch.device("cpu"))
    model.load_state_dict(pruned.state_dict)
    model = sparse_nn.sparsify(model, pruned.masks).eval()
    x, y = data.to_unit(dataset.test.images[:1000]), dataset.test.labels[:1000]
    with torch.no_grad():
        correct = model(x).argmax(1) == y
    mask = f"density {masks.density(pruned.masks):.3g}" if pruned.masks else "dense"
    return model, mask, x[correct], y[correct]


def _network_config(run: runs.Run) -> NetworkConfig:
    if run.info.network is None:
        raise ValueError(f"{run.folder} does not say which network it trained")
    return run.info.network


def sides(model: nn.Module, x: Tensor, y: Tensor, labels: dict[str, Value]) -> dict[str, Callable[[], object]]:
    """The two timed calls; each writes the number of images that it found robust into the labels of its case.

    The first call of a side, which `interleaved` does not time, attacks one image.
    """
    import torchattacks  # needed only here

    plain = copy.deepcopy(model)
    sparse_nn.densify(plain).to(memory_format=torch.channels_last)

    def ours(images: int) -> None:
        attack = attacks.AutoAttack(model, eps=EPS, seed=SEED, verbose=False)
        attack.run_standard_evaluation(x[:images], y[:images], bs=images)
        assert attack.result is not None
        labels["images robust"] = round(images * min(attack.result.accuracy.values()))

    def theirs(images: int) -> None:
        common = {"norm": "Linf", "eps": EPS, "seed": SEED}
        members = [
            torchattacks.APGD(plain, steps=100, **common),
            torchattacks.APGDT(plain, steps=100, n_classes=10, **common),
            torchattacks.FAB(plain, steps=100, multi_targeted=True, n_classes=10, **common),
            torchattacks.Square(plain, n_queries=5000, **common),
        ]
        adv = torchattacks.MultiAttack(members)(x[:images], y[:images])  # its FAB takes no channels_last images
        with torch.no_grad():
            labels["images robust, torchattacks"] = int((plain(adv).argmax(1) == y[:images]).sum())

    def first_on_one_image(attack: Callable[[int], None]) -> Callable[[], None]:
        first = iter([1])
        return lambda: attack(next(first, len(y)))

    return {"ours": first_on_one_image(ours), "torchattacks": first_on_one_image(theirs)}


def case(run: runs.Run, images: int, rounds: int) -> Case:
    """Both sides on the first images that the network of a run classifies correctly."""
    model, mask, x, y = network_of(run)
    x, y = x[:images], y[:images]
    network = _network_config(run)
    name = network.arch if network.width is None else f"{network.arch} width {network.width}"
    labels: dict[str, Value] = {"op": "AutoAttack", "run": run.name, "network": name, "mask": mask, "images": len(y)}
    return Case(labels, sides(model, x, y, labels), rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--images", type=harness.positive, default=32)
    parser.add_argument("--rounds", type=harness.positive, default=1)
    options = harness.start(parser, arguments)
    if find_spec("torchattacks") is None:
        parser.error("torchattacks, which is compared with, is not installed")
    found = [runs.read(folder) for folder in options.runs]
    harness.measure((case(run, options.images, options.rounds) for run in found), options)


if __name__ == "__main__":
    harness.run(main)
