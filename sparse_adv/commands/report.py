"""`report`: tables and plots from run folders."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sparse_adv.commands.options import POSITIONAL
from sparse_adv.commands.out_folder import check_folder
from sparse_adv.commands.output import Output
from sparse_adv.json_files import to_json
from sparse_adv.report import reportable
from sparse_adv.report.document import write_report


@dataclass(frozen=True)
class Options:
    """Compare runs: tables and plots from their folders.

    Writes report.md, report.csv and plots: robust and clean accuracy against seconds, epochs and multiply-adds, with
    those of the ticket search; the cost of each phase; and when each run reached a level of accuracy.

    Args:
        folders: run folders, finished or not. One whose run has no epoch yet or a damaged file, or that holds no run,
            is left out with a warning; a folder of an earlier report, which runs/* may name, without one.
        out: folder for the report.
        level: robust accuracy to reach; the default is the highest that all runs reached.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    folders: tuple[Path, ...] = field(metadata=POSITIONAL)
    out: Path = Path("runs/report")
    level: float | None = None
    json: bool | None = None


def run(options: Options) -> int:
    check_folder(options.out)
    runs = reportable(options.folders)
    text = write_report(runs, options.out, options.level)
    output = Output(options.json)
    if not output.as_json:
        output.line(text)
        return 0
    for each in runs:
        last = to_json(each.records[-1], with_none=False) if each.records else {}
        result = to_json(each.result) if each.result else None
        output.line({"run": str(each.folder), "name": each.name, **last, "result": result})
    output.line({"report": str(options.out)})
    return 0
