"""`masked_conv2d` and its gradients against the better of PyTorch's NCHW and channels_last convolution, float32.

    python benchmarks/bench_masked_conv2d.py [--threads 1] [--batch 64] [--out benchmarks/results/FILE.jsonl]
    pytest benchmarks/bench_masked_conv2d.py --benchmark-enable

NCHW in and out, all conversion included. Forward and grad_input run on packed values, as the passes of an attack do;
"ours, unpacked" gathers them from the weight in each call, as a training step does. Where SparseProp is installed
(`pip install sparseprop`) it takes part with unstructured masks; its one backward call forms both gradients.

Ratios depend on the machine, so each stands beside its bound, the dense time over the least time that the pass can take
by `harness.measured_peak` and `harness.convolution_work`. GFLOP/s count no taps on padding. ATEN_CPU_CAPABILITY=avx2
lowers our side alone: for PyTorch's convolutions and the peak set ONEDNN_MAX_CPU_ISA=AVX2 and
MKL_ENABLE_INSTRUCTIONS=AVX2 too.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from harness import (
    Peak,
    convolution_work,
    environment,
    interleaved,
    keep_freed_memory,
    mask_of,
    measured_peak,
    print_machine,
    write_rows,
)

from sparse_adv import ops
from sparse_adv.ops import reference

LAYERS = [(64, 32), (128, 16), (256, 8), (512, 4)]  # channels, pixels a side: the stages of a CIFAR ResNet-18
BLOCKS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (1, 1, 1, 3), (1, 1, 3, 3)]
DENSITIES = [0.2, 0.1, 0.05, 0.02]
PASSES = ("forward", "grad_input", "grad_weight")
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)  # 3x3 filters, stride 1
SPARSEPROP = importlib.util.find_spec("sparseprop") is not None
Sides = dict[str, Callable[[], object]]


def sides_of(
    channels: int, size: int, batch: int, block: Sequence[int], density: float, rival: bool = False
) -> dict[str, Sides]:
    """For each pass, what to time; the first side is ours, `rival` adds SparseProp. Asserts that ours is right."""
    mask = mask_of((channels, channels, 3, 3), block, density)
    torch.manual_seed(0)
    x, grad = torch.randn(2, batch, channels, size, size)
    weight = torch.randn(mask.shape) * mask
    pattern = ops.set_kernels(ops.compile_pattern(mask, block), "sparse", "sparse", "sparse")
    tensors, packed = pattern.flatten(), ops.pack_pattern(pattern, weight).flatten()
    native = torch.ops.sparse_adv
    last = {name: t.contiguous(memory_format=torch.channels_last) for name, t in {"x": x, "grad": grad}.items()}

    def backward(grad: torch.Tensor, x: torch.Tensor, which: int) -> torch.Tensor:
        wanted = [which == 0, which == 1, False]
        stride, padding, dilation, groups = GEOMETRY
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, wanted
        )[which]

    forward: Sides = {
        "ours": lambda: native.masked_conv2d(x, weight, packed, None, *GEOMETRY, None, None, False),
        "ours, unpacked": lambda: native.masked_conv2d(x, weight, tensors, None, *GEOMETRY, None, None, False),
        "dense": lambda: torch.conv2d(x, weight, None, 1, 1),
        "dense, channels_last": lambda: torch.conv2d(last["x"], weight, None, 1, 1),
    }
    grad_input: Sides = {
        "ours": lambda: native.masked_conv2d_grad_input(grad, weight, packed, x.shape, *GEOMETRY),
        "dense": lambda: backward(grad, x, 0),
        "dense, channels_last": lambda: backward(last["grad"], last["x"], 0),
    }
    grad_weight: Sides = {
        "ours": lambda: native.masked_conv2d_grad_weight(grad, x, tensors, *GEOMETRY),
        "dense": lambda: backward(grad, x, 1),
        "dense, channels_last": lambda: backward(last["grad"], last["x"], 1),
    }
    few = slice(0, 2)
    expected = reference.masked_conv2d(x[few].double(), weight.double(), mask, None, *GEOMETRY)
    torch.testing.assert_close(forward["ours"]()[few].double(), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grad_input["ours"](), grad_input["dense"](), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad_weight["ours"](), grad_weight["dense"]() * mask, rtol=1e-3, atol=0.05)
    if rival:
        forward["sparseprop"], grad_weight["sparseprop, both gradients"] = sparseprop_sides(weight, x, grad)
    return {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}


def sparseprop_sides(
    weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward and backward of its layer, vectorised along rows from 32 pixels on, as its documentation advises."""
    from sparseprop.modules import SparseConv2d

    dense = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=1, bias=False)
    dense.weight.data.copy_(weight)
    layer = SparseConv2d.from_dense(dense, vectorizing_over_on=x.shape[3] >= 32)
    source = x.clone().requires_grad_()
    output = layer(source)
    torch.testing.assert_close(output, torch.conv2d(x, weight, None, 1, 1), rtol=1e-3, atol=1e-3)
    wanted = [source, *layer.parameters()]
    return lambda: layer(x), lambda: torch.autograd.grad(
        output, wanted, grad, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def rows(batch: int, peak: Peak) -> Iterator[dict]:
    for block in BLOCKS:
        for density in DENSITIES:
            for channels, size in LAYERS:
                mask = mask_of((channels, channels, 3, 3), block, density)
                bound = peak.seconds(*convolution_work(mask, (batch, channels, size, size)))
                dense_work, _ = convolution_work(torch.ones_like(mask), (batch, channels, size, size))
                passes = sides_of(channels, size, batch, block, density, SPARSEPROP and block == (1, 1))
                times = {name: interleaved(sides) for name, sides in passes.items()}
                both = times["grad_input"]["ours"]["median"] + times["grad_weight"]["ours"]["median"]
                for name, found in times.items():
                    ours = found["ours"]["median"]
                    dense = min(found["dense"]["median"], found["dense, channels_last"]["median"])
                    rival = found.get("sparseprop", found.get("sparseprop, both gradients"))
                    yield {
                        "op": "masked_conv2d",
                        "pass": name,
                        "layer": f"{channels}@{size}",
                        "batch": batch,
                        "block": block,
                        "density": density,
                        "dtype": "float32",
                        "kernel": "sparse",
                        "seconds": found,
                        "ratio_to_dense": dense / ours,
                        "bound_ratio": dense / bound,
                        "bound_seconds": bound,
                        "dense_gflops": 2e-9 * dense_work / dense,
                        "peak": peak._asdict(),
                        # Of grad_weight: its backward to both of our gradients.
                        "ratio_to_sparseprop": rival and rival["median"] / (ours if name == "forward" else both),
                    }


def dense_table(measured: list[dict]) -> str:
    """GFLOP/s of the dense convolution, the better layout: medians over the rows of a pass and layer."""
    layers = [f"{channels}@{size}" for channels, size in LAYERS]
    lines = [f"| dense, GFLOP/s | {' | '.join(layers)} | mean |", "| --- |" + " --- |" * (len(layers) + 1)]
    for name in PASSES:
        found = [
            statistics.median(row["dense_gflops"] for row in measured if (row["pass"], row["layer"]) == (name, layer))
            for layer in layers
        ]
        lines.append(f"| {name} | " + " | ".join(f"{rate:.0f}" for rate in (*found, statistics.mean(found))) + " |")
    return "\n".join(lines)


def table(measured: list[dict], ratio: str = "ratio_to_dense", bound: str | None = "bound_ratio") -> str:
    """Ratios "of" their bounds: geometric means over the layers and, in brackets, the lowest and highest ratio."""
    lines = [
        "| block | pass | " + " | ".join(f"density {density}" for density in DENSITIES) + " |",
        "| --- | --- |" + " --- |" * len(DENSITIES),
    ]
    for block in BLOCKS:
        for name in PASSES:
            cells = []
            for density in DENSITIES:
                key = (block, name, density)
                found = [
                    row for row in measured if (tuple(row["block"]), row["pass"], row["density"]) == key and row[ratio]
                ]
                if found:
                    ratios = [row[ratio] for row in found]
                    of = f" of {statistics.geometric_mean(row[bound] for row in found):.1f}" if bound else ""
                    cells.append(f"{statistics.geometric_mean(ratios):.1f}{of} ({min(ratios):.1f}-{max(ratios):.1f})")
            if cells:
                lines.append(f"| {block} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    peak = measured_peak()
    print_machine(peak)
    measured = []
    for row in rows(arguments.batch, peak):
        measured.append(row)
        ratio = f"{row['ratio_to_dense']:6.2f} of at most {row['bound_ratio']:.2f}"
        print(f"{row['layer']:>7} {row['block']} {row['density']:<5} {row['pass']:<12}{ratio}", flush=True)
    write_rows(arguments.out, measured)
    print(f"\nbatch {arguments.batch}\n\n{dense_table(measured)}")
    print(f'\nTimes as fast as dense PyTorch, "reached of at most" (slowest-fastest layer):\n{table(measured)}')
    if SPARSEPROP:
        print(f"\nTo SparseProp, the gradients together:\n{table(measured, 'ratio_to_sparseprop', bound=None)}")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("side", ["ours", "dense"])
def test_masked_conv2d(benchmark, layer, block, name, side):
    """A row each at density 0.1, batch 64."""
    benchmark.group = f"{layer[0]}@{layer[1]} {block} {name}"
    benchmark.extra_info.update(environment())
    benchmark.pedantic(sides_of(*layer, 64, block, 0.1)[name][side], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
