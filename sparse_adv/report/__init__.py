"""Tables and figures of runs, from their folders."""

from sparse_adv.report.document import report, reportable
from sparse_adv.report.figures import accuracy_curves, phase_bars
from sparse_adv.report.tables import phases, summary, table, time_to

__all__ = ["accuracy_curves", "phase_bars", "phases", "report", "reportable", "summary", "table", "time_to"]
