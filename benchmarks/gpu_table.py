"""Writes the documents' tables of GPU results: `python benchmarks/gpu_table.py`.

The tables come from gpu_h100.json and gpu_h200.json, each the gpu_check.json of a run of gpu_check.sh, and from
cifar10_tickets_h100.json, all in results/. Each table goes between its marks, in the Markdown file that has these
marks.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import Record, ratios_of, table, title_of

from sparse_adv import ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MASKS = (((64, 64), 0.1), ((64, 64), 0.2), ((32, 32), 0.1), ((1, 1), 0.1))
NETWORKS = {"ResNet-18": ("64@32", "128@16", "256@8", "512@4"), "WRN-34-10": ("160@32", "320@16", "640@8")}
RIVALS = {
    "published": "published loop, float32",
    "careful": "the same in bfloat16, channels_last",
    "compile": "with torch.compile",
    "ours_dense": "ours, dense",
    "dense": "ours, dense",
}
ALONE = {"careful": "plain loop in a CUDA graph", "compile": "torch.compile in a CUDA graph"}
EPOCHS = (1, 2, 5, 10)


def ratio(value: float) -> str:
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"


def kernels(rows: Sequence[Record]) -> list[str]:
    """How many times as fast as cuDNN each pass is: a line per mask, batch and network, with its layers in order."""
    ratios = {
        tuple(row[label] for label in ("pass", "layer", "batch", "block", "density")): ratios_of(row)["dense"]
        for row in rows
        if row["op"] == "masked_conv2d"
    }
    lines = []
    for block, density in MASKS:
        for name, layers in NETWORKS.items():
            for batch in (128, 512):
                mask = ("x".join(map(str, block)), density)
                cells = [
                    " ".join(ratio(ratios[pass_, layer, batch, *mask]) for layer in layers) for pass_ in ops.PASSES
                ]
                lines.append([f"{block}, {density}", name, str(batch), *cells])
    return table(["block, density", "layers of", "batch", *ops.PASSES], lines)


def norms(rows: Sequence[Record]) -> list[str]:
    """Microseconds of `batch_norm_act`, how many times its bound that is, and how many times as long PyTorch takes."""
    lines = []
    for row in rows:
        if str(row["op"]).startswith("batch_norm_act"):
            rivals = [
                f"{ratios_of(row)[rival]:.2f}" if rival in ratios_of(row) else "" for rival in ("eager", "compile")
            ]
            time = float(row["ours_ms"])
            of_bound = f"{time / float(row['bound_ms']):.1f}"
            lines.append([f"{row['op']}, {row['pass']}", str(row["shape"]), f"{1e3 * time:.1f}", of_bound, *rivals])
    return table(["op", "images", "us", "times its bound", "eager", "torch.compile"], lines)


def steps(rows: Sequence[Record]) -> list[str]:
    """Microseconds by size, the share of a copy's rate at the largest, and how many times as long PyTorch takes."""
    by_op: dict[str, list[Record]] = {}
    for row in rows:
        if "shape" in row and "pass" not in row:
            by_op.setdefault(str(row["op"]), []).append(row)
    lines = []
    for op, sizes in by_op.items():
        times = [float(row["ours_ms"]) for row in sizes]
        rivals = []
        for rival in ("eager", "compile"):
            ratios = sorted(ratios_of(row)[rival] for row in sizes if rival in ratios_of(row))
            rivals.append(f"{ratios[0]:.2g} to {ratios[-1]:.2g}" if ratios else "")
        share = float(sizes[-1]["bound_ms"]) / times[-1]
        lines.append([op, *(f"{1e3 * time:.3g}" for time in times), f"{share:.0%}", *rivals])
    images = [row["shape"] for row in next(iter(by_op.values()))]
    return table(["op", *(f"us, {image}" for image in images), "of a copy", "eager", "torch.compile"], lines)


def updates(rows: Sequence[Record]) -> list[str]:
    """Milliseconds of updates and attacks, and how many times as long each rival takes."""
    lines = []
    for row in rows:
        op = str(row["op"])
        if op.startswith(("PGD-", "captured")):
            names = RIVALS | ALONE if "attack" in op or op.startswith("captured") else RIVALS
            rivals = ", ".join(f"{names[rival]} {value:.2f}" for rival, value in ratios_of(row).items())
            case = title_of({name: row[name] for name in ("network", "batch", "mask", "removed") if name in row})
            lines.append([f"{op}: {case}", f"{float(row['ours_ms']):.1f}", rivals])
    return table(["what", "ms", "how many times as long a rival takes"], lines)


def tickets(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Robust accuracy after some epochs, and the accuracies of the test images; runs of one kind share a line."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
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
    """The text of each pair of marks."""
    runs = json.loads((RESULTS / "cifar10_tickets_h100.json").read_text())["runs"]
    return {
        "gpu numbers": _of_check("gpu_h100.json", kernels, steps, updates),
        "gpu kernels": _of_check("gpu_h200.json", kernels, norms),
        "gpu tickets": "\n".join(tickets(runs)),
    }


def _of_check(name: str, *tables: Callable[[Sequence[Record]], list[str]]) -> str:
    """The machine of a run of gpu_check.sh, and tables of its rows."""
    check = json.loads((RESULTS / name).read_text())
    versions = f"CUDA {check['cuda']}, torch {check['torch']}, {check['date']}, commit {check['commit']}"
    return "\n\n".join([f"{check['gpu']}, {versions}.", *("\n".join(make(check["rows"])) for make in tables)])


def filled(text: str) -> str:
    """A Markdown text with the tables between its marks."""
    for name, block in blocks().items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        text = re.sub(f"{begin}\n.*?{end}", lambda _: f"{begin}\n{block}\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


def documents() -> list[Path]:
    """The Markdown files that have marks."""
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return [path for path in files if any(f"<!-- {name}: begin -->" in path.read_text() for name in blocks())]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    for path in documents():
        path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
