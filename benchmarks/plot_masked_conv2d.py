"""Time of a convolution against density and against batch, as a picture.

    python benchmarks/plot_masked_conv2d.py [--out benchmarks/results/masked_conv2d.svg]

128 channels, 16 x 16 pixels, 3x3, float32, one thread, forward on packed values. "Ideal" is the dense time times the
density.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from bench_masked_conv2d import sides_of
from harness import environment, interleaved, keep_freed_memory, write_rows

CHANNELS, SIZE, BATCH, DENSITY = 128, 16, 64, 0.1
DENSITIES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
BATCHES = [1, 4, 16, 24, 32, 48, 64, 96, 128]
BLOCKS = [(1, 1), (4, 4)]
SIDES = ("ours", "dense", "dense, channels_last")


def measure(batch: int, block: tuple[int, int], density: float) -> dict:
    sides = sides_of(CHANNELS, SIZE, batch, block, density)["forward"]
    times = interleaved({name: sides[name] for name in SIDES})
    return {"batch": batch, "block": block, "density": density, "seconds": times}


def milliseconds(row: dict, *sides: str) -> float:
    return 1e3 * min(row["seconds"][side]["median"] for side in sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/masked_conv2d.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, values, label in ((left, DENSITIES, "density"), (right, BATCHES, "batch")):
        for block in BLOCKS:
            found = [
                measure(BATCH, block, value) if axes is left else measure(value, block, DENSITY) for value in values
            ]
            axes.plot(values, [milliseconds(row, "ours") for row in found], marker="o", label=f"block {block}")
            rows += found
        dense = [milliseconds(row, *SIDES[1:]) for row in found]
        axes.plot(values, dense, color="black", label="dense PyTorch, the better layout")
        scale = values if axes is left else [DENSITY] * len(values)
        ideal = [time * share for time, share in zip(dense, scale, strict=True)]
        axes.plot(values, ideal, color="black", linestyle=":", label="ideal: dense x density")
        axes.set(xlabel=label, ylabel="ms", ylim=(0, None))
    left.set_title(f"{CHANNELS} channels, {SIZE} x {SIZE}, batch {BATCH}")
    right.set_title(f"density {DENSITY}")
    left.legend(fontsize="small")
    partial = arguments.out.with_suffix(f".partial{arguments.out.suffix}")
    figure.savefig(partial)
    partial.replace(arguments.out)
    write_rows(arguments.out.with_suffix(".jsonl"), rows)
    print(f"{environment()}\n{arguments.out}")


if __name__ == "__main__":
    main()
