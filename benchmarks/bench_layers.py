"""The convolutions of real networks, and odd sizes: is the op ever slower than dense PyTorch?

    python benchmarks/bench_layers.py [--threads 2] [--block 4 4] [--density 0.1] [--out benchmarks/results/FILE.jsonl]

Each pass takes the path that the library's table chooses, and is timed against the better of PyTorch's NCHW and
channels_last convolution. Time lost counts as more than 5 % where dense takes over 2 ms, below that as more than 60 us
(forward) or 60 us (each gradient). Beside each ratio to dense stands its bound, as in bench_masked_conv2d.py; it is the
bound of the kept weights, also where the dense path is taken.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from harness import (
    Peak,
    convolution_work,
    interleaved,
    keep_freed_memory,
    mask_of,
    measured_peak,
    print_machine,
    write_rows,
)
from torch import Tensor, nn

from sparse_adv import models, ops
from sparse_adv.masks.layers import run_once

NETWORKS = ["resnet18", "vgg16", "wrn-28-4", "wrn-34-10"]
IMAGENET = [  # channels in and out, filter, stride, pixels a side: a ResNet-18 and -50 at 224 pixels
    *((3, 64, 7, 2, 224), (64, 64, 3, 1, 56), (64, 128, 3, 2, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14)),
    *((512, 512, 3, 1, 7), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (1024, 2048, 1, 2, 14)),
]
SMALL_DENSE, SLOWER, LOST = 2e-3, 1.05, 60e-6


class Layer(NamedTuple):
    channels: int
    out_channels: int
    filter: int
    stride: int
    size: int
    batch: int
    where: str


def layers() -> Iterator[Layer]:
    seen = set()
    for name in NETWORKS:
        found: list[tuple[int, ...]] = []

        def note(layer: nn.Conv2d, input: Tensor, output: Tensor, found: list[tuple[int, ...]] = found) -> None:
            found.append((layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], input.shape[2]))

        run_once(models.build(name), (1, 3, 32, 32), note)
        for facts in found:
            if facts not in seen:
                seen.add(facts)
                yield Layer(*facts, batch=64 if facts[0] * facts[1] < 160 * 160 else 16, where=name)
    for facts in IMAGENET:
        yield Layer(*facts, batch=16, where="224 pixels")
    for batch in (1, 17, 100):
        for channels in (24, 100):
            for size in (7, 14, 28, 33):
                yield Layer(channels, channels, 3, 1, size, batch, "odd")


def rows_of(layer: Layer, block: tuple[int, int], density: float, peak: Peak) -> Iterator[dict]:
    shape = (layer.out_channels, layer.channels, layer.filter, layer.filter)
    mask = mask_of(shape, block, density)
    pads, strides = (layer.filter // 2,) * 2, (layer.stride,) * 2
    geometry = (strides, pads, (1, 1), 1)
    x, weight = torch.randn(layer.batch, layer.channels, layer.size, layer.size), torch.randn(shape) * mask
    pattern = ops.pack_pattern(ops.compile_pattern(mask, block), weight)
    grad = torch.randn_like(torch.conv2d(x, weight, None, strides, pads))
    native, tensors, last = torch.ops.sparse_adv, pattern.flatten(), torch.channels_last
    images = {"dense": (x, grad), "dense, channels_last": tuple(t.contiguous(memory_format=last) for t in (x, grad))}

    def backward(side: str, which: int) -> Tensor:
        x, grad = images[side]
        wanted = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, strides, pads, (1, 1), False, (0, 0), 1, wanted
        )[which]

    passes = {
        "forward": {
            "ours": lambda: native.masked_conv2d(x, weight, tensors, None, *geometry, None, None, False),
            **{side: lambda side=side: torch.conv2d(images[side][0], weight, None, strides, pads) for side in images},
        },
        "grad_input": {
            "ours": lambda: native.masked_conv2d_grad_input(grad, weight, tensors, x.shape, *geometry),
            **{side: lambda side=side: backward(side, 0) for side in images},
        },
        "grad_weight": {
            "ours": lambda: native.masked_conv2d_grad_weight(grad, x, tensors, *geometry),
            **{side: lambda side=side: backward(side, 1) for side in images},
        },
    }
    bound = peak.seconds(*convolution_work(mask, x.shape, layer.stride, layer.filter // 2))
    chosen = ops.plan(pattern, x, strides, pads)
    for name, sides in passes.items():
        times = interleaved(sides, rounds=7)
        dense, ours = min(times[side]["median"] for side in images), times["ours"]["median"]
        yield {
            "op": "masked_conv2d",
            "pass": name,
            "layer": layer._asdict(),
            "block": block,
            "density": density,
            "dtype": "float32",
            "kernel": getattr(chosen, name).kernel,
            "seconds": times,
            "ratio_to_dense": dense / ours,
            "bound_ratio": dense / bound,
            "bound_seconds": bound,
            "peak": peak._asdict(),
            "slower": ours > dense * SLOWER if dense > SMALL_DENSE else ours > dense + LOST,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--block", type=int, nargs=2, default=(4, 4))
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    peak = measured_peak()
    print_machine(peak)
    measured = []
    for layer in layers():
        cells = []
        for row in rows_of(layer, tuple(arguments.block), arguments.density, peak):
            measured.append(row)
            mark = " slower" if row["slower"] else ""
            ratio = f"{row['ratio_to_dense']:5.2f} of at most {row['bound_ratio']:5.2f}"
            cells.append(f"{row['pass']} {ratio} ({row['kernel']}){mark}")
        what = f"{layer.channels}-{layer.out_channels} {layer.filter}x{layer.filter}/{layer.stride} @{layer.size}"
        print(f"{layer.where:<11}{what:<22} batch {layer.batch:<4}" + "  ".join(cells), flush=True)
    write_rows(arguments.out, measured)
    slower = [row for row in measured if row["slower"]]
    print(f"\n{len(slower)} of {len(measured)} passes lose time")


if __name__ == "__main__":
    main()
