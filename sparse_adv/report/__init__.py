"""Tables and pictures of runs, out of their folders."""

from sparse_adv.report.document import report
from sparse_adv.report.figures import accuracy_curves, curves, phase_bars
from sparse_adv.report.measures import first_to_reach
from sparse_adv.report.tables import phases, summary, table, time_to

__all__ = [
    "accuracy_curves",
    "curves",
    "first_to_reach",
    "phase_bars",
    "phases",
    "report",
    "summary",
    "table",
    "time_to",
]
