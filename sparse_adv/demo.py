"""The demo, on real handwritten digits: does a ticket from cheap training save more time than its search costs?

It makes one search and trains three networks with one configuration: the ticket, the ticket's masks with
re-initialised weights, and the dense network. Each has a run folder like those of the commands `search` and `train`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from sparse_adv import experiment, report, runs
from sparse_adv.config import DataConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.experiment import SearchRun, TrainRun
from sparse_adv.runs import EpochRecord, Run, TrainResult

log = logging.getLogger(__name__)

TRAINING = TrainConfig("pgd", epochs=12, lr=0.2, warmup_epochs=3, eps=0.2)
SEARCH = replace(TRAINING, objective="fgsm-rs", epochs=6, lr=0.05, warmup_epochs=0, schedule="constant")
IMAGES = DataConfig("digits", validation=300, batch_size=64)
NETWORK = NetworkConfig("digits_cnn")


def run(
    out: Path,
    *,
    epochs: int = TRAINING.epochs,
    search_epochs: int = SEARCH.epochs,
    density: float = 0.1,
    block: Sequence[int] = (1, 1),
    seed: int = 0,
) -> str:
    """Search a ticket, train it and its controls, and report.

    Args:
        out: the folder. A demo that was stopped there continues; a finished one is only reported again.
        epochs: of the PGD adversarial training of each network.
        search_epochs: of the dense FGSM training that finds the mask.
        density: fraction of the weights that the ticket keeps.
        block: see `masks.prune`.
        seed: for validation images, initial weights, order of the images and attacks.

    Returns:
        Tables and sentences with the results.
    """
    train = replace(TRAINING, epochs=epochs, warmup_epochs=min(TRAINING.warmup_epochs, epochs), seed=seed)
    search = replace(SEARCH, epochs=search_epochs, evaluate_every=search_epochs, seed=seed)
    prune = PruneConfig(density=density, block=tuple(block), linear=False)
    cpu = torch.device("cpu")
    dataset = experiment.load_data(IMAGES, seed, cpu)
    searching = SearchRun(out / "search", search, prune, IMAGES, NETWORK, dataset, cpu)
    searching.run(on_epoch=lambda record: _log_epoch("search", record))

    path = out / "search" / runs.TICKET
    controls = {
        "ticket": ("ticket", experiment.ticket_to_train(path)),
        "reinitialised": ("same mask, re-initialised", experiment.ticket_to_train(path, reinit=True)),
        "dense": ("dense", None),
    }
    trainings = {
        name: TrainRun(out / folder, train, IMAGES, NETWORK, dataset, cpu, ticket=ticket, name=name)
        for folder, (name, ticket) in controls.items()
    }
    # The networks take turns after each epoch, so that other load on the machine slows all of them alike.
    for records in zip(*(training.epochs() for training in trainings.values()), strict=True):
        for name, record in zip(trainings, records, strict=True):
            _log_epoch(name, record)
    for training in trainings.values():
        training.finish()

    folders = [out / "search", *(out / folder for folder in controls)]
    report.report(folders, out)
    finished = [runs.read(folder) for folder in folders]
    return "\n".join(
        [
            report.summary(finished),
            report.time_to(finished),
            *findings(finished[1:], len(dataset.test.labels)),
            f"Tables, plots and the data behind them: {out / 'report.md'}, {out / 'report.csv'}",
        ]
    )


def findings(compared: Sequence[Run], test_images: int) -> list[str]:
    """Return sentences on the cost of an epoch and on the uncertainty of the test accuracies, from the runs' numbers.

    Args:
        compared: finished training runs, at least one of them dense.
        test_images: number of test images.
    """
    costs = {run.name: median((record.attack + record.update).seconds for record in run.records) for run in compared}
    dense = next(costs[run.name] for run in compared if run.info.density.weights == 1)
    times = ", ".join(f"{name} {cost:.2f} s ({dense / cost:.2f}x)" for name, cost in costs.items())
    best = max(run.result.test["pgd-20"] for run in compared if isinstance(run.result, TrainResult))
    noise = 2 * math.sqrt(2 * best * (1 - best) / test_images)
    return [
        f"Seconds per epoch of attack and update, and speed-up over dense: {times}.",
        f"With one seed and {test_images} test images, differences under {100 * noise:.0f} points may be chance.",
    ]


def _log_epoch(name: str, record: EpochRecord) -> None:
    robust = "" if record.robust_accuracy is None else f", robust {record.robust_accuracy:.1%}"
    log.info("%s: epoch %d%s, %.1f s", name, record.epoch, robust, record.total.seconds)
