"""The convolutions of real networks, and odd sizes: is the op ever slower than dense PyTorch?

    python benchmarks/bench_layers.py [--threads 2] [--block 4,4] [--density 0.1] [--out FILE.csv]
    python benchmarks/bench_layers.py --random 40 [--seed 0] ...
    make bench

`--random N` measures N layers of random shapes instead of those listed here. This shows whether the kernels are also
fast on sizes that they were not tuned on.

Each pass takes the kernel that the library chooses, and is timed against the better of PyTorch's NCHW and channels_last
convolution; convolutions.py says which functions are timed. A pass loses time if it takes over 5 % longer than a dense
one of over 2 ms, or over 60 us longer than a shorter one. Next to each time is its share of the bound, as in
bench_masked_conv2d.py. The bound is that of the kept weights, even if the dense kernel is chosen.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import harness
import pytest
from bench_masked_conv2d import dense_ms
from convolutions import DENSE, Layer, MaskedConvolution
from harness import Case, Record, label_of
from torch import Tensor, nn

from sparse_adv import models, ops
from sparse_adv.masks.layers import run_once

NETWORKS = ("resnet18", "vgg16", "wrn-28-4", "wrn-34-10")
IMAGENET = [  # a ResNet-18 and -50 at 224 pixels, batch 16
    Layer(3, 64, 224, 16, 7, 2),
    Layer(64, 64, 56, 16),
    Layer(64, 128, 56, 16, 3, 2),
    Layer(128, 128, 28, 16),
    Layer(256, 256, 14, 16),
    Layer(512, 512, 7, 16),
    Layer(64, 256, 56, 16, 1),
    Layer(256, 64, 56, 16, 1),
    Layer(1024, 2048, 14, 16, 1, 2),
]
ODD = [Layer(c, c, size, batch) for batch in (1, 17, 100) for c in (24, 100) for size in (7, 14, 28, 33)]
SMALL_MS, SLOWER, LOST_MS = 2.0, 1.05, 0.06


def layers(quick: bool = False) -> Iterator[tuple[str, Layer]]:
    """Each different layer once, with the network that it comes from."""
    seen = set()
    for name in NETWORKS:
        for layer in layers_of(name, quick):
            if layer not in seen:
                seen.add(layer)
                yield name, layer
    if not quick:
        yield from (("224 pixels", layer) for layer in IMAGENET)
        yield from (("odd", layer) for layer in ODD)


def random_layers(count: int, seed: int) -> Iterator[tuple[str, Layer]]:
    """Layers of random shapes, 7 to 32 pixels a side, each with the name of its kind."""
    draw = random.Random(seed)
    for _ in range(count):
        size, filter, stride = draw.randint(7, 32), draw.choice((3, 3, 3, 1)), draw.choice((1, 1, 1, 2))
        channels, out_channels = (4 * round(draw.uniform(6, 6 + 800 / size)) for _ in range(2))
        layer = Layer(channels, out_channels, size, draw.randint(16, 64), filter, stride)
        yield f"random {filter}x{filter} stride {stride}", layer


@lru_cache
def layers_of(network: str, quick: bool) -> list[Layer]:
    """The different convolutions of a network at CIFAR size; wide ones at batch 16, others at 64."""
    found: list[Layer] = []

    def visit(layer: nn.Conv2d, input: Tensor, output: Tensor) -> None:
        channels, out_channels = layer.in_channels, layer.out_channels
        batch = 1 if quick else 64 if channels * out_channels < 160 * 160 else 16
        found.append(Layer(channels, out_channels, input.shape[2], batch, layer.kernel_size[0], layer.stride[0]))

    run_once(models.build(network, width=4 if quick else None), (1, 3, 32, 32), visit)
    return list(dict.fromkeys(found))


@lru_cache(maxsize=1)
def cases_of(network: str, layer: Layer, block: tuple[int, ...], density: float) -> list[Case]:
    """A case for each pass."""
    convolution = MaskedConvolution(layer, block, density, kernel="auto")
    strides, paddings, *_ = convolution.geometry
    plan = ops.plan(convolution.packed, convolution.input, strides, paddings)._asdict()
    labels = {"network": network, **layer._asdict(), "block": label_of(block), "density": density}
    return [convolution.case(name, {**labels, "kernel": plan[name].kernel}, rounds=7) for name in ops.PASSES]


def slower(record: Record) -> bool:
    """Whether a pass loses time."""
    ours, dense = float(record["ours_ms"]), dense_ms(record)
    return ours > dense * SLOWER if dense > SMALL_MS else ours > dense + LOST_MS


def means(records: Sequence[Record]) -> str:
    """A line for each network: geometric means of the ratios of each pass, and of forward and grad_input together."""
    lines = []
    for network in dict.fromkeys(record["network"] for record in records):
        own = [record for record in records if record["network"] == network]
        ratios = {name: [float(r["ratio"]) for r in own if r["pass"] == name] for name in ops.PASSES}
        ratios["forward + grad_input"] = [
            sum(map(dense_ms, pair)) / sum(float(record["ours_ms"]) for record in pair)
            for pair in zip(*([r for r in own if r["pass"] == name] for name in ops.PASSES[:2]), strict=True)
        ]
        cells = (f"{name} {statistics.geometric_mean(found):.2f}" for name, found in ratios.items())
        lines.append(f"{network}, {len(own) // len(ops.PASSES)} layers: {', '.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--block", type=harness.integers, default=(4, 4))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--random", type=int, default=0, metavar="N", help="measure N layers of random shapes")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes")
    parser.set_defaults(threads=2)
    options = harness.start(parser, arguments)
    chosen = random_layers(options.random, options.seed) if options.random else layers(options.quick)
    cases = (case for network, layer in chosen for case in cases_of(network, layer, options.block, options.density))
    records = harness.measure(cases, options)
    print(f"\nTimes as fast as dense:\n{means(records)}")
    losers = [record for record in records if slower(record)]
    print(f"\n{len(losers)} of {len(records)} passes lose time" + ":" * bool(losers))
    print("\n".join(map(harness.line_of, losers)))


@pytest.mark.parametrize("side", ["ours", *DENSE])
@pytest.mark.parametrize("name", ops.PASSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_layers(timed, quick, network, name, side):
    """All different convolutions of a network one after another, block (4, 4), density 0.1."""
    timed(whole_network(network, quick)[name], side)


@lru_cache(maxsize=1)
def whole_network(network: str, quick: bool) -> dict[str, Case]:
    """A case for each pass, of all layers together."""
    by_layer = [cases_of(network, layer, (4, 4), 0.1) for layer in layers_of(network, quick)]
    return {
        name: _together(name, network, cases)
        for name, cases in zip(ops.PASSES, zip(*by_layer, strict=True), strict=True)
    }


def _together(name: str, network: str, cases: Sequence[Case]) -> Case:
    def all_of(side: str) -> None:
        for case in cases:
            case.sides[side]()

    sides = {side: partial(all_of, side) for side in cases[0].sides}
    labels = {"op": "masked_conv2d", "pass": name, "network": network}
    macs, moved = sum(case.macs for case in cases), sum(case.moved for case in cases)
    return Case(labels, sides, cases[0].rivals, macs, moved)


if __name__ == "__main__":
    main()
