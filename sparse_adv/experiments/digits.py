"""The demo: on real handwritten digits, does a ticket found by cheap training pay for its search?

One search and three runs of one recipe: the ticket, the same mask re-initialised, and the dense network.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from torch import nn

from sparse_adv import data, masks, models, report, tickets, training
from sparse_adv.files import write_text
from sparse_adv.nn import sparsify
from sparse_adv.runs import append_record
from sparse_adv.training import Recipe, Record

log = logging.getLogger(__name__)

ARCH = "digits_cnn"
TRAINING = Recipe(objective="pgd", epochs=12, batch_size=64, lr=0.2, warmup_epochs=3, eps=0.2, alpha=0.05, steps=10)
SEARCH = replace(TRAINING, objective="fgsm", epochs=6, lr=0.05, warmup_epochs=0, drops=())
TEST_STEPS = 20
DENSE = {"weights": 1.0, "multiply_adds": 1.0}


@dataclass
class Run:
    """One network in training: what it cost before its first epoch, and all that is known of it."""

    name: str
    before: float
    facts: dict[str, float]
    records: list[Record] = field(default_factory=list)

    @property
    def seconds_per_epoch(self) -> float:
        """The median, which a disturbed epoch does not move."""
        return median(record["attack_seconds"] + record["update_seconds"] for record in self.records)

    @property
    def seconds(self) -> float:
        return self.before + self.records[-1]["seconds"]

    def seconds_to(self, level: float) -> float:
        """What it took to reach a robust validation accuracy; infinity if it never did."""
        record = report.first_to_reach(self.records, "robust_accuracy", level)
        return self.before + record["seconds"] if record else math.inf


def run(
    out: Path,
    *,
    epochs: int = TRAINING.epochs,
    search_epochs: int = SEARCH.epochs,
    density: float = 0.1,
    block: Sequence[int] = (1, 1),
    seed: int = 0,
) -> str:
    """Search, train the ticket and its controls, write table, picture, ticket and epochs into a folder.

    Args:
        out: the folder; files of an earlier demo there are replaced.
        epochs: of each run's PGD adversarial training.
        search_epochs: of the dense FGSM training that finds the mask.
        density: kept share of the weights.
        block: see `masks.prune`.
        seed: of the split, the initial weights, the order of the images and the attacks.

    Returns:
        What was found, in a few sentences made of the numbers.
    """
    recipe = replace(TRAINING, epochs=epochs, seed=seed)
    cheap = replace(SEARCH, epochs=search_epochs, evaluate_every=search_epochs, seed=seed)
    dataset = data.digits(seed=seed)
    journal = out / "epochs.jsonl"
    write_text(journal, "")

    model = models.build(ARCH, seed)
    search = Run("search (dense, FGSM)", 0.0, DENSE)
    with _Diary(journal, search_epochs) as diary:
        ticket = tickets.search(
            model, dataset, cheap, density=density, block=block, on_epoch=lambda record: diary.note(search, record)
        )
    found = ticket.provenance | {"arch": ARCH, "data": "digits", "seed": seed}
    masks.save_ticket(out / "ticket.safetensors", ticket.masks, ticket.state_dict, found)

    cost = ticket.provenance["seconds"]
    kept = {
        "weights": masks.density(ticket.masks),
        "multiply_adds": masks.multiply_add_density(model, ticket.masks, (1, *models.find(ARCH).input_shape)),
    }
    control = models.build(ARCH, seed + 1)
    networks = [
        (Run("ticket", cost, dict(kept)), sparsify(model, ticket.masks)),
        (Run("same mask, re-initialised", cost, dict(kept)), sparsify(control, ticket.masks)),
        (Run("dense", 0.0, dict(DENSE)), models.build(ARCH, seed)),
    ]
    runs = [run for run, _ in networks]
    with _Diary(journal, epochs * len(runs)) as diary:
        # In turns, so that whatever else the machine does slows all of them alike.
        for records in zip(*(training.epochs(network, dataset, recipe) for _, network in networks), strict=True):
            for run, record in zip(runs, records, strict=True):
                diary.note(run, record)
    for run, network in networks:
        run.facts |= _test(network, dataset.test, recipe)

    table = _table([search, *runs])
    write_text(out / "table.md", table)
    pictures = _picture(out / "robust_accuracy", runs)
    files = ", ".join(str(file) for file in [out / "table.md", *pictures, out / "ticket.safetensors", journal])
    return "\n".join([table, *findings(runs, len(dataset.test.labels)), f"Files: {files}"])


class _Diary:
    """Keeps what each epoch gave: a line of the journal, and a step of the progress bar or a log line."""

    def __init__(self, journal: Path, epochs: int) -> None:
        self.journal, self.epochs = journal, epochs

    def __enter__(self) -> _Diary:
        from tqdm import tqdm

        self.bar = tqdm(total=self.epochs, unit="epoch", disable=None)  # None: only on a terminal
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def note(self, run: Run, record: Record) -> None:
        run.records.append(record)
        append_record(self.journal, {"run": run.name, **record, "total_seconds": run.seconds, **run.facts})
        told = f"{run.name}: epoch {record['epoch']}"
        if "robust_accuracy" in record:
            told += f", robust {record['robust_accuracy']:.1%}"
        self.bar.set_description(told, refresh=False)
        self.bar.update()
        if self.bar.disable:
            log.info("%s, %.1f s", told, run.seconds)


def _test(network: nn.Module, images: data.Split, recipe: Recipe) -> dict[str, float]:
    """The one look at the test images: the last weights, a stronger attack than the training's."""
    robust = training.robust_accuracy(
        network, images, eps=recipe.eps, alpha=recipe.alpha, steps=TEST_STEPS, seed=recipe.seed
    )
    return {"test_clean": training.clean_accuracy(network, images), "test_robust": robust}


def _table(runs: Sequence[Run]) -> str:
    columns = {
        "run": "{name}",
        "weights kept": "{weights:.3f}",
        "multiply-adds kept": "{multiply_adds:.3f}",
        "s before": "{before:.1f}",
        "s/epoch": "{per_epoch:.2f}",
        "s in all": "{seconds:.1f}",
        "validation clean": "{clean_accuracy:.1%}",
        "validation PGD-10": "{robust_accuracy:.1%}",
        "test clean": "{test_clean:.1%}",
        f"test PGD-{TEST_STEPS}": "{test_robust:.1%}",
    }
    rows = [
        run.facts
        | run.records[-1]
        | {"name": run.name, "before": run.before, "per_epoch": run.seconds_per_epoch, "seconds": run.seconds}
        for run in runs
    ]
    return report.table(rows, columns)


def _picture(path: Path, runs: Sequence[Run]) -> list[Path]:
    lines = {
        run.name: [(run.before + record["seconds"], record["robust_accuracy"]) for record in run.records]
        for run in runs
    }
    return report.curves(
        path,
        lines,
        title=f"Digits, linf eps {TRAINING.eps}: robust validation accuracy against training time",
        x="seconds of attack and update, ticket search included",
        y=f"accuracy under PGD-{TRAINING.steps}",
    )


def findings(runs: Sequence[Run], test_images: int) -> list[str]:
    """Who was fastest, who ended best, what an epoch costs: computed, whatever it turns out to be.

    The level for "fastest" is the highest robust validation accuracy that every run reached.
    """
    level = min(max(record["robust_accuracy"] for record in run.records) for run in runs)
    reached = {run.name: run.seconds_to(level) for run in runs}
    times = ", ".join(f"{name} after {reached[name]:.1f} s" for name in sorted(reached, key=reached.__getitem__))
    accuracies = {run.name: run.facts["test_robust"] for run in runs}
    best = max(accuracies.values())
    noise = 2 * math.sqrt(2 * best * (1 - best) / test_images)
    (dense,) = (run for run in runs if run.facts["weights"] == 1)
    costs = ", ".join(
        f"{run.name} {run.seconds_per_epoch:.2f} s ({dense.seconds_per_epoch / run.seconds_per_epoch:.2f}x)"
        for run in runs
    )
    return [
        f"First to {level:.1%} robust validation accuracy, search included: {times}.",
        f"Robust test accuracy (PGD-{TEST_STEPS}): {', '.join(f'{name} {x:.1%}' for name, x in accuracies.items())}. "
        f"With one seed and {test_images} images, differences under {100 * noise:.0f} points may be chance.",
        f"Seconds per epoch of attack and update, and speed-up over dense: {costs}.",
    ]
