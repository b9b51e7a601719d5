"""The demo: on real handwritten digits, does a ticket found by cheap training pay for its search?

One search and three runs of one recipe: the ticket, the same mask re-initialised, and the dense network. Each has a run
folder, as the commands `search` and `train` make them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

from sparse_adv import data, masks, models, report, runs, tickets
from sparse_adv.runs import Record, Run
from sparse_adv.tickets import PruneConfig
from sparse_adv.training import TrainConfig, Training, conclude

log = logging.getLogger(__name__)

ARCH = "digits_cnn"
BATCH_SIZE = 64
TRAINING = TrainConfig(objective="pgd", epochs=12, lr=0.2, warmup_epochs=3, eps=0.2)
SEARCH = replace(TRAINING, objective="fgsm-rs", epochs=6, lr=0.05, warmup_epochs=0, schedule="constant")
DENSE = {"weights": 1.0, "multiply_adds": 1.0}
NAMES = {"ticket": "ticket", "reinitialised": "same mask, re-initialised", "dense": "dense"}


def run(
    out: Path,
    *,
    epochs: int = TRAINING.epochs,
    search_epochs: int = SEARCH.epochs,
    density: float = 0.1,
    block: Sequence[int] = (1, 1),
    seed: int = 0,
) -> str:
    """Search, train the ticket and its controls, and report.

    Args:
        out: the folder; a demo that was stopped there continues, one that was finished is reported again.
        epochs: of each run's PGD adversarial training.
        search_epochs: of the dense FGSM training that finds the mask.
        density: kept share of the weights.
        block: see `masks.prune`.
        seed: of the split, the initial weights, the order of the images and the attacks.

    Returns:
        What was found: tables, and a few sentences made of the numbers.
    """
    recipe = replace(TRAINING, epochs=epochs, seed=seed)
    cheap = replace(SEARCH, epochs=search_epochs, evaluate_every=search_epochs, seed=seed)
    rule = PruneConfig(density=density, block=tuple(block), linear=False)
    dataset = data.load("digits", validation=300, seed=seed)
    settings = {"arch": ARCH, "data": "digits", "seed": seed}

    model = models.build(ARCH, seed)
    folder = out / "search"
    runs.begin(
        folder, settings | {"command": "search", "recipe": asdict(cheap), "rule": asdict(rule.named())}, densities=DENSE
    )
    ticket = tickets.search(
        model,
        data.Batches(dataset.train, BATCH_SIZE, seed=seed),
        cheap,
        rule,
        validation=dataset.validation,
        folder=folder,
        about=settings,
        on_epoch=lambda record: _tell("search", record),
    )
    cost = {"seconds": ticket.provenance["seconds"], "multiply_adds": ticket.provenance["multiply_adds"]}
    runs.write_json(folder / runs.RESULT, cost | {"checks": ticket.provenance["checks"]})

    shape = (1, *dataset.input_shape)
    kept = {
        "weights": masks.density(ticket.masks),
        "multiply_adds": masks.multiply_add_density(model, ticket.masks, shape),
    }
    networks = {
        "ticket": tickets.restore(model, ticket, shape),
        "reinitialised": tickets.restore(models.build(ARCH, seed + 1), ticket, shape, weights=False),
        "dense": models.build(ARCH, seed),
    }
    begun = {}
    for key, network in networks.items():
        before, densities = (dict.fromkeys(cost, 0), DENSE) if key == "dense" else (cost, kept)
        runs.begin(
            out / key,
            settings | {"command": "train", "recipe": asdict(recipe), "rule": asdict(rule.named()), "start": key},
            name=NAMES[key],
            densities=densities,
            before=before,
        )
        begun[key] = Training(
            network,
            data.Batches(dataset.train, BATCH_SIZE, seed=seed),
            recipe,
            validation=dataset.validation,
            folder=out / key,
            before=(before["seconds"], before["multiply_adds"]),
        )
    _train_in_turns(begun)
    for key, training in begun.items():
        facts = {"checks": tickets.pruned_weights_are_zero(training.model, {} if key == "dense" else ticket.masks)}
        conclude(training.model, out / key, training.records, recipe, dataset.test, facts)

    folders = [folder, *(out / key for key in networks)]
    report.report(folders, out)
    found = [runs.read(folder) for folder in folders]
    return "\n".join(
        [
            report.summary(found),
            report.time_to(found),
            *findings(found[1:], len(dataset.test.labels)),
            f"Tables, plots and the data behind them: {out / 'report.md'}, {out / 'report.csv'}",
        ]
    )


def _train_in_turns(begun: dict[str, Training]) -> None:
    """Epoch by epoch, so that whatever else the machine does slows all of them alike."""
    for records in zip(*(training.epochs() for training in begun.values()), strict=True):
        for key, record in zip(begun, records, strict=True):
            _tell(NAMES[key], record)


def _tell(name: str, record: Record) -> None:
    robust = f", robust {record['robust_accuracy']:.1%}" if "robust_accuracy" in record else ""
    log.info("%s: epoch %d%s, %.1f s", name, record["epoch"], robust, record["seconds"])


def findings(compared: Sequence[Run], test_images: int) -> list[str]:
    """What an epoch costs, and how far the test accuracies can be trusted: computed, whatever it turns out to be."""
    costs = {
        run.name: median(record["attack_seconds"] + record["update_seconds"] for record in run.records)
        for run in compared
    }
    dense = next(costs[run.name] for run in compared if run.facts["densities"]["weights"] == 1)
    told = ", ".join(f"{name} {cost:.2f} s ({dense / cost:.2f}x)" for name, cost in costs.items())
    best = max((run.result or {})["test"]["pgd-20"] for run in compared)
    noise = 2 * math.sqrt(2 * best * (1 - best) / test_images)
    return [
        f"Seconds per epoch of attack and update, and speed-up over dense: {told}.",
        f"With one seed and {test_images} test images, differences under {100 * noise:.0f} points may be chance.",
    ]
