"""Time of a convolution against density and against batch, as a picture for docs/results/cpu_kernels.md.

    python benchmarks/plot_masked_conv2d.py [--rows FILE.csv] [--picture FILE.svg]

Without --rows it measures first and writes the rows to --out. 128 channels, 16 x 16 pixels, 3x3, float32, one thread,
forward on packed values. "Ideal" is the dense time times the density.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_masked_conv2d import cases_of, dense_ms
from harness import Case, Record

from sparse_adv.files import replacing

CHANNELS, SIZE, BATCH, DENSITY = 128, 16, 64, 0.1
DENSITIES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0]
BATCHES = [1, 4, 16, 24, 32, 48, 64, 96, 128]
BLOCKS = [(1, 1), (4, 4)]
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "results" / "masked_conv2d.svg"


def cases(quick: bool) -> Iterator[Case]:
    for block in BLOCKS:
        places = [(BATCH, density) for density in DENSITIES]
        places += [(batch, DENSITY) for batch in BATCHES if batch != BATCH]
        for batch, density in places[:1] if quick else places:
            yield cases_of(CHANNELS, SIZE, batch, block, density, "cpu", quick)["forward"]


def draw(records: Sequence[Record], path: Path) -> None:
    """Lines over density at batch 64 on the left, over batch at density 0.1 on the right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, label, fixed in ((left, "density", ("batch", BATCH)), (right, "batch", ("density", DENSITY))):
        line = sorted((r for r in records if r[fixed[0]] == fixed[1]), key=lambda record: float(record[label]))
        for block in dict.fromkeys(str(record["block"]) for record in records):
            of_block = [record for record in line if record["block"] == block]
            values = [float(record[label]) for record in of_block]
            ours = [float(record["ours_ms"]) for record in of_block]
            axes.plot(values, ours, marker="o", label=f"block ({block.replace('x', ', ')})")
        dense = [dense_ms(record) for record in of_block]
        axes.plot(values, dense, color="black", label="dense PyTorch, the better layout")
        ideal = [float(record["density"]) * time for record, time in zip(of_block, dense, strict=True)]
        axes.plot(values, ideal, color="black", linestyle=":", label="ideal: dense x density")
        axes.set(xlabel=label, ylabel="ms", ylim=(0, None))
    left.set_title(f"{CHANNELS} channels, {SIZE} x {SIZE}, batch {BATCH}")
    right.set_title(f"density {DENSITY}")
    left.legend(fontsize="small")
    kind = path.suffix[1:] or "png"
    with replacing(path) as partial, plt.rc_context({"svg.fonttype": "none"}):  # text as text: a fifth of the size
        figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--rows", type=Path, help="draw these instead of measuring")
    parser.add_argument("--picture", type=Path, help="default: the published picture")
    parser.set_defaults(threads=1)
    options = harness.start(parser, arguments)
    if options.quick and not options.picture:
        parser.error("--quick needs --picture: toy sizes are not for the published picture")
    picture = options.picture or PICTURE
    records = harness.read_records(options.rows)[1] if options.rows else harness.measure(cases(options.quick), options)
    draw(records, picture)
    print(picture)


if __name__ == "__main__":
    main()
