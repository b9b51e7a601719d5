"""The numbers of runs that tables and figures show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Literal

from sparse_adv.runs import Cost, Density, EpochRecord, Run, SearchResult, settings
from sparse_adv.runs import best as best_epoch

Unit = Literal["seconds", "macs"]
UNITS: tuple[Unit, ...] = ("seconds", "macs")
ACCURACY_SETTINGS = ("data.data", "data.limit", "data.validation", "train.eps", "train.norm", "train.evaluation_steps")
"""Settings that decide the images and the attack with which an accuracy is measured."""


def amount(cost: Cost, unit: Unit) -> float:
    """Return the seconds or the MACs of a cost.

    Examples:
        >>> amount(Cost(seconds=2.5, macs=10), "macs")
        10
    """
    return cost.seconds if unit == "seconds" else cost.macs


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the names of runs; equal names get as many last parts of their folders as needed to tell them apart."""
    names = [" ".join(run.name.split()) for run in runs]
    paths = [run.folder.resolve().parts for run in runs]

    def ending(i: int) -> str:
        others = [paths[j] for j in range(len(runs)) if j != i and names[j] == names[i]]
        parts = next((n for n in range(1, len(paths[i])) if all(path[-n:] != paths[i][-n:] for path in others)), 0)
        return "/".join(paths[i][-parts:])

    repeated = Counter(names)
    return [f"{name} ({ending(i)})" if repeated[name] > 1 else name for i, name in enumerate(names)]


def compared(runs: Sequence[Run]) -> list[Run]:
    """Return the runs whose accuracies are compared: the training runs, or the searches if there are no training runs.

    A search is part of the cost of the runs that train its ticket.
    """
    return [run for run in runs if run.info.kind == "train"] or list(runs)


def differences(runs: Sequence[Run]) -> str:
    """Return a sentence on the settings that give the accuracies of compared runs different meanings; "" if there are
    none.

    Nothing is known about the images of a run from Python.
    """
    known = [settings(run.info) for run in compared(runs)]
    values = {key: list(dict.fromkeys(each[key] for each in known if key in each)) for key in ACCURACY_SETTINGS}
    listed = [f"{key} ({', '.join(map(_text, found))})" for key, found in values.items() if len(found) > 1]
    return f"The runs differ in {' and '.join(listed)}, so their accuracies are not comparable." if listed else ""


def reference(runs: Sequence[Run]) -> Run:
    """Return the run that ratios refer to: the first dense one, else the first.

    A run with a method does not count as dense, even while it has yet to prune.
    """
    return next((run for run in runs if density(run).weights == 1 and run.info.method is None), runs[0])


def density(run: Run) -> Density:
    """Return the densities of a run: those of the ticket of a finished search, else of the best epoch.

    Without a best epoch they are those of the last epoch; without epochs, those with which the run begins.
    """
    if isinstance(run.result, SearchResult):
        return run.result.density
    record = best(run) or next(reversed(run.records), None)
    return (record.density if record else None) or run.info.density


def total(run: Run) -> Cost:
    """Return the cost so far: of the search before the run, attacks and updates, but not evaluations."""
    if run.result is not None:
        return run.result.total
    return run.records[-1].total if run.records else run.info.before


def seconds_per_epoch(run: Run) -> float | None:
    """Return the median over epochs of the seconds of attack and update; None without epochs."""
    return median((record.attack + record.update).seconds for record in run.records) if run.records else None


def undone(run: Run) -> int:
    """Return the number of epochs that had to be repeated."""
    return sum(record.undone_accuracy is not None for record in run.records)


def phase_costs(run: Run) -> dict[str, Cost]:
    """Return the cost of each phase; "search" and "undone" (attempts at epochs) only if they cost something."""
    attack, update, evaluation = (
        sum((cost(record) for record in run.records), Cost())
        for cost in (lambda record: record.attack, lambda record: record.update, lambda record: record.evaluation)
    )
    phases = {"search": run.info.before, "attack": attack, "update": update}
    if undone(run):
        # An epoch's record has the cost of its last attempt; the total has the cost of all attempts.
        rest, done = total(run), sum(phases.values(), Cost())
        phases["undone"] = Cost(max(0.0, rest.seconds - done.seconds), max(0, rest.macs - done.macs))
    if phases["search"] == Cost():
        del phases["search"]
    return phases | {"evaluation": evaluation}


def evaluated(run: Run) -> list[EpochRecord]:
    """Return the records of the epochs that were evaluated."""
    return [record for record in run.records if record.robust_accuracy is not None]


def best(run: Run) -> EpochRecord | None:
    """Return the epoch whose weights count as the run's best, see `runs.best`; None if none was evaluated."""
    return best_epoch(evaluated(run), run.info.train)


def first_to_reach(run: Run, level: float) -> EpochRecord | None:
    """Return the first record that may be the result and has a robust validation accuracy of at least `level`."""
    reached = (record for record in evaluated(run) if record.may_be_result and robust_accuracy(record) >= level)
    return next(reached, None)


def robust_accuracy(record: EpochRecord) -> float:
    """Return the robust validation accuracy of an epoch that was evaluated."""
    assert record.robust_accuracy is not None
    return record.robust_accuracy


def common_level(runs: Sequence[Run]) -> float | None:
    """Return the highest robust validation accuracy that each run reached; None if none was evaluated.

    Runs that were never evaluated do not count, nor do runs trained without attacks, unless there are no others.
    """
    highest = [(run.info.train.objective, robust_accuracy(record)) for run in runs if (record := best(run))]
    attacked = [accuracy for objective, accuracy in highest if objective != "natural"]
    return min(attacked or [accuracy for _, accuracy in highest], default=None)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
