"""The time that removing channels saves: a PGD-10 update of a ResNet-18 whose pruned filters `nn.shrink` removed.

    python benchmarks/bench_shrink.py [--device cuda] [--out FILE.csv]
    make bench

Two cases: half of every width removed, and half of only the inner channels. "ours" is the smaller network, "dense" the
whole one. Both are dense networks in the same loop of public functions; on a CPU in float32, on a GPU in bfloat16 and
channels_last with the attack as a CUDA graph. "macs_kept" is a share of the MACs of a forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache, partial

import harness
import pytest
import torch
from bench_attack import Update, our_attack
from harness import Case
from torch import Tensor, nn

from sparse_adv import masks
from sparse_adv.models import build
from sparse_adv.nn import count_macs, shrink

SIZES = {"cpu": (64, 32), "cuda": (64, 128)}  # width, batch
TOY = (4, 2)
REMOVED = ("half of every width", "half of the inner channels")


@lru_cache(maxsize=1)
def case(removed: str, device: str = "cpu", quick: bool = False) -> Case:
    """The case of one kind of removal, after a check, on the CPU, that the smaller network computes the same."""
    width, batch = TOY if quick else SIZES[device]
    torch.manual_seed(0)
    network = build("resnet18", width=width)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,), device=device)
    pruned = masks.prune(network, 0.5, "filter", scope="uniform", example_input=x[:1])
    if removed == REMOVED[1]:
        pruned = {name: mask for name, mask in pruned.items() if name.endswith("conv1") and "." in name}
    small = shrink(network, pruned, x[:1]).model
    check(network, pruned, small, x[:2])
    sides = {
        side: Update(model.to(device), our_attack(device), x.to(device), y, device == "cuda", fused=True)
        for side, model in {"ours": small, "dense": network}.items()
    }
    macs = [count_macs(model, x[:1].shape).forward for model in (small, network)]
    labels = {
        "op": "PGD-10 update, shrunk",
        "network": f"resnet18 width {width}",
        "batch": batch,
        "removed": removed,
        "macs_kept": round(macs[0] / macs[1], 4),
        "dtype": "bfloat16" if device == "cuda" else "float32",
    }
    return Case(labels, sides, rounds=5, warmup=3 if device == "cuda" else 1)


@torch.no_grad()
def check(network: nn.Module, pruned: dict[str, Tensor], small: nn.Module, x: Tensor) -> None:
    masked = copy.deepcopy(network)
    for name, mask in pruned.items():
        masked.get_submodule(name).weight.mul_(mask)
    torch.testing.assert_close(small.eval()(x), masked.eval()(x), rtol=1e-3, atol=1e-3)


def cases(device: str, quick: bool) -> Iterator[Case]:
    for removed in REMOVED:
        yield case(removed, device, quick)


main = partial(harness.main, cases, __doc__, devices=tuple(SIZES))


@pytest.mark.parametrize("side", ["ours", "dense"])
@pytest.mark.parametrize("removed", REMOVED)
def test_shrink(timed, quick, removed, side):
    timed(case(removed, quick=quick), side)


if __name__ == "__main__":
    main()
