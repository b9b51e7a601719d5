"""The report on several runs: a Markdown file with its figures, and a CSV file of all epochs."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparse_adv.argument_types import checks_types
from sparse_adv.files import write_text
from sparse_adv.json_files import JSON, flatten, to_json
from sparse_adv.report import figures, measures, tables
from sparse_adv.runs import Run, read

log = logging.getLogger(__name__)

MARKDOWN, CSV = "report.md", "report.csv"


@checks_types
def reportable(folders: Sequence[Path | str]) -> list[Run]:
    """Read the runs that can be reported; log a warning for each other folder that says why it is left out.

    Args:
        folders: of the runs, finished or not; one that is given twice counts once. A folder that holds nothing but a
            report is left out without a warning, so that `runs/*` may name it.

    Raises:
        FileNotFoundError: naming a folder that does not exist.
        TypeError: if this is one path in place of a list.
        ValueError: if there is no folder, or none that can be reported.

    Examples:
        >>> reportable([])
        Traceback (most recent call last):
        ...
        ValueError: folders must name at least one run folder, got none
    """
    unique = {Path(folder).resolve(): Path(folder) for folder in folders}
    if not unique:
        raise ValueError("folders must name at least one run folder, got none")
    runs: list[Run] = []
    reasons: list[str] = []
    for folder in unique.values():
        if not folder.exists():
            raise FileNotFoundError(f"there is no run folder {folder}")
        if _holds_only_a_report(folder):
            continue
        try:
            run = read(folder)
            if not run.records:
                raise ValueError(f"{folder} has no epochs yet: wait for the first")
            runs.append(run)
        except (OSError, ValueError) as error:
            reasons.append(str(error))
    if not runs:
        raise ValueError("; ".join(reasons) or f"folders must name a run folder, got a report alone, {folder}")
    for reason in reasons:
        log.warning("left out of the report: %s", reason)
    return runs


def _holds_only_a_report(folder: Path) -> bool:
    files = {each.name for each in folder.iterdir()} if folder.is_dir() else set()
    figures = {name for name in files if name.endswith((".png", ".svg"))}
    return {MARKDOWN, CSV} == files - figures


@checks_types
def report(folders: Sequence[Path | str], out: Path | str, *, level: float | None = None) -> str:
    """Write a report on runs: `report.md`, its figures, and `report.csv` with a row per run and epoch.

    Args:
        folders: of the runs, finished or not; a folder that is given twice counts once. One whose run has no epoch
            yet or a damaged file, or that holds no run, is left out with a warning; a folder of an earlier report is
            left out without one.
        out: the folder to write to; an earlier report there is replaced.
        level: see `time_to`.

    Returns:
        The text of `report.md`.

    Raises:
        FileNotFoundError: naming a folder that does not exist.
        ModuleNotFoundError: if matplotlib is missing.
        NotADirectoryError: if `out` is a file.
        TypeError: if an argument is of another type, as one path in place of a list.
        ValueError: if there is no folder, all are left out, or the level is not in [0, 1].

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparse_adv import data, models, training
        >>> folder = Path(tempfile.mkdtemp())
        >>> dataset = data.load("digits", limit=64, validation=16)
        >>> model, batches = models.build("digits_cnn", width=4), data.Batches(dataset.train, 16)
        >>> config = training.TrainConfig("fgsm", epochs=1, eps=0.1, evaluation_steps=1)
        >>> _ = training.train(model, batches, config, validation=dataset.validation, folder=folder / "dense")
        >>> print(report([folder / "dense"], folder / "report").splitlines()[0])
        # Report of 1 run
        >>> sorted(path.name for path in (folder / "report").iterdir())
        ['accuracy.png', 'accuracy.svg', 'phases.png', 'phases.svg', 'report.csv', 'report.md']
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: a report needs a folder")
    return write_report(reportable(folders), out, level)


def write_report(runs: Sequence[Run], out: Path, level: float | None) -> str:
    """Write the files of `report` on runs that `reportable` has read, and return the text of `report.md`."""
    differences = measures.differences(runs)
    time_to = tables.time_to(runs, level)
    plots = {
        "Validation accuracy": figures.accuracy_curves(out / "accuracy", runs),
        "Phases": figures.phase_bars(out / "phases", runs),
    }
    sections = [
        f"# Report of {len(runs)} run{'s' if len(runs) > 1 else ''}",
        "## Summary",
        tables.summary(runs)
        + "\nTotal seconds and multiply-adds (MACs) are of ticket search, attacks and updates; evaluations are not "
        'counted. Accuracies without "test" are on validation images. The densities of a finished search are those of '
        "its ticket, those of a training run are of its best epoch.",
        *([tables.escaped(differences)] if differences else []),
        "## Time to the same robustness",
        time_to,
        "## Phases",
        tables.phases(runs),
        "## Figures",
        *(f"![{name}]({files[0].name})\n\n{name}, [as SVG]({files[1].name})" for name, files in plots.items() if files),
        "## How the runs were made",
        _settings(runs),
        f"All epochs: [{CSV}]({CSV})",
    ]
    text = "\n\n".join(section.rstrip("\n") for section in sections) + "\n"
    write_text(out / CSV, _epochs(runs))
    write_text(out / MARKDOWN, text)
    return text


def _settings(runs: Sequence[Run]) -> str:
    """Two tables of the contents of `run.json`, with the present densities: what all runs share, and what differs."""
    infos = [replace(run.info, density=measures.density(run)) for run in runs]
    settings = [{"folder": str(run.folder), **_flat(to_json(info))} for run, info in zip(runs, infos, strict=True)]
    common: list[list[str]] = []
    different: list[list[str]] = []
    keys = dict.fromkeys(key for each in settings for key in each)
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            continue  # "ticket" of a run without one, if another run has "ticket.sha256"
        values = ["" if each.get(key) is None else str(each[key]) for each in settings]
        if len(set(values)) == 1:
            common.append([key, values[0]])
        else:
            different.append([key, *values])
    parts = [tables.table(["setting", "every run"], common)] if common else []
    parts += [tables.table(["setting", *measures.labels(runs)], different)] if different else []
    return "\n".join(parts)


def _epochs(runs: Sequence[Run]) -> str:
    """CSV with a row per run and epoch; fields that a record lacks are empty."""
    rows = [
        {"run": label, "folder": str(run.folder), **_flat(to_json(record, with_none=False))}
        for run, label in zip(runs, measures.labels(runs), strict=True)
        for record in run.records
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flat(content: Mapping[str, JSON]) -> dict[str, JSON]:
    """Nested fields by their path, "train.lr"; a list is written as JSON."""
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in flatten(content)}
