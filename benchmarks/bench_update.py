"""Whole updates of `training`, and an epoch of it, against other code as one CUDA graph for each update.

    python benchmarks/bench_update.py [--device cuda] [--out FILE.csv]
    make bench

- "ours": `training`'s own updates, on a GPU replayed as CUDA graphs; of masked networks against "ours_dense";
- "careful": the published loop in bfloat16 and channels_last, an update in one CUDA graph;
- "compile": the same with a compiled network.

On a GPU a side makes ten updates, so that the host runs ahead as it does in training. An epoch has batches that are
cropped and flipped, moved weights and the sums of losses; 50,000 images on a GPU. On a CPU all is float32 and NCHW, and
there are no graphs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import count
from typing import Any

import harness
import pytest
import torch
from bench_attack import EPS, STEPS, Setup, Update, frozen_attack, published_attack
from harness import Case
from timing import Side, captured
from torch import Tensor, nn

from sparse_adv import attacks, data, models, training
from sparse_adv.training.costs import Stopwatch
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.update import Updater

UPDATES = {"cuda": 10, "cpu": 1}
IMAGES = {"cuda": 50_000, "cpu": 256}
MASKS = (((64, 64), 0.1), ((64, 64), 0.2))
NFGSM = {"steps": 1, "alpha": EPS, "start_eps": 2 * EPS, "project": False}
OBJECTIVES: dict[str, dict[str, Any]] = {"pgd": {}, "n-fgsm": NFGSM}
"""The options with which the published attack equals the objective's attack."""
NAMES = {"pgd": f"PGD-{STEPS}", "n-fgsm": "N-FGSM"}


def config_of(objective: str, on_gpu: bool) -> training.TrainConfig:
    precision = "bfloat16" if on_gpu else "float32"
    return training.TrainConfig(objective, epochs=1000, lr=0.01, steps=STEPS, precision=precision)


class Updates:
    """A network, its images, and the sides of its updates."""

    def __init__(self, device: str = "cpu", quick: bool = False) -> None:
        self.setup, self.quick = Setup("resnet18", device, quick), quick

    def repeated(self, side: Side) -> Side:
        """A call that makes as many updates as a case has per call."""

        def repeat() -> None:
            for _ in range(UPDATES[self.setup.device]):
                side()

        return repeat

    def ours(self, objective: str, network: nn.Module | None = None) -> Side:
        """Updates by a separate updater."""
        setup = self.setup
        model = copy.deepcopy(network or setup.network).train()
        config, device = config_of(objective, setup.on_gpu), setup.x.device
        updater = Updater(model, config, 1, device, attacks.Graphs(), UpdateHook())
        x, y = updater.to_device(setup.x, setup.y)
        noise = torch.Generator().manual_seed(0)
        return self.repeated(lambda: updater.update(updater.objective, x, y, noise, Stopwatch(device)))

    def rival(self, objective: str, compiled: bool = False) -> Side:
        setup, options = self.setup, OBJECTIVES[objective]
        if compiled:
            update = setup.update_of(setup.network, partial(frozen_attack, **options), compiler=setup.compiler)
        else:
            update = setup.update_of(setup.network, partial(published_attack, **options))
        return self.repeated(captured(update, calls=1) if setup.on_gpu else update)

    def case(self, op: str, mask: str, sides: dict[str, Side], rounds: int = 5) -> Case:
        return self.setup.case(op, mask, sides, rounds, warmup=2)

    def title(self, objective: str) -> str:
        return f"captured updates ({UPDATES[self.setup.device]}), {NAMES[objective]}"

    def dense(self, objective: str, compiled: bool = False) -> Case:
        rival = "compile" if compiled else "careful"
        sides = {"ours": self.ours(objective), rival: self.rival(objective, compiled)}
        return self.case(self.title(objective), "dense", sides)

    def masked(self, objective: str, block: tuple[int, ...], density: float) -> Case:
        sides = {"ours": self.ours(objective, self.setup.masked(block, density)), "ours_dense": self.ours(objective)}
        return self.case(self.title(objective), f"block {block}, density {density}", sides)

    def epoch(self) -> Case:
        """An epoch of N-FGSM, from uint8 images on the device to the sum of the losses."""
        setup, device = self.setup, self.setup.x.device
        batch = len(setup.x)
        images = 4 * batch if self.quick else IMAGES[setup.device]
        shape = models.find(setup.name).input_shape
        split = data.Split(
            torch.randint(256, (images, *shape), dtype=torch.uint8, device=device),
            torch.randint(10, (images,), device=device),
        )
        batches = data.Batches(split, batch, augment=True)
        model = copy.deepcopy(setup.network)
        run = training.Training(model, batches, config_of("n-fgsm", setup.on_gpu)).epochs()
        sides = {"ours": lambda: next(run), "careful": self.careful_epoch(data.Batches(split, batch, augment=True))}
        return self.case(f"captured epoch of {images:,} images, N-FGSM", "dense", sides, rounds=2)

    def careful_epoch(self, batches: data.Batches) -> Side:
        """The published update; each whole batch is copied into the same memory, and the smaller last one left out."""
        setup, numbers = self.setup, count()
        update = Update(setup.network, partial(published_attack, **NFGSM), setup.x, setup.y, setup.on_gpu)
        x, y = update.x, update.y
        call = captured(update, calls=1) if setup.on_gpu else update
        total = torch.zeros((), dtype=torch.float64, device=x.device)

        def epoch() -> Tensor:
            batches.set_epoch(next(numbers))
            total.zero_()
            for images, labels in batches:
                if len(labels) == len(y):
                    x.copy_(images)
                    y.copy_(labels)
                    total.add_(call().detach())  # type: ignore[attr-defined]
            return total

        return epoch


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Cases without a compiled side come first, since compiling may exceed a time limit."""
    updates = Updates(device, quick)
    for objective in OBJECTIVES:
        yield updates.dense(objective)
    yield updates.epoch()
    if device == "cuda":
        for objective in OBJECTIVES:
            for block, density in MASKS:
                yield updates.masked(objective, block, density)
    for objective in OBJECTIVES:
        yield updates.dense(objective, compiled=True)


main = partial(harness.main, cases, __doc__, devices=("cpu", "cuda"))


updates_of = lru_cache(maxsize=1)(Updates)


@pytest.mark.parametrize("side", ["ours", "careful"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_update(timed, quick, objective, side):
    timed(updates_of(quick=quick).dense(objective), side)


def test_masked_update(timed, quick):
    timed(updates_of(quick=quick).masked("n-fgsm", (4, 4), 0.2), "ours")


def test_compiled_update(timed, quick):
    timed(updates_of(quick=quick).dense("n-fgsm", compiled=True), "compile")


@pytest.mark.parametrize("side", ["ours", "careful"])
def test_epoch(timed, quick, side):
    timed(updates_of(quick=quick).epoch(), side)


if __name__ == "__main__":
    main()
