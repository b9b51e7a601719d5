"""Makes gpu_check.json and gpu_check.md of what gpu_check.sh left: `python benchmarks/gpu_report.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from harness import environment

COLUMNS = ("op", "case", "microseconds", "ratios", "of the bound")


def parts(folder: Path) -> list[dict[str, Any]]:
    """Each part with its exit status and seconds."""
    lines = [line.split("\t") for line in (folder / "parts.tsv").read_text().splitlines()]
    return [{"part": name, "status": int(status), "seconds": int(seconds)} for name, status, seconds in lines]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def table_line(row: dict[str, Any]) -> list[str]:
    ours = row["seconds"]["ours"]
    spread = f"{ours['median'] * 1e6:.1f} ({ours['q20'] * 1e6:.1f}-{ours['q80'] * 1e6:.1f})"
    ratios = ", ".join(f"{rival} {ratio:.2f}" for rival, ratio in row["ratios"].items())
    bound = next((f"{row[key]:.0%}" for key in ("of_copy_bandwidth", "of_floor") if key in row), "")
    return [row["op"], str(row.get("case") or row.get("shape")), spread, ratios, bound]


def report(folder: Path) -> str:
    """The parts, then a table of all rows: our time and how much longer each rival takes."""
    facts = environment()
    lines = [f"# {facts.get('gpu', 'no GPU')}, {facts['date']}, commit {facts['commit']}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| part | status | seconds |", "| --- | --- | --- |"]
    for part in parts(folder):
        lines.append(f"| {part['part']} | {'ok' if part['status'] == 0 else part['status']} | {part['seconds']} |")
    lines += ["", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(table_line(row))} |" for row in rows(folder)]
    return "\n".join(lines) + "\n"


def main() -> None:
    folder = Path(sys.argv[1])
    whole = {**environment(), "parts": parts(folder), "rows": rows(folder)}
    (folder / "gpu_check.json").write_text(json.dumps(whole, indent=1) + "\n")
    text = report(folder)
    (folder / "gpu_check.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
