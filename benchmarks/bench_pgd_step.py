"""`pgd_step` and `random_start` against plain PyTorch, eager and compiled.

    python benchmarks/bench_pgd_step.py [--device cuda] [--out benchmarks/results/FILE.jsonl]
    pytest benchmarks/bench_pgd_step.py --benchmark-enable

On a GPU also the share of the copy bandwidth that is reached: a step moves 16 bytes an element (it reads three tensors
and writes one), a start 8; rivals run under CUDA graphs, as ours does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import copy_bandwidth, interleaved, interleaved_graphs, write_rows
from torch import Tensor

from sparse_adv.ops import pgd_step, random_start, reference

ALPHA, EPS = 2 / 255, 8 / 255
SHAPES = {
    "cpu": [(128, 3, 32, 32), (1024, 3, 32, 32), (64, 3, 224, 224)],
    "cuda": [(128, 3, 32, 32), (512, 3, 32, 32), (512, 3, 224, 224)],
}
Sides = dict[str, Callable[[], Tensor]]


def images(shape: tuple[int, ...], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    clean = torch.rand(shape, device=device)
    return (clean + 0.02 * torch.randn_like(clean)).clamp(0, 1), torch.randn_like(clean), clean


def uniform_start(clean: Tensor, eps: float) -> Tensor:
    """The start as it is written everywhere."""
    return (clean + torch.empty_like(clean).uniform_(-eps, eps)).clamp(0, 1)


def sides_of(shape: tuple[int, ...], device: str) -> Iterator[tuple[str, int, Sides]]:
    """What is timed, its bytes an element, and the sides, ours first."""
    adv, grad, clean = images(shape, device)
    seed = torch.tensor([1, 0], device=device)
    for norm in ("linf", "l2"):
        step = (adv, grad, clean, ALPHA, EPS, norm)
        torch.testing.assert_close(pgd_step(*step), reference.pgd_step(*step))
        yield (
            f"pgd_step {norm}",
            16,
            {
                "ours": partial(pgd_step, *step),
                "eager": partial(reference.pgd_step, *step),
                "compile": partial(torch.compile(reference.pgd_step), *step),
            },
        )
    yield (
        "pgd_step linf, bfloat16 gradient",
        14,
        {
            "ours": partial(pgd_step, adv, grad.bfloat16(), clean, ALPHA, EPS),
            "eager": partial(reference.pgd_step, adv, grad.bfloat16(), clean, ALPHA, EPS),
        },
    )
    yield (
        "random_start linf",
        8,
        {
            "ours": partial(random_start, clean, EPS, "linf", seed),
            "eager": partial(uniform_start, clean, EPS),
            "compile": partial(torch.compile(uniform_start), clean, EPS),
        },
    )


def rows(device: str) -> Iterator[dict]:
    bandwidth = copy_bandwidth("cuda") if device == "cuda" else None
    for shape in SHAPES[device]:
        for name, element_bytes, sides in sides_of(shape, device):
            times = interleaved_graphs(sides) if device == "cuda" else interleaved(sides, 30)
            median = times["ours"]["median"]
            row = {
                "op": name,
                "shape": shape,
                "dtype": "float32",
                "seconds": times,
                "ratios": {rival: found["median"] / median for rival, found in times.items() if rival != "ours"},
                "bytes_per_second": element_bytes * torch.Size(shape).numel() / median,
            }
            yield row if bandwidth is None else row | {"of_copy_bandwidth": row["bytes_per_second"] / bandwidth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    measured = []
    for row in rows(arguments.device):
        measured.append(row)
        write_rows(arguments.out, measured)  # a time limit must not lose what is there
        ratios = ", ".join(f"{rival} {ratio:.2f}x" for rival, ratio in row["ratios"].items())
        share = f", {row['of_copy_bandwidth']:.0%} of copy" if "of_copy_bandwidth" in row else ""
        median = row["seconds"]["ours"]["median"] * 1e6
        print(f"{row['op']:<34}{'x'.join(map(str, row['shape'])):<16}{median:10.1f} us   {ratios} of that time{share}")


@pytest.mark.parametrize("side", ["ours", "eager", "compile"])
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=lambda shape: "x".join(map(str, shape)))
def test_linf_step(benchmark, shape, side):
    benchmark.group = str(shape)
    benchmark(next(sides_of(shape, "cpu"))[2][side])


if __name__ == "__main__":
    main()
