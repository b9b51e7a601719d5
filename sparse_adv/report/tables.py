"""Markdown tables of runs."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_adv.report import measures
from sparse_adv.runs import EpochRecord, Run, TrainResult

_ESCAPED = str.maketrans({"|": r"\|", "<": r"\<", "\n": " ", "\r": " "})


def escaped(text: str) -> str:
    r"""Return text that neither ends a cell of a table nor begins an HTML tag.

    Examples:
        >>> print(escaped("a|b <c>"))
        a\|b \<c>
    """
    return text.translate(_ESCAPED)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns.

    Args:
        headings: of the columns.
        rows: the cells of each row, as many as there are headings.

    Returns:
        The lines of the table, each with its line break.

    Examples:
        >>> print(table(["run", "s"], [["dense", "12.3"], ["a", ""]]), end="")
        | run   | s    |
        | ----- | ---- |
        | dense | 12.3 |
        | a     |      |
    """
    cells = [[escaped(text) for text in line] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    return "".join(f"| {line} |\n" for line in lines)


def count(number: float) -> str:
    """Return a number with three digits and an SI prefix.

    Examples:
        >>> count(1.234e12), count(999.7), count(7)
        ('1.23 T', '1.00 k', '7')
    """
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 999.5 or prefix == "E":
            break
        number /= 1000
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits if prefix else 0}f} {prefix}".rstrip()


def summary(runs: Sequence[Run]) -> str:
    """Return a table with a row per run: how it was made, its densities, costs and accuracies.

    Total seconds and MACs are of ticket search, attacks and updates; evaluations are not counted. The densities of a
    finished search are those of its ticket. The densities and accuracies of a training run are those of its best epoch,
    whose weights are tested.

    Args:
        runs: run folders that `runs.read` has read, finished or not.

    Returns:
        A Markdown table.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparse_adv import runs
        >>> from sparse_adv.config import TrainConfig
        >>> folder = Path(tempfile.mkdtemp())
        >>> runs.begin(folder, runs.RunInfo("train", TrainConfig(epochs=3), name="dense"))
        >>> print(summary([runs.read(folder)]).splitlines()[2][:28])
        | dense | train, pgd | 1.000
    """
    attacks = list(dict.fromkeys(attack for run in runs for attack in _tests(run)))
    headings = [
        "run", "kind", "density", "MAC density", "search s", "s/epoch", "total s", "total MACs",
        "best robust", "its clean", "its epoch", "last robust", *(f"test {attack}" for attack in attacks), "status",
    ]  # fmt: skip
    rows = []
    for run, label in zip(runs, measures.labels(runs), strict=True):
        method = run.info.method
        objective = run.info.objective.name if run.info.objective else run.info.train.objective
        density = measures.density(run)
        best, evaluated, total = measures.best(run), measures.evaluated(run), measures.total(run)
        rows.append(
            [
                label,
                ", ".join([run.info.kind, objective, *([method.method] if method else [])]),
                f"{density.weights:.3f}",
                f"{density.macs:.3f}",
                f"{run.info.before.seconds:.1f}",
                _form(measures.seconds_per_epoch(run), ".2f"),
                f"{total.seconds:.1f}",
                count(total.macs),
                _form(best.robust_accuracy if best else None, ".1%"),
                _form(best.clean_accuracy if best else None, ".1%"),
                str(best.epoch) if best else "",
                _form(evaluated[-1].robust_accuracy if evaluated else None, ".1%"),
                *(_form(_tests(run).get(attack), ".1%") for attack in attacks),
                _status(run),
            ]
        )
    return table(headings, rows)


def time_to(runs: Sequence[Run], level: float | None = None) -> str:
    """Return a sentence and a table: the cost at which each run first reached a robust validation accuracy.

    Seconds and MACs include the ticket search. Ratios are to the first dense run, or to the first run if none is dense.
    Searches are left out, because the runs of their tickets include their cost. So are epochs after which a method has
    yet to prune.

    Args:
        runs: finished or not.
        level: robust validation accuracy in [0, 1]; None for the highest that all evaluated runs with adversarial
            training reached.

    Returns:
        Markdown: the sentence, an empty line and the table.

    Raises:
        ValueError: if the level is not in [0, 1].

    Examples:
        >>> time_to([])
        'No run has a robust validation accuracy yet.\\n'
    """
    if level is not None and not (isinstance(level, int | float) and 0 <= level <= 1):
        raise ValueError(f"level must be an accuracy in [0, 1], got {level!r}")
    shown = measures.compared(runs)
    common = measures.common_level(shown)
    if common is None:
        return "No run has a robust validation accuracy yet.\n"
    wanted = common if level is None else level
    label_of = {id(run): label for run, label in zip(runs, measures.labels(runs), strict=True)}
    reference = measures.reference(shown)
    base = measures.first_to_reach(reference, wanted)
    rows = [[label_of[id(run)], *_reached(run, measures.first_to_reach(run, wanted), base)] for run in shown]
    name = escaped(label_of[id(reference)])
    return (
        f"Until the first evaluation with a robust validation accuracy of at least {wanted:.1%}"
        + (", the highest that all runs trained with attacks reached" if level is None else "")
        + ". Seconds and MACs include the ticket search, epochs do not. "
        + (f"Ratios are to {name}." if base else f"There are no ratios, because {name} never reached it.")
        + "\n\n"
        + table(["run", "s", "ratio of s", "epochs", "ratio of epochs", "MACs", "ratio of MACs"], rows)
    )


def phases(runs: Sequence[Run]) -> str:
    """Return a table of the seconds and MACs of each phase of each run, and of the MACs per second.

    Args:
        runs: run folders that `runs.read` has read, finished or not.

    Returns:
        A Markdown table.

    Examples:
        >>> print(phases([]).splitlines()[0])
        | run | phase | s | share of s | MACs | share of MACs | MACs/s |
    """
    rows = []
    for run, label in zip(runs, measures.labels(runs), strict=True):
        costs = measures.phase_costs(run)
        seconds, macs = (sum(measures.amount(cost, unit) for cost in costs.values()) for unit in measures.UNITS)
        rows += [
            [
                label,
                phase,
                f"{cost.seconds:.1f}",
                _ratio(cost.seconds, seconds, ".1%"),
                count(cost.macs),
                _ratio(cost.macs, macs, ".1%"),
                count(cost.macs / cost.seconds) if cost.seconds else "",
            ]
            for phase, cost in costs.items()
        ]
    return table(["run", "phase", "s", "share of s", "MACs", "share of MACs", "MACs/s"], rows)


def _tests(run: Run) -> dict[str, float]:
    return run.result.test if isinstance(run.result, TrainResult) else {}


def _status(run: Run) -> str:
    epoch = run.records[-1].epoch if run.records else 0
    epochs = run.info.train.epochs * (run.info.prune.rounds if run.info.prune else 1)
    untested = ", not tested" if epoch == epochs and run.info.kind == "train" else ""
    status = "finished" if run.result is not None else f"epoch {epoch} of {epochs}{untested}"
    undone = measures.undone(run)
    return f"{status}, {undone} undone" if undone else status


def _reached(run: Run, record: EpochRecord | None, base: EpochRecord | None) -> list[str]:
    """The cells of a run in the table of `time_to`, after its name."""
    if record is None:
        return ["not reached" if measures.evaluated(run) else "not evaluated", "", "", "", "", ""]
    return [
        f"{record.total.seconds:.1f}",
        _ratio(record.total.seconds, base.total.seconds, ".2f") if base else "",
        str(record.epoch),
        _ratio(record.epoch, base.epoch, ".2f") if base else "",
        count(record.total.macs),
        _ratio(record.total.macs, base.total.macs, ".2f") if base else "",
    ]


def _form(value: float | None, form: str) -> str:
    """A formatted number; nothing for None."""
    return "" if value is None else f"{value:{form}}"


def _ratio(part: float, whole: float, form: str) -> str:
    """A formatted quotient; nothing for a division by zero."""
    return f"{part / whole:{form}}" if whole else ""
