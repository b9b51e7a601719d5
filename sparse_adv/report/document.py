"""A folder with all that there is to say about some runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_adv.files import write_text
from sparse_adv.report import figures, measures, tables
from sparse_adv.runs import Run, read


def report(folders: Sequence[Path | str], out: Path | str, *, level: float | None = None) -> str:
    """Write `report.md`, `report.csv` (a row per run and epoch, with every field) and the pictures of some runs.

    Args:
        folders: of the runs, finished or not; a folder that comes twice counts once.
        out: the folder to write to; an earlier report there is replaced.
        level: see `time_to`.

    Returns:
        The text of `report.md`.

    Raises:
        FileNotFoundError: naming the folder that holds no run.
        ModuleNotFoundError: if matplotlib is missing.
        NotADirectoryError: if `out` is a file.
        ValueError: if there is no folder, a run has no epochs yet, a file of it is damaged or the level is no share.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: a report needs a folder")
    unique = {Path(folder).resolve(): Path(folder) for folder in folders}
    if not unique:
        raise ValueError("folders must name at least one run folder, got none")
    runs = [read(folder) for folder in unique.values()]
    for run in runs:
        if not run.records:
            raise ValueError(f"{run.folder} has no epochs yet: wait for the first")

    reached = tables.time_to(runs, level)
    pictures = {
        "Validation accuracy": figures.accuracy_curves(out / "accuracy", runs),
        "Phases": figures.phase_bars(out / "phases", runs),
    }
    sections = [
        f"# Report of {len(runs)} run{'s' if len(runs) > 1 else ''}",
        "## Summary",
        tables.summary(runs)
        + "\nSeconds and multiply-adds in all: ticket search, attacks and updates; evaluations are "
        'not counted. Accuracies without "test" are of validation images.',
        "## Time to the same robustness",
        reached,
        "## Phases",
        tables.phases(runs),
        "## Pictures",
        *(_picture(name, files) for name, files in pictures.items() if files),
        "## How the runs were made",
        _making(runs),
        "All epochs: [report.csv](report.csv)",
    ]
    text = "\n\n".join(section.rstrip("\n") for section in sections) + "\n"
    write_text(out / "report.csv", _epochs(runs))
    write_text(out / "report.md", text)
    return text


def _picture(name: str, files: Sequence[Path]) -> str:
    shown, drawn = (file.name for file in files)
    return f"![{name}]({shown})\n\n{name}, [as SVG]({drawn})"


def _making(runs: Sequence[Run]) -> str:
    """The runs' facts: first those that all share, then those in which they differ."""
    facts = [
        {"folder": str(run.folder)} | {key: _plain(value) for key, value in measures.flat(run.facts)} for run in runs
    ]
    shared: list[measures.Record] = []
    own: list[measures.Record] = []
    for key in dict.fromkeys(key for found in facts for key in found):
        values = [found.get(key) for found in facts]
        row = {"fact": key, **{f"run{i}": value for i, value in enumerate(values)}}
        (shared if len(set(values)) == 1 else own).append(row)
    each = {label: f"{{run{i}}}" for i, label in enumerate(measures.labels(runs))}
    made = [({"every run": "{run0}"}, shared), (each, own)]
    return "\n".join(tables.table(rows, {"fact": "{fact}"} | columns) for columns, rows in made if rows)


def _epochs(runs: Sequence[Run]) -> str:
    """CSV with a row per run and epoch; what a record lacks stays empty."""
    rows = [
        {"run": label, "folder": str(run.folder)} | {key: _plain(value) for key, value in record.items()}
        for run, label in zip(runs, measures.labels(runs), strict=True)
        for record in run.records
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """A cell's content: containers as JSON."""
    return json.dumps(value) if isinstance(value, dict | list) else value
