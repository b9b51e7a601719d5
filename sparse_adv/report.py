"""Tables and pictures from plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_adv.files import replacing

Record = Mapping[str, Any]


def table(rows: Sequence[Record], columns: Mapping[str, str]) -> str:
    """A Markdown table.

    Args:
        rows: one record per line; what a record lacks stays empty.
        columns: heading -> format of the cell, with the record's fields by name: `"{seconds:.1f}"`.
    """
    cells = [list(columns), *([_cell(row, form) for form in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _cell(row: Record, form: str) -> str:
    try:
        return form.format_map(row)
    except KeyError:
        return ""


def curves(
    path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str, percent: bool = True
) -> list[Path]:
    """Draw one curve per name through its (x, y) points, as PNG and SVG beside each other.

    Args:
        path: the files' name without a suffix.
        lines: name -> points.
        title, x, y: what the picture and its axes say.
        percent: whether y values are shares, to be printed as percentages.

    Returns:
        The two files.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures are drawn by matplotlib: pip install "sparse_adv[demo]"') from error

    # A bare Figure draws with Agg and touches no global state of the caller's pyplot.
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for (name, points), marker in zip(lines.items(), _markers(len(lines)), strict=True):
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], marker=marker, markersize=5, linewidth=1.8, label=name
        )
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xlim(left=0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    for file in files:
        with replacing(file) as draft:
            figure.savefig(draft, dpi=150)
    return files


def _markers(count: int) -> list[str]:
    """Shapes that tell curves apart without colour."""
    return [("o", "s", "^", "D", "v")[i % 5] for i in range(count)]


def first_to_reach(records: Sequence[Record], field: str, level: float) -> Record | None:
    """The first record whose field is at least this level, or None."""
    return next((record for record in records if record.get(field, float("-inf")) >= level), None)
