"""Writes the README's tables of GPU results: `python benchmarks/gpu_table.py`.

Of gpu_h100.json, which is the gpu_check.json of a `gpu_check.sh`, and cifar10_tickets_h100.json, both in results/, into
whichever Markdown file has the marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PASSES = ("forward", "grad_input", "grad_weight")
MASKS = (((64, 64), 0.1), ((64, 64), 0.2), ((32, 32), 0.1), ((1, 1), 0.1))
NETWORKS = {"ResNet-18": ("64@32", "128@16", "256@8", "512@4"), "WRN-34-10": ("160@32", "320@16", "640@8")}
RIVALS = {
    "published": "published loop, float32",
    "careful": "the same in bfloat16, channels_last",
    "compile": "with torch.compile",
    "our dense": "ours, dense",
    "dense": "ours, dense",
}
ALONE = {"careful": "plain loop in a CUDA graph", "compile": "torch.compile in a CUDA graph"}
EPOCHS = (1, 2, 5, 10)
Row = dict[str, Any]


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines)]


def ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def kernels(rows: Sequence[Row]) -> list[str]:
    """How many times as fast as cuDNN each pass is: a line for each mask, batch and network, of its layers in order."""
    found = {}
    for row in rows:
        if case := re.fullmatch(r"(\d+@\d+), batch (\d+), block \((\d+), (\d+)\), density (\S+)", row.get("case", "")):
            layer, batch, *block, density = case.groups()
            asked = min((0.1, 0.2), key=lambda asked: abs(asked - float(density)))  # few blocks hit it by chance
            found[row["op"], layer, batch, tuple(map(int, block)), asked] = row["ratios"]["dense"]
    lines = []
    for block, density in MASKS:
        for name, layers in NETWORKS.items():
            for batch in ("128", "512"):
                cells = [
                    " ".join(ratio(found[f"masked_conv2d {pass_}", layer, batch, block, density]) for layer in layers)
                    for pass_ in PASSES
                ]
                lines.append([f"{block}, {density}", name, batch, *cells])
    return table(["block, density", "layers of", "batch", *PASSES], lines)


def steps(rows: Sequence[Row]) -> list[str]:
    """Microseconds by size, of the largest also the share of a copy's rate, and how much longer PyTorch takes."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        if "of_copy_bandwidth" in row:
            by_op.setdefault(row["op"], []).append(row)
    lines = []
    for op, sizes in by_op.items():
        sizes.sort(key=lambda row: row["seconds"]["ours"]["median"])
        cells = [f"{row['seconds']['ours']['median'] * 1e6:.3g}" for row in sizes]
        rivals = []
        for rival in ("eager", "compile"):
            times = sorted(row["ratios"][rival] for row in sizes if rival in row["ratios"])
            rivals.append(f"{times[0]:.2g} to {times[-1]:.2g}" if times else "")
        lines.append([op, *cells, f"{sizes[-1]['of_copy_bandwidth']:.0%}", *rivals])
    images = ["x".join(map(str, row["shape"])) for row in next(iter(by_op.values()))]
    return table(["op", *(f"us, {image}" for image in images), "of a copy", "eager", "torch.compile"], lines)


def updates(rows: Sequence[Row]) -> list[str]:
    """Milliseconds of updates and attacks, and how many times as long each rival takes."""
    lines = []
    for row in rows:
        if row["op"].startswith("PGD-"):
            names = ALONE if "attack" in row["op"] else RIVALS
            rivals = ", ".join(f"{names[rival]} {value:.2f}" for rival, value in row["ratios"].items())
            lines.append([f"{row['op']}: {row['case']}", f"{row['seconds']['ours']['median'] * 1e3:.1f}", rivals])
    return table(["what", "ms", "how many times as long a rival takes"], lines)


def tickets(runs: Sequence[Row]) -> list[str]:
    """Robust accuracy by epoch, and of the test images; runs of one kind share a line."""
    kinds: dict[tuple, list[Row]] = {}
    for run in runs:
        kinds.setdefault((run["run"], run["objective"], run["epochs"]), []).append(run)

    def cell(values: Iterable[float | None]) -> str:
        return ", ".join(f"{value:.1f}" for value in values if value is not None)

    lines = []
    for (name, objective, epochs), same in kinds.items():
        accuracies = [cell(run["robust"].get(str(epoch)) for run in same) for epoch in EPOCHS]
        last = [cell(run["robust"][str(epochs)] for run in same)]
        tests = [cell(run.get(key) for run in same) for key in ("test_clean", "test_pgd_20")]
        cost = f"{same[0]['pgd_epochs']:.1f}"
        lines.append([name, objective, str(epochs), cost, *accuracies, *last, *tests])
    heading = ["run", "training", "epochs", "cost", *map(str, EPOCHS), "last", "test clean", "test PGD-20"]
    return table(heading, lines)


def blocks() -> dict[str, str]:
    """What belongs between each pair of marks."""
    found = json.loads((RESULTS / "gpu_h100.json").read_text())
    about = f"{found['gpu']}, CUDA {found['cuda']}, torch {found['torch']}, {found['date']}, commit {found['commit']}."
    parts = [kernels(found["rows"]), steps(found["rows"]), updates(found["rows"])]
    runs = json.loads((RESULTS / "cifar10_tickets_h100.json").read_text())["runs"]
    return {
        "gpu numbers": "\n\n".join([about, *("\n".join(part) for part in parts)]),
        "gpu tickets": "\n".join(tickets(runs)),
    }


def filled(text: str) -> str:
    """A Markdown text with what belongs between its marks."""
    for name, block in blocks().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text = re.sub(f"{begin}\n.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def documents() -> list[Path]:
    """The Markdown files that have marks."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return [path for path in files if any(f"<!-- {name}: begin -->" in path.read_text() for name in blocks())]


def main() -> None:
    for path in documents():
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
