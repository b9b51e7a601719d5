"""`masked_conv2d` and its gradients against PyTorch's dense convolution.

    python benchmarks/bench_masked_conv2d.py [--threads 1] [--batch 64] [--device cuda] [--out FILE.csv]
    make bench

convolutions.py says which functions are timed. On the CPU: float32, NCHW in and out, all conversion included, against
the better of PyTorch's NCHW and channels_last convolution. "ours_unpacked" gathers the values from the weight in each
call, as a training step does. If SparseProp is installed (`pip install sparseprop`), it takes part with unstructured
masks; its one backward call computes both gradients.

On a GPU: bfloat16, channels_last, against cuDNN, each side as a CUDA graph. Block (1, 1) uses cuDNN on a masked weight;
there a ratio of 1 is the aim.

Ratios depend on the machine, so each is printed next to its bound: dense time / the least time that the pass can take
by `machine.measured_peak` and `convolutions.least_work`. GFLOP/s count no taps on padding. ATEN_CPU_CAPABILITY=avx2
limits only our side; for PyTorch's convolutions and the peak also set ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import harness
import pytest
import torch
from convolutions import DENSE, Layer, MaskedConvolution, least_work
from harness import Case, Record, label_of, table
from timing import Side

from sparse_adv import ops

Masks = list[tuple[tuple[int, ...], float]]
RESNET18, WRN_34_10 = [(64, 32), (128, 16), (256, 8), (512, 4)], [(160, 32), (320, 16), (640, 8)]
LAYERS = {"cpu": RESNET18, "cuda": RESNET18 + WRN_34_10}  # channels, pixels a side: 3x3 layers at CIFAR size
BATCHES = {"cpu": (64,), "cuda": (128, 512)}
BLOCKS: list[tuple[int, ...]] = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (1, 1, 1, 3), (1, 1, 3, 3)]
MASKS: dict[str, Masks] = {
    "cpu": [(block, density) for block in BLOCKS for density in (0.2, 0.1, 0.05, 0.02)],
    "cuda": [((1, 1), 0.1), ((32, 32), 0.1), ((64, 64), 0.2), ((64, 64), 0.1)],
}
SPARSEPROP = importlib.util.find_spec("sparseprop") is not None


def cases(device: str, batches: Sequence[int], masks: Masks, quick: bool = False) -> Iterator[Case]:
    for batch in batches:
        for block, density in masks:
            for channels, size in LAYERS[device]:
                yield from cases_of(channels, size, batch, block, density, device, quick).values()


@lru_cache(maxsize=1)
def cases_of(
    channels: int, size: int, batch: int, block: tuple[int, ...], density: float, device: str, quick: bool = False
) -> dict[str, Case]:
    """The case of each pass, after a check that our sides are right."""
    if quick:
        channels, batch = channels // 16, 2
    convolution = MaskedConvolution(Layer(channels, channels, size, batch), block, density, device)
    convolution.check()
    kept = round(float(convolution.mask.float().mean()), 4)
    labels = {"layer": f"{channels}@{size}", "batch": batch, "block": label_of(block), "density": density, "kept": kept}
    passes = {name: convolution.case(name, labels) for name in ops.PASSES}
    if device == "cpu":
        passes["forward"] = _with(passes["forward"], ours_unpacked=partial(convolution.forward, convolution.pattern))
        if SPARSEPROP and block == (1, 1):
            forward, backward = sparseprop_sides(convolution)
            passes["forward"] = _with(passes["forward"], sparseprop=forward)
            passes["grad_weight"] = _with(passes["grad_weight"], sparseprop_both_gradients=backward)
    return passes


def _with(case: Case, **sides: Side) -> Case:
    """The case with more sides, which do not count for its ratio."""
    return replace(case, sides={**case.sides, **sides})


def sparseprop_sides(convolution: MaskedConvolution) -> tuple[Side, Side]:
    """Forward and backward of SparseProp's layer; along rows from 32 pixels on, as its documentation says."""
    from sparseprop.modules import SparseConv2d

    weight, input, grad = convolution.weight, convolution.input, convolution.grad
    dense = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=1, bias=False)
    dense.weight.data.copy_(weight)
    layer = SparseConv2d.from_dense(dense, vectorizing_over_on=input.shape[3] >= 32)
    source = input.clone().requires_grad_()
    output = layer(source)
    torch.testing.assert_close(output, torch.conv2d(input, weight, None, 1, 1), rtol=1e-3, atol=1e-3)
    wanted = [source, *layer.parameters()]
    return lambda: layer(input), lambda: torch.autograd.grad(
        output, wanted, grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def dense_table(records: Sequence[Record]) -> str:
    """GFLOP/s of the dense convolution in its better layout: medians over the records of a pass and layer."""
    layers = _distinct(records, "layer")
    lines = []
    for name in ops.PASSES:
        rates = [
            statistics.median(
                dense_gflops(record) for record in records if (record["pass"], record["layer"]) == (name, layer)
            )
            for layer in layers
        ]
        lines.append([name, *(f"{rate:.0f}" for rate in (*rates, statistics.mean(rates)))])
    return "\n".join(table(["dense, GFLOP/s", *layers, "mean"], lines))


def dense_gflops(record: Record) -> float:
    channels, size = map(int, str(record["layer"]).split("@"))
    everything = torch.ones(channels, channels, 3, 3, dtype=torch.bool)
    macs, _ = least_work(everything, (int(record["batch"]), channels, size, size))
    return 2e-6 * macs / dense_ms(record)


def ratio_table(records: Sequence[Record]) -> str:
    """How many times as long the better dense convolution takes, "of" the bound if there is one.

    Geometric means over the layers, and in brackets the lowest and the highest ratio.
    """

    def cell(found: list[Record]) -> str:
        reached = [float(record["ratio"]) for record in found]
        bounds = [dense_ms(record) / float(record["bound_ms"]) for record in found if "bound_ms" in record]
        of = f" of {statistics.geometric_mean(bounds):.1f}" if bounds else ""
        return f"{statistics.geometric_mean(reached):.1f}{of} ({min(reached):.1f}-{max(reached):.1f})"

    return _table(records, cell)


def sparseprop_table(records: Sequence[Record]) -> str:
    """How many times as long SparseProp takes, both gradients together; means as in `ratio_table`."""
    ours = {(r["pass"], r["layer"], r["block"], r["density"]): float(r["ours_ms"]) for r in records}

    def cell(found: list[Record]) -> str:
        ratios = []
        for record in found:
            place = (record["layer"], record["block"], record["density"])
            if record["pass"] == "forward":
                ratios.append(float(record["sparseprop_ms"]) / ours["forward", *place])
            else:
                both = ours["grad_input", *place] + ours["grad_weight", *place]
                ratios.append(float(record["sparseprop_both_gradients_ms"]) / both)
        return f"{statistics.geometric_mean(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"

    compared = [r for r in records if "sparseprop_ms" in r or "sparseprop_both_gradients_ms" in r]
    return _table(compared, cell)


def _table(records: Sequence[Record], cell: Callable[[list[Record]], str]) -> str:
    """A line for each block and pass, a cell for each density."""
    densities = _distinct(records, "density")
    lines = []
    for block in _distinct(records, "block"):
        for name in _distinct(records, "pass"):
            of_pass = [record for record in records if (record["block"], record["pass"]) == (block, name)]
            cells = [cell([r for r in of_pass if str(r["density"]) == density]) for density in densities]
            lines.append([f"({block.replace('x', ', ')})", name, *cells])
    return "\n".join(table(["block", "pass", *(f"density {density}" for density in densities)], lines))


def _distinct(records: Sequence[Record], label: str) -> list[str]:
    return list(dict.fromkeys(str(record[label]) for record in records))


def dense_ms(record: Record) -> float:
    """Milliseconds of the dense convolution in its better layout."""
    return min(float(record[f"{side}_ms"]) for side in DENSE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, tuple(LAYERS))
    parser.add_argument("--batch", type=harness.positive, nargs="+", help="default: 64; on a GPU 128 and 512")
    parser.set_defaults(threads=1)
    options = harness.start(parser, arguments)
    masks = MASKS[options.device][:: 4 if options.quick else 1]
    batches = options.batch or BATCHES[options.device]
    records = harness.measure(cases(options.device, batches, masks, options.quick), options)
    if options.device == "cpu":
        print(f"\n{dense_table(records)}")
        print(
            f'\nTimes as fast as dense PyTorch, "reached of at most" (slowest-fastest layer):\n{ratio_table(records)}'
        )
    if SPARSEPROP and options.device == "cpu":
        print(f"\nHow many times as long SparseProp takes:\n{sparseprop_table(records)}")


# The last decorator's parameter varies slowest: `cases_of` keeps the cases of one layer and mask.
@pytest.mark.parametrize("side", ["ours", *DENSE])
@pytest.mark.parametrize("name", ops.PASSES)
@pytest.mark.parametrize("block", BLOCKS, ids=label_of)
@pytest.mark.parametrize("layer", LAYERS["cpu"], ids=lambda layer: "{0}x{1}x{1}".format(*layer))
def test_masked_conv2d(timed, quick, layer, block, name, side):
    """Density 0.1, batch 64."""
    timed(cases_of(*layer, 64, block, 0.1, "cpu", quick)[name], side)


if __name__ == "__main__":
    main()
