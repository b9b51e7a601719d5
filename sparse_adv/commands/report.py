"""`report`: tables and pictures from run folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparse_adv import runs
from sparse_adv.commands import flags
from sparse_adv.commands.output import Output
from sparse_adv.json_files import to_json
from sparse_adv.report import report


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "report",
        "compare runs: tables and plots from their folders",
        "Writes report.md, report.csv and plots: robust and clean accuracy against seconds, epochs and multiply-adds, "
        "the search included; what each phase took; when each run reached a level.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder for the report")
    parser.add_argument(
        "--level", type=flags.number, help="robust accuracy to reach; left out, the highest that all did"
    )
    flags.add_output(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    told = report(options.folders, options.out, level=options.level)
    output = Output(options.json)
    if not output.as_json:
        output.say(told, {})
        return 0
    for folder in options.folders:
        found = runs.read(folder)
        last = to_json(found.records[-1], with_none=False) if found.records else {}
        result = to_json(found.result) if found.result else None
        output.say("", {"run": str(folder), "name": found.name, **last, "result": result})
    output.say("", {"report": str(options.out)})
    return 0
