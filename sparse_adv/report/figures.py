"""Pictures of run folders, as PNG and SVG beside each other, ready for a page 7 inches wide."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_adv.files import replacing
from sparse_adv.report import measures
from sparse_adv.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]

WIDTH = 7.0
LINE = 0.18
"""Inches: of a picture, and from one line of a legend to the next. Nothing is scaled on the page, so 9 pt are 9 pt."""

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.35,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "hatch.linewidth": 0.4,
    "legend.frameon": False,
    "legend.handletextpad": 0.4,
    "savefig.dpi": 200,
    "text.usetex": False,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito 2008, without the yellow that is lost on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
"""One more than colours: 56 curves differ in either. The shapes alone tell 8 apart."""
PHASES = {
    "search": ("#BBBBBB", ""),
    "attack": ("#F5C26B", "////"),
    "update": ("#8CC5EA", ""),
    "undone": ("#E3B5CF", "xxxx"),
    "evaluation": ("#FFFFFF", "...."),
}
LEGEND_CHARACTERS = 96
NAME_CHARACTERS = 28
LEAST_SPAN = 0.1
"""Of an axis of accuracies, so that noise does not look like a difference."""


@contextmanager
def _canvas(path: Path, height: float) -> Iterator[Figure]:
    """A picture `height` inches high; at the end it is written."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('pictures are drawn by matplotlib: pip install "sparse_adv[demo]"') from error

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")  # bare: it draws with Agg, unknown to pyplot
        yield figure
        for file in _files(path):
            with replacing(file) as draft:
                figure.savefig(draft)


def _files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]


def curves(path: Path, lines: Mapping[str, Points], *, title: str, x: str, y: str, percent: bool = True) -> list[Path]:
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
    names = list(lines)
    with _canvas(path, 3.6 + LINE * _legend_rows(names)) as figure:
        axes = figure.subplots()
        drawn = _draw(axes, list(lines.values()), most_markers=16)
        if percent:
            _in_percent(axes)
        axes.set(title=title, xlabel=x, ylabel=y)
        _legend(figure, drawn, names)
    return _files(path)


def accuracy_curves(path: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw robust and clean validation accuracy against time, epochs and multiply-adds, one curve per run.

    Time and multiply-adds are those of attacks and updates, counted from the beginning of the ticket search, which a
    dotted line shows. Searches are left out where there are other runs.

    Args:
        path: the files' name without a suffix.
        runs: finished or not; those without evaluations have no curve.

    Returns:
        The two files; none if no run has been evaluated.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    chosen = {id(run) for run in measures.compared(runs)}
    shown = [
        (run, label)
        for run, label in zip(runs, measures.labels(runs), strict=True)
        if id(run) in chosen and measures.evaluated(run)
    ]
    if not shown:
        return []
    names = [label for _, label in shown]
    kinds = [k for k in ("robust", "clean") if any(measures.evaluated(run, f"{k}_accuracy") for run, _ in shown)]
    most = {unit: max(measures.total(run, unit) for run, _ in shown) for unit in measures.UNITS}
    searched = any(measures.before(run, unit) for run, _ in shown for unit in measures.UNITS)
    suffix = ",\nwith ticket search (dotted)" if searched else ""
    minutes, time = _time_unit(most["seconds"])
    power = 10.0 ** _exponent(most["multiply_adds"])
    columns = [
        ("seconds", minutes, f"training time ({time}){suffix}"),
        ("epoch", 1.0, "epochs"),
        ("multiply_adds", power, f"multiply-adds ({_power(most['multiply_adds'])}){suffix}"),
    ]
    with _canvas(path, 0.6 + 1.9 * len(kinds) + LINE * (_legend_rows(names) + searched)) as figure:
        from matplotlib.ticker import MaxNLocator

        grid = figure.subplots(len(kinds), len(columns), sharex="col", sharey="row", squeeze=False)
        for kind, row in zip(kinds, grid, strict=True):
            row[0].set_ylabel(f"{kind} validation accuracy")
            for (field, scale, _), axes in zip(columns, row, strict=True):
                lines = [
                    [
                        (record[field] / scale, record[f"{kind}_accuracy"])
                        for record in measures.evaluated(run, f"{kind}_accuracy")
                        if field in record
                    ]
                    for run, _ in shown
                ]
                drawn = _draw(axes, lines, most_markers=7)
                axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=field == "epoch"))
            _in_percent(row[0])
            starts = [[measures.before(run, field) / scale for run, _ in shown] for field, scale, _ in columns]
            _draw_searches(row, starts)
        for (_, _, label), axes in zip(columns, grid[-1], strict=True):
            axes.set_xlabel(label)
        _legend(figure, drawn, names)
    return _files(path)


def phase_bars(path: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw what each run spent its time and its multiply-adds on, as stacked bars.

    Args:
        path: the files' name without a suffix.
        runs: finished or not.

    Returns:
        The two files.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.
    """
    names = [textwrap.fill(label, NAME_CHARACTERS, break_on_hyphens=False) for label in measures.labels(runs)]
    row = max(0.36, 0.08 + 0.15 * max(name.count("\n") + 1 for name in names))
    with _canvas(path, 0.95 + row * len(runs)) as figure:
        handles: dict[str, Any] = {}
        panels = figure.subplots(1, len(measures.UNITS), sharey=True)
        for axes, unit in zip(panels, measures.UNITS, strict=True):
            costs = [measures.phase_costs(run, unit) for run in runs]
            longest = max(sum(cost.values()) for cost in costs)
            if unit == "seconds":
                scale, name = _time_unit(longest)
                axes.set_xlabel(f"time ({name})")
            else:
                scale = 10.0 ** _exponent(longest)
                axes.set_xlabel(f"multiply-adds ({_power(longest)})")
            left = [0.0] * len(runs)
            for phase in (phase for phase in PHASES if any(phase in cost for cost in costs)):
                widths = [cost.get(phase, 0) / scale for cost in costs]
                colour, hatch = PHASES[phase]
                looks = {"color": colour, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
                handles[phase] = axes.barh(range(len(runs)), widths, 0.25 / row, left, **looks)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            axes.set_xlim(0, 1.02 * longest / scale if longest else 1)
            axes.grid(axis="x")
        panels[0].set_yticks(range(len(runs)), names, parse_math=False)
        panels[0].set_ylim(len(runs) - 0.5, -0.5)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    return _files(path)


def _draw(axes: Axes, lines: Sequence[Points], most_markers: int) -> list[Any]:
    """Draw the curves, told apart by colour and marker; return their handles for a legend."""
    drawn = []
    for i, points in enumerate(lines):
        every = -(-len(points) // most_markers)
        drawn += axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markevery=(i * every // max(1, len(lines)), every) if every > 1 else None,
            markeredgecolor="white",
            markeredgewidth=0.4,
        )
    axes.set_xlim(left=0)
    axes.grid(True)
    return drawn


def _in_percent(axes: Axes) -> None:
    """Print the shares on the y axis as percentages."""
    bottom, top = axes.get_ylim()
    if top - bottom < LEAST_SPAN:
        bottom = max(-0.05 * LEAST_SPAN, (bottom + top - LEAST_SPAN) / 2)
        axes.set_ylim(bottom, bottom + LEAST_SPAN)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%" if share > -1e-9 else "")


def _draw_searches(row: Sequence[Axes], starts: Sequence[Sequence[float]]) -> None:
    """Draw how long each run's search took, in a strip below the curves of axes that share their y."""
    searched = [i for i in range(len(starts[0])) if any(column[i] for column in starts)]
    bottom, top = row[0].get_ylim()
    step = 0.05 * (top - bottom)
    for axes, column in zip(row, starts, strict=True):
        for place, i in enumerate(searched):
            height = bottom - place * step
            axes.plot([0, column[i]], [height, height], color=COLOURS[i % len(COLOURS)], linestyle=(0, (1, 1)))
    row[0].set_ylim(bottom - len(searched) * step, top)


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Below the axes, where it hides no curve, in as many columns as fit."""
    texts = [" " + textwrap.fill(name, LEGEND_CHARACTERS) for name in names]  # matplotlib 3.8 leaves out "_name"
    legend = figure.legend(handles, texts, loc="outside lower center", ncols=_legend_columns(names))
    for text in legend.get_texts():
        text.set_parse_math(False)


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), LEGEND_CHARACTERS // (max(map(len, names), default=0) + 8)))


def _legend_rows(names: Sequence[str]) -> int:
    lines = sum(-(-len(name) // LEGEND_CHARACTERS) for name in names)
    return -(-lines // _legend_columns(names))


def _time_unit(seconds: float) -> tuple[float, str]:
    """The seconds in the unit that suits the longest time, and its name."""
    return (1.0, "s") if seconds < 300 else (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")


def _exponent(number: float) -> int:
    return 3 * int(log10(number) // 3) if number >= 1 else 0


def _power(number: float) -> str:
    return f"$10^{{{_exponent(number)}}}$"
