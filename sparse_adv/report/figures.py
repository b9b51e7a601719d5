"""Figures of runs, written as PNG and SVG, for a page 7 inches wide."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_adv.files import replacing
from sparse_adv.report import measures
from sparse_adv.runs import EpochRecord, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 7.0
"""Width of a figure, in inches."""
LEGEND_ROW = 0.18
"""Height of a row of the legend, in inches."""
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito 2008, distinguishable by colour-blind readers; without yellow, which is hard to see on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
"""One more marker than there are colours, so that 56 curves differ in colour or marker."""
PHASES = {"search": "#999999", "attack": "#E69F00", "update": "#0072B2", "undone": "#CC79A7", "evaluation": "#DDDDDD"}


def accuracy_curves(path: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw robust and clean validation accuracy against time, epochs and MACs, with a curve per run.

    Time and MACs are those of attacks and updates, including the ticket search before the run; a dotted line marks its
    end. Searches are left out if there are other runs.

    Args:
        path: of the files, without a suffix.
        runs: finished or not; runs without evaluations have no curve.

    Returns:
        The PNG and the SVG file; none if no run was evaluated.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.

    Examples:
        >>> from pathlib import Path
        >>> from sparse_adv import report
        >>> report.accuracy_curves(Path("accuracy"), [])  # no run, so nothing is drawn; see `report.report`
        []
    """
    label_of = {id(run): label for run, label in zip(runs, measures.labels(runs), strict=True)}
    shown = [run for run in measures.compared(runs) if measures.evaluated(run)]
    if not shown:
        return []
    searched = any(run.info.before.seconds for run in shown)
    seconds, unit = _time_unit(max(measures.total(run).seconds for run in shown))
    with_search = ",\nwith ticket search (dotted)" if searched else ""
    names = [textwrap.fill(label_of[id(run)], 75) for run in shown]
    rows_of_names = sum(1 + name.count("\n") for name in names)
    with _figure(path, 4.2 + LEGEND_ROW * (searched + rows_of_names)) as figure:
        from matplotlib.ticker import EngFormatter, PercentFormatter

        rows = figure.subplots(2, 3, sharex="col", sharey="row")
        for i, run in enumerate(shown):
            records, before = measures.evaluated(run), run.info.before
            columns = (
                ([record.total.seconds / seconds for record in records], before.seconds / seconds),
                ([record.epoch for record in records], 0),
                ([record.total.macs for record in records], before.macs),
            )
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "label": str(i)}
            for axes_row, accuracy in zip(rows, (measures.robust_accuracy, _clean_accuracy), strict=True):
                for axes, (x, search_end) in zip(axes_row, columns, strict=True):
                    axes.plot(x, [accuracy(record) for record in records], markevery=-(-len(records) // 8), **look)
                    if search_end:
                        axes.axvline(search_end, color=look["color"], linestyle=":")
        for axes_row, kind in zip(rows, ("robust", "clean"), strict=True):
            axes_row[0].set_ylabel(f"{kind} validation accuracy")
            axes_row[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        labels = (f"training time ({unit}){with_search}", "epochs", f"MACs{with_search}")
        for axes, label in zip(rows[-1], labels, strict=True):
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
        rows[-1][-1].xaxis.set_major_formatter(EngFormatter())
        _legend(figure, rows[0][0], names)
    return _files(path)


def phase_bars(path: Path, runs: Sequence[Run]) -> list[Path]:
    """Draw how each run's time and MACs divide into phases, as stacked bars.

    Args:
        path: of the files, without a suffix.
        runs: finished or not.

    Returns:
        The PNG and the SVG file.

    Raises:
        ModuleNotFoundError: if matplotlib is missing.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparse_adv import report, runs
        >>> from sparse_adv.config import TrainConfig
        >>> folder = Path(tempfile.mkdtemp())
        >>> runs.begin(folder, runs.RunInfo("train", TrainConfig(epochs=3), name="dense"))
        >>> [path.name for path in report.phase_bars(folder / "phases", [runs.read(folder)])]
        ['phases.png', 'phases.svg']
    """
    names = [textwrap.fill(label, 28, break_on_hyphens=False) for label in measures.labels(runs)]
    costs = [measures.phase_costs(run) for run in runs]
    phases = [phase for phase in PHASES if any(phase in cost for cost in costs)]
    scale, unit = _time_unit(max(sum(phase.seconds for phase in cost.values()) for cost in costs))
    with _figure(path, 0.9 + sum(0.25 + 0.15 * name.count("\n") for name in names)) as figure:
        from matplotlib.ticker import EngFormatter

        time, macs = figure.subplots(1, 2, sharey=True)
        for axes, measure in zip((time, macs), measures.UNITS, strict=True):
            ends = [0.0] * len(runs)
            for phase in phases:
                widths = [measures.amount(cost[phase], measure) if phase in cost else 0.0 for cost in costs]
                widths = [width / scale for width in widths] if measure == "seconds" else widths
                axes.barh(range(len(runs)), widths, left=ends, color=PHASES[phase], label=phase)
                ends = [end + width for end, width in zip(ends, widths, strict=True)]
        time.set_xlabel(f"time ({unit})")
        macs.set_xlabel("MACs")
        macs.xaxis.set_major_formatter(EngFormatter())
        time.set_yticks(range(len(runs)), names, parse_math=False)
        time.invert_yaxis()
        _legend(figure, time, phases)
    return _files(path)


def _clean_accuracy(record: EpochRecord) -> float:
    return float("nan") if record.clean_accuracy is None else record.clean_accuracy


@contextmanager
def _figure(path: Path, height: float) -> Iterator[Figure]:
    """A figure `height` inches high; it is written when the block ends."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('figures are drawn by matplotlib: pip install "sparse_adv[demo]"') from error

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")  # without pyplot: no window, no global state
        yield figure
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # in a run's name: drawn as a box
            for file in _files(path):
                with replacing(file) as draft:
                    figure.savefig(draft)


def _files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]


def _legend(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend below the axes, for curves or bars that were drawn in the order of `names`."""
    texts = [f" {name}" for name in names]  # matplotlib leaves out names that begin with an underscore
    handles = axes.get_legend_handles_labels()[0]
    longest = max(len(line) for name in names for line in name.split("\n"))
    columns = max(1, min(len(names), 90 // (longest + 8)))
    for text in figure.legend(handles, texts, loc="outside lower center", ncols=columns).get_texts():
        text.set_parse_math(False)


def _time_unit(seconds: float) -> tuple[float, str]:
    """The unit in which to show the longest time: its seconds and its name."""
    return (1.0, "s") if seconds < 300 else (60.0, "min") if seconds < 3 * 3600 else (3600.0, "h")
