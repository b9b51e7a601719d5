"""Makes gpu_check.json and gpu_check.md from the output of gpu_check.sh: `python benchmarks/gpu_report.py FOLDER`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import Record, compared, read_records, run, table, title_of
from machine import environment

PARTS = ("part", "status", "seconds", "limit", "note")
COLUMNS = ("case", "us", "times as long", "of the bound", "spread")
LAST_LINES = 15
TEST = r"\S+\.py::.+?"


def parts(folder: Path) -> list[dict[str, Any]]:
    """Each part with its exit status, seconds and limit; if it failed, also with its failed tests or its last lines."""
    found = []
    for line in (folder / "parts.tsv").read_text().splitlines():
        name, status, seconds, limit, note = line.split("\t")
        part = {"part": name, "status": int(status), "seconds": int(seconds), "limit": int(limit), "note": note}
        if part["status"]:
            log = (folder / f"{name}.log").read_text(errors="replace")
            tests = failed_tests(log)
            part |= {"failed": tests} if tests else {"last_lines": log.splitlines()[-LAST_LINES:]}
        found.append(part)
    return found


def failed_tests(log: str) -> list[str]:
    """The tests that failed according to the output of `pytest -v`, with the reasons from its summary.

    If a run was stopped, or a test ended its process, there is no summary; then the lines of single tests are used.
    """
    ended = [f"{test} - {error}" for test, error in re.findall(rf"^({TEST}) (Fatal Python error: .*)$", log, re.M)]
    if summary := re.findall(r"^(?:FAILED|ERROR) (\S+\.py\b.*)$", log, re.M):
        return summary + ended
    single = re.findall(rf"^({TEST}) (?:FAILED|ERROR)\b", log, re.M)  # one process
    shared = re.findall(rf"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) ({TEST}) *(?:Fatal .*)?$", log, re.M)  # pytest-xdist
    return list(dict.fromkeys(single + shared)) + ended


def rows(folder: Path) -> list[Record]:
    """The records of all parts that measured something."""
    names = [line.split("\t")[0] for line in (folder / "parts.tsv").read_text().splitlines()]
    files = [path for name in names if (path := folder / f"{name}.csv").exists()]
    return [record for path in files for record in read_records(path)[1]]


def table_line(row: Record) -> list[str]:
    share, ratios = compared(row)
    return [title_of(row), f"{1e3 * float(row['ours_ms']):.1f}", ratios, share, f"{float(row['spread']):.0%}"]


def what_failed(part: dict[str, Any]) -> list[str]:
    limit = f" (its limit of {part['limit']} s)" if part["status"] in (124, 137) else ""
    lines = ["", f"## {part['part']} failed with status {part['status']}{limit}", ""]
    if "failed" in part:
        return lines + [f"- `{test}`" for test in part["failed"]]
    return [*lines, f"The last lines of {part['part']}.log:", "", "```", *part["last_lines"], "```"]


def report(whole: dict[str, Any]) -> str:
    """The parts, their failures, then a table of all rows: our time, and how many times as long the others take."""
    facts = {key: value for key, value in whole.items() if key not in ("parts", "rows")}
    lines = [f"# {facts.get('gpu', 'no GPU')}, {facts['date']}, commit {facts['commit']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    shown = [part | {"status": f"**{part['status']}**" if part["status"] else "ok"} for part in whole["parts"]]
    lines += ["", *table(PARTS, [[str(part[name]) for name in PARTS] for part in shown])]
    for part in whole["parts"]:
        if part["status"]:
            lines += what_failed(part)
    if whole["rows"]:
        lines += ["", "## Measured", "", *table(COLUMNS, map(table_line, whole["rows"]))]
    return "\n".join(lines) + "\n"


def as_json(whole: dict[str, Any]) -> str:
    """JSON with a line for each fact and for each item of a list."""

    def text(value: object) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {text(value)}" for key, value in whole.items()) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of a run of gpu_check.sh")
    folder, facts = parser.parse_args(arguments).folder, environment()
    whole = {**facts, "parts": parts(folder), "rows": rows(folder)}
    (folder / "gpu_check.json").write_text(as_json(whole))
    text = report(whole)
    (folder / "gpu_check.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run(main)
