"""The comparisons behind the thresholds of `sparse_adv/engine/winograd.py`, on this machine, which has to be quiet.

    python benchmarks/winograd_thresholds.py [--threads 1] [--out FILE.csv]

A line for each constant: values of what it limits, and how many times as fast as its rival the kernel is there that the
constant decides for (mean over the layers). A threshold fits the machine if that passes 1 near it. All are forward
passes. Dense layers transform their weights in each call.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

import bench_masked_winograd_conv2d as masked
import bench_winograd_conv2d as dense
import harness
from bench_batch_norm_act import SHAPES
from harness import Case, Record, Value

from sparse_adv.engine import winograd

FILTERS = (4, 4, 3, 3)
Comparison = tuple[str, float, str, str, Case]
"""A constant, a value, the side that the constant decides for, its rival, and the case with both."""


def comparisons(shapes: Sequence[tuple[int, int, int, int]]) -> Iterator[Comparison]:
    for channels in (8, 16, 32, 64):
        shape, live = (64, channels, 16, 16), "_LEAST_CHANNELS_OF_LIVE_FILTERS"
        yield "_LEAST_CHANNELS", channels, "ours", "dense_channels_last", dense.case(shape, "forward", tile=4)
        yield live, channels, "ours", "direct", masked.case(shape, "forward", FILTERS, 0.25)
    for tiles in (32, 64, 128, 256):
        for size in (2, 4):  # a tile an image
            case = dense.case((tiles, 128, size, size), "forward", tile=size)
            yield f"_LEAST_TILES of {size} x {size}", tiles, "ours", "dense_channels_last", case
        case = masked.case((tiles, 128, 4, 4), "forward", FILTERS, 0.1)
        yield "_LEAST_TILES_OF_LIVE_FILTERS", tiles, "ours", "direct", case
    for rows, cols in ((4, 4), (5, 5), (2, 5), (2, 2)):
        part = 4 * -(-rows // 4) * -(-cols // 4) / (rows * cols)
        case = masked.case((64, 128, rows, cols), "forward", FILTERS, 0.1)
        yield "_MOST_MULTIPLICATIONS", part, "ours", "direct", case
    for shape in shapes:
        for density in (0.2, 0.3, 0.4, 0.6, 0.8):
            for width in (4, 2, 1):
                case = masked.case(shape, "forward", (width, width), density)
                yield f"_SPARSE_UP_TO of {width}", density, "direct", "winograd", case
                if width == 1:  # almost all filters are live
                    yield "_LEAST_KEPT_OF_LIVE", density, "ours", "direct", case
                case = masked.case(shape, "forward", (width, width, 3, 3), density)
                yield f"_LIVE_UP_TO of {width}", density, "ours", "winograd", case


def cases(device: str, quick: bool) -> Iterator[Case]:
    for constant, value, side, rival, case in comparisons([dense.TOY] if quick else SHAPES[device]):
        labels = {"constant": constant, "value": value, **case.labels}
        yield replace(
            case, labels=labels, sides={"ours": case.sides[side], rival: case.sides[rival]}, rivals=(), macs=0
        )


def summary(records: Sequence[Record]) -> str:
    ratios: dict[str, dict[Value, list[float]]] = {}
    for record in records:
        ratios.setdefault(str(record["constant"]), {}).setdefault(record["value"], []).append(float(record["ratio"]))
    lines = []
    for constant, by_value in ratios.items():
        cells = (f"{value:.3g}: {statistics.geometric_mean(found):.2f}" for value, found in by_value.items())
        lines.append(f"{constant}, now {getattr(winograd, constant.split()[0])}; times as fast at {', '.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.start(harness.argument_parser(__doc__), arguments)
    print(f"\n{summary(harness.measure(cases(options.device, options.quick), options))}")


if __name__ == "__main__":
    main()
