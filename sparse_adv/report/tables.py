"""Markdown tables of run folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparse_adv.report import measures
from sparse_adv.report.measures import Record
from sparse_adv.runs import Run

_ESCAPED = str.maketrans({"|": r"\|", "<": r"\<", "\n": " ", "\r": " "})


def escaped(text: str) -> str:
    """Text that neither ends a table's cell nor begins a tag."""
    return text.translate(_ESCAPED)


def table(rows: Sequence[Record], columns: Mapping[str, str]) -> str:
    """A Markdown table.

    Args:
        rows: one record per line; what a record lacks, or has as None, stays empty.
        columns: heading -> format of the cell, with the record's fields by name: `"{seconds:.1f}"`.
    """
    cells = [[escaped(heading) for heading in columns]]
    cells += [[_cell(row, form) for form in columns.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _cell(row: Record, form: str) -> str:
    try:
        return escaped(form.format_map({key: value for key, value in row.items() if value is not None}))
    except KeyError:
        return ""


def count(number: float) -> str:
    """Three digits and an SI prefix: 1.23 T."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5 or prefix == "E":
            break
        number /= 1000
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits if prefix else 0}f} {prefix}".rstrip()


def summary(runs: Sequence[Run]) -> str:
    """A table with a row per run: how it was made, what it kept, what it cost, what came of it.

    Seconds and multiply-adds "in all" are of ticket search, attacks and updates; evaluations are not counted.
    """
    tests = list(dict.fromkeys(attack for run in runs for attack in _tests(run)))
    columns = {
        "run": "{name}",
        "made by": "{made_by}",
        "weights kept": "{weights:.3f}",
        "multiply-adds kept": "{multiply_adds:.3f}",
        "s before": "{before:.1f}",
        "s/epoch": "{per_epoch:.2f}",
        "s in all": "{seconds:.1f}",
        "multiply-adds in all": "{work}",
        "best robust": "{best_robust:.1%}",
        "clean then": "{best_clean:.1%}",
        "at epoch": "{best_epoch}",
        "last robust": "{last_robust:.1%}",
        **{f"test {attack}": f"{{test{i}:.1%}}" for i, attack in enumerate(tests)},
        "status": "{status}",
    }
    rows = [
        _outcome(run)
        | {f"test{i}": _tests(run).get(attack) for i, attack in enumerate(tests)}
        | {
            "name": label,
            "made_by": ", ".join(str(part) for key in ("command", "objective") if (part := measures.setting(run, key))),
            "weights": measures.density(run, "weights"),
            "multiply_adds": measures.density(run, "multiply_adds"),
            "before": measures.before(run, "seconds"),
            "per_epoch": measures.seconds_per_epoch(run),
            "seconds": measures.total(run, "seconds"),
            "work": count(measures.total(run, "multiply_adds")),
            "status": _status(run),
        }
        for run, label in zip(runs, measures.labels(runs), strict=True)
    ]
    return table(rows, columns)


def _tests(run: Run) -> dict[str, float]:
    return (run.result or {}).get("test") or {}


def _outcome(run: Run) -> dict[str, Any]:
    best = measures.best(run)
    if best is None:
        return {}
    return {
        "best_robust": best["robust_accuracy"],
        "best_clean": best.get("clean_accuracy"),
        "best_epoch": best.get("epoch"),
        "last_robust": measures.evaluated(run)[-1]["robust_accuracy"],
    }


def _status(run: Run) -> str:
    wanted = measures.setting(run, "epochs")
    reached = f"epoch {run.records[-1].get('epoch', len(run.records))}" if run.records else "epoch 0"
    told = "finished" if run.result is not None else f"{reached} of {wanted}" if wanted else reached
    undone = measures.undone(run)
    return f"{told}, {undone} undone" if undone else told


def time_to(runs: Sequence[Run], level: float | None = None) -> str:
    """What it took each run until its robust validation accuracy first reached a level: a sentence and a table.

    Seconds and multiply-adds include the ticket search; each ratio is the run's number / that of the first dense run,
    or of the first run if none is dense. Searches are left out, as the runs built on them include them.

    Args:
        runs: finished or not.
        level: a share in [0, 1]; None takes the highest that all evaluated runs trained with attacks reached.

    Raises:
        ValueError: if the level is no share.
    """
    if level is not None and not 0 <= level <= 1:
        raise ValueError(f"level must be a share in [0, 1], got {level}")
    chosen = measures.compared(runs)
    common = measures.common_level(chosen)
    if common is None:
        return "No run has a robust validation accuracy yet.\n"
    wanted = common if level is None else level
    names = {id(run): label for run, label in zip(runs, measures.labels(runs), strict=True)}
    reached = [measures.first_to_reach(measures.evaluated(run), "robust_accuracy", wanted) for run in chosen]
    origin = measures.reference(chosen)
    base = reached[chosen.index(origin)] or {}
    rows = []
    for run, record in zip(chosen, reached, strict=True):
        row: dict[str, Any] = {"name": names[id(run)]}
        if record is None:
            row["seconds"] = "not reached" if measures.evaluated(run) else "not evaluated"
        else:
            row |= {
                f"{field}_ratio": record[field] / base[field] for field in ("epoch", *measures.UNITS) if base.get(field)
            }
            row |= {
                "seconds": f"{record['seconds']:.1f}",
                "epoch": record["epoch"],
                "work": count(record["multiply_adds"]),
            }
        rows.append(row)
    columns = {
        "run": "{name}",
        "s": "{seconds}",
        "ratio of s": "{seconds_ratio:.2f}",
        "epochs": "{epoch}",
        "ratio of epochs": "{epoch_ratio:.2f}",
        "multiply-adds": "{work}",
        "ratio of multiply-adds": "{multiply_adds_ratio:.2f}",
    }
    why = ", the highest that all runs trained with attacks reached" if level is None else ""
    against = escaped(names[id(origin)])
    told = (
        f"Until the first evaluation with a robust validation accuracy of at least {wanted:.1%}{why}. Seconds and "
        "multiply-adds include the ticket search, epochs do not. "
        + (f"Ratios are to {against}." if base else f"There are no ratios, as {against} never reached it.")
    )
    return f"{told}\n\n{table(rows, columns)}"


def phases(runs: Sequence[Run]) -> str:
    """A table of what each run spent its time and its multiply-adds on, and how many it did in a second."""
    rows = []
    for run, label in zip(runs, measures.labels(runs), strict=True):
        seconds, work = (measures.phase_costs(run, unit) for unit in measures.UNITS)
        for phase in {**seconds, **work}:
            time, adds = seconds.get(phase, 0), work.get(phase, 0)
            rows.append(
                {
                    "name": label,
                    "phase": phase,
                    "seconds": time,
                    "time_share": _share(time, seconds),
                    "work": count(adds),
                    "work_share": _share(adds, work),
                    "rate": count(adds / time) if time else None,
                }
            )
    columns = {
        "run": "{name}",
        "phase": "{phase}",
        "s": "{seconds:.1f}",
        "share of s": "{time_share:.1%}",
        "multiply-adds": "{work}",
        "share of multiply-adds": "{work_share:.1%}",
        "multiply-adds/s": "{rate}",
    }
    return table(rows, columns)


def _share(part: float, costs: Mapping[str, float]) -> float | None:
    whole = sum(costs.values())
    return part / whole if whole else None
