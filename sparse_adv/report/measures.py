"""What tables and pictures say of a run: numbers out of its facts, records and result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from sparse_adv.runs import Run

Record = Mapping[str, Any]

UNITS = ("seconds", "multiply_adds")
"""What a run costs; each is counted from 0 at the beginning of its ticket search."""


def first_to_reach(records: Sequence[Record], field: str, level: float) -> Record | None:
    """The first record whose field is at least this level, or None."""
    return next((record for record in records if record.get(field, float("-inf")) >= level), None)


def labels(runs: Sequence[Run]) -> list[str]:
    """The runs' names; where several have one name, with as much of their folders as tells them apart."""
    names = [" ".join(run.name.split()) for run in runs]
    paths = [run.folder.resolve().parts for run in runs]

    def tail(i: int) -> str:
        rivals = [paths[j] for j in range(len(runs)) if j != i and names[j] == names[i]]
        count = next((n for n in range(1, len(paths[i])) if all(p[-n:] != paths[i][-n:] for p in rivals)), 0)
        return "/".join(paths[i][-count:])

    repeated = Counter(names)
    return [f"{name} ({tail(i)})" if repeated[name] > 1 else name for i, name in enumerate(names)]


def setting(run: Run, key: str) -> Any:
    """A setting, of the command or of its recipe; None where neither has it."""
    settings = run.facts.get("settings") or {}
    return settings.get(key, (settings.get("recipe") or {}).get(key))


def is_search(run: Run) -> bool:
    """Whether the run looked for a ticket; what that cost is part of the runs that train the ticket."""
    return setting(run, "command") == "search"


def compared(runs: Sequence[Run]) -> list[Run]:
    """The runs whose accuracies are compared: the training runs, or the searches if there is nothing else."""
    return [run for run in runs if not is_search(run)] or list(runs)


def density(run: Run, of: str) -> float | None:
    """The kept share of "weights" or "multiply_adds"."""
    return (run.facts.get("densities") or {}).get(of)


def reference(runs: Sequence[Run]) -> Run:
    """The run that others are compared with: the first dense one, else the first."""
    return next((run for run in runs if density(run, "weights") == 1), runs[0])


def before(run: Run, unit: str) -> float:
    """Seconds or multiply-adds of the ticket search that the run builds on."""
    return (run.facts.get("before") or {}).get(unit) or 0


def total(run: Run, unit: str) -> float:
    """Seconds or multiply-adds so far: of the search before, the attacks and the updates; evaluations are free."""
    if run.result and unit in run.result:
        return run.result[unit]
    return run.records[-1].get(unit, 0) if run.records else before(run, unit)


def seconds_per_epoch(run: Run) -> float | None:
    """Of attack and update; the median, which a disturbed epoch does not move."""
    spent = [record.get("attack_seconds", 0) + record.get("update_seconds", 0) for record in run.records]
    return median(spent) if spent else None


def undone(run: Run) -> int:
    """The number of epochs that had to be trained again."""
    return sum(bool(record.get("rolled_back")) for record in run.records)


def phase_costs(run: Run, unit: str) -> dict[str, float]:
    """Seconds or multiply-adds of each phase; "search" and "undone" epochs only where there are any."""
    attack, update, evaluation = (
        sum(record.get(f"{phase}_{unit}", 0) for record in run.records) for phase in ("attack", "update", "evaluation")
    )
    costs = {"search": before(run, unit), "attack": attack, "update": update}
    if undone(run):
        # The records hold what each epoch cost in the end; the totals hold its undone attempts too.
        costs["undone"] = max(0.0, total(run, unit) - sum(costs.values()))
    if not costs["search"]:
        del costs["search"]
    return costs | {"evaluation": evaluation}


def evaluated(run: Run, field: str = "robust_accuracy") -> list[Record]:
    """The records that have an accuracy."""
    return [record for record in run.records if record.get(field) is not None]


def best(run: Run) -> Record | None:
    """The first record of the highest robust validation accuracy."""
    return max(evaluated(run), key=lambda record: record["robust_accuracy"], default=None)


def common_level(runs: Sequence[Run]) -> float | None:
    """The highest robust validation accuracy that each run reached, but for those never evaluated or attacked."""
    attacked = [run for run in runs if setting(run, "objective") != "natural"] or runs
    return min((record["robust_accuracy"] for run in attacked if (record := best(run))), default=None)


def flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested facts, named by their path: "machine.cpu"."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
