"""`masked_conv2d` and its gradients on a GPU against cuDNN: bfloat16, channels_last, all under CUDA graphs.

    python benchmarks/bench_masked_conv2d_cuda.py [--out benchmarks/results/FILE.jsonl]

The floor of a pass is its bound by `harness.measured_peak` and `harness.convolution_work`; "of_floor" is the floor's
share of our time. Weights are packed, as the passes of an attack find them. Block (1, 1) takes cuDNN on a masked
weight: there a ratio of 1 is the aim.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from harness import convolution_work, interleaved_graphs, mask_of, measured_peak, write_rows

from sparse_adv import ops
from sparse_adv.ops import reference

# (channels, pixels a side): the stages of a CIFAR ResNet-18 and of a WRN-34-10; 3x3, stride 1.
LAYERS = [(64, 32), (128, 16), (256, 8), (512, 4), (160, 32), (320, 16), (640, 8)]
BATCHES = [128, 512]
MASKS = [((1, 1), 0.1), ((32, 32), 0.1), ((64, 64), 0.2), ((64, 64), 0.1)]
GEOMETRY = ((1, 1), (1, 1), (1, 1), 1)
Sides = dict[str, Callable[[], torch.Tensor]]


def sides_of(channels: int, size: int, batch: int, mask: torch.Tensor, block: tuple[int, int]) -> dict[str, Sides]:
    """For each pass, what to time, ours first. Asserts that ours is right."""
    like = {"dtype": torch.bfloat16, "device": "cuda", "memory_format": torch.channels_last}
    torch.manual_seed(0)
    x, grad = (torch.randn(batch, channels, size, size).to(**like) for _ in range(2))
    weight = (torch.randn(mask.shape) * mask.cpu() / (9 * channels) ** 0.5).to(**like)
    pattern = ops.compile_pattern(mask, block)
    packed = ops.pack_pattern(ops.set_kernels(pattern, "sparse", "sparse", "sparse"), weight).flatten()
    native, tensors = torch.ops.sparse_adv, pattern.flatten()

    def dense(which: int) -> torch.Tensor:
        wanted = [which == 0, which == 1, False]
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, *GEOMETRY[:3], False, (0, 0), GEOMETRY[3], wanted
        )[which]

    passes: dict[str, Sides] = {
        "forward": {
            "ours": lambda: native.masked_conv2d(x, weight, packed, None, *GEOMETRY, None, None, False),
            "dense": lambda: torch.conv2d(x, weight, None, 1, 1),
        },
        "grad_input": {
            "ours": lambda: native.masked_conv2d_grad_input(grad, weight, packed, x.shape, *GEOMETRY),
            "dense": lambda: dense(0),
        },
        "grad_weight": {
            "ours": lambda: native.masked_conv2d_grad_weight(grad, x, tensors, *GEOMETRY),
            "dense": lambda: dense(1),
        },
    }
    few = slice(0, 2)
    expected = reference.masked_conv2d(x[few].double(), weight.double(), mask, None, *GEOMETRY)
    torch.testing.assert_close(passes["forward"]["ours"]()[few].double(), expected, rtol=2e-2, atol=2e-2)
    for name, scale in (("grad_input", 1.0), ("grad_weight", (batch * size**2) ** 0.5)):
        found, rival = (passes[name][side]().float() for side in ("ours", "dense"))
        kept = rival * mask if name == "grad_weight" else rival
        torch.testing.assert_close(found, kept, rtol=2e-2, atol=2e-2 * scale)
    return passes


def rows() -> Iterator[dict]:
    torch.backends.cudnn.benchmark = True
    peak = measured_peak("cuda")
    for batch in BATCHES:
        for channels, size in LAYERS:
            for block, density in MASKS:
                mask = mask_of((channels, channels, 3, 3), block, density).cuda()
                floor = peak.seconds(*convolution_work(mask, (batch, channels, size, size), element_bytes=2))
                kept = float(mask.float().mean())
                for name, sides in sides_of(channels, size, batch, mask, block).items():
                    times = interleaved_graphs(sides)
                    median = times["ours"]["median"]
                    yield {
                        "op": f"masked_conv2d {name}",
                        "case": f"{channels}@{size}, batch {batch}, block {block}, density {kept:.2f}",
                        "dtype": "bfloat16",
                        "seconds": times,
                        "ratios": {"dense": times["dense"]["median"] / median},
                        "floor_seconds": floor,
                        "of_floor": floor / median,
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    measured = []
    for row in rows():
        measured.append(row)
        write_rows(arguments.out, measured)  # a time limit must not lose what is there
        print(
            f"{row['op']:<26}{row['case']:<56}{row['ratios']['dense']:6.2f}x dense, {row['of_floor']:.0%} of the floor"
        )


if __name__ == "__main__":
    main()
