"""What removing channels saves: a PGD-10 update of a ResNet-18 with half of every width, and of inner channels alone.

    python benchmarks/bench_shrink.py [--device cuda] [--out benchmarks/results/FILE.jsonl]

Both sides are dense networks and run the same attack loop; on a CPU in float32, on a GPU in bfloat16 and channels_last
with the attack as a CUDA graph. Multiply-adds are those of a forward pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from bench_attack import Update, our_attack
from harness import interleaved, write_rows
from torch import nn

from sparse_adv import masks
from sparse_adv.models import build
from sparse_adv.nn import count_macs, shrink

SIZES = {"cpu": (64, 32), "cuda": (64, 128)}  # width, batch


def rows(device: str) -> Iterator[dict]:
    torch.backends.cudnn.benchmark = True
    width, batch = SIZES[device]
    torch.manual_seed(0)
    network = build("resnet18", width=width).to(device)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    everything = masks.prune(network, 0.5, "filter", "uniform", dependency_input=x[:1])
    inner = {name: mask for name, mask in everything.items() if name.endswith("conv1") and "." in name}
    for name, kept in {"half of every width": everything, "half of the inner channels": inner}.items():
        small = shrink(network, kept, x[:1]).model
        check(network, kept, small, x)
        sides = {
            "ours": Update(small, our_attack(device), x, y, device == "cuda"),
            "dense": Update(network, our_attack(device), x, y, device == "cuda"),
        }
        for side in sides.values():
            for _ in range(3 if device == "cuda" else 1):
                side()
        times = interleaved(sides, 5, device)
        work = [count_macs(model, x[:1].shape).forward for model in (small, network)]
        yield {
            "op": "PGD-10 update, shrunk",
            "case": f"resnet18 width {width}, batch {batch}, {name}",
            "dtype": "bfloat16" if device == "cuda" else "float32",
            "seconds": times,
            "multiply_adds_kept": work[0] / work[1],
            "ratios": {"dense": times["dense"]["median"] / times["ours"]["median"]},
        }


@torch.no_grad()
def check(network: nn.Module, kept: dict[str, torch.Tensor], small: nn.Module, x: torch.Tensor) -> None:
    """The small network computes what the large one does with its filters masked."""
    masked = build("resnet18", width=SIZES[x.device.type][0]).to(x.device)
    masked.load_state_dict(network.state_dict())
    for name, mask in kept.items():
        masked.get_submodule(name).weight.mul_(mask)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-3, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    measured = []
    for row in rows(arguments.device):
        measured.append(row)
        write_rows(arguments.out, measured)
        median = row["seconds"]["ours"]["median"] * 1e3
        kept = f"{row['multiply_adds_kept']:.2f} of the multiply-adds"
        print(f"{row['case']:<60}{median:9.1f} ms, {row['ratios']['dense']:.2f}x dense, {kept}")


if __name__ == "__main__":
    main()
