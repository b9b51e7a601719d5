"""One update of PGD adversarial training (PGD-10) through this library's attack loop, against what people run.

    python benchmarks/bench_attack.py [--device cuda] [--out benchmarks/results/FILE.jsonl]

Sides, all on one network: "published", the loop of the published repositories in float32 and NCHW; "careful", the same
in bfloat16, channels_last and cuDNN's benchmark mode; "compile", careful with a compiled network; and "ours", on a GPU
with the attack as one CUDA graph. Then ours on masked networks, against ours on the dense one. On a CPU all is float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import interleaved, write_rows
from torch import Tensor, nn

from sparse_adv import attacks, masks, sparsify
from sparse_adv.models import build

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
NETWORKS = {"cuda": [("resnet18", 64), ("wrn-34-10", None)], "cpu": [("resnet18", 16)]}
BATCH = {"cuda": 128, "cpu": 32}
SPARSE = {"cuda": [((64, 64), 0.1), ((64, 64), 0.2), ((1, 1), 0.1)], "cpu": [((1, 1), 0.1), ((4, 4), 0.1)]}
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def published_attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """PGD as TRADES, MadryLab's and Wong's repositories write it, shortened to what they share."""
    model.eval()
    adv = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        adv.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(adv), y)
        grad = torch.autograd.grad(loss, [adv])[0]
        adv = adv.detach() + ALPHA * grad.sign()
        adv = torch.min(torch.max(adv, x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return adv


class Update:
    """One update of a copy of the network: craft, forward, backward, SGD."""

    def __init__(self, network: nn.Module, attack: Attack, x: Tensor, y: Tensor, reduced: bool, compiled: bool = False):
        self.model = copy.deepcopy(network).train()
        self.attack, self.x, self.y, self.reduced = attack, x, y, reduced
        if reduced:
            self.model.to(memory_format=torch.channels_last)
            self.x = x.contiguous(memory_format=torch.channels_last)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)

    def __call__(self) -> Tensor:
        cast = torch.autocast(self.x.device.type, torch.bfloat16) if self.reduced else nullcontext()
        with cast:
            adv = self.attack(self.forward, self.x, self.y)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.forward(adv), self.y)
        loss.backward()
        self.optimizer.step()
        return loss


def our_attack(device: str) -> Attack:
    graphs = attacks.Graphs() if device == "cuda" else None
    return partial(attacks.pgd, eps=EPS, alpha=ALPHA, steps=STEPS, check=False, graphs=graphs)


def rows(device: str) -> Iterator[dict]:
    torch.backends.cudnn.benchmark = True
    reduced = device == "cuda"
    batch = BATCH[device]
    for name, width in NETWORKS[device]:
        torch.manual_seed(0)
        network = build(name, width=width).to(device)
        x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
        dense = Update(network, our_attack(device), x, y, reduced)
        rivals = {
            "published": Update(network, published_attack, x, y, False),
            "careful": Update(network, published_attack, x, y, reduced),
            "compile": Update(network, published_attack, x, y, reduced, compiled=True),
        }
        yield row(name, batch, "dense", {"ours": dense, **rivals}, device)
        for block, density in SPARSE[device]:
            ticket = copy.deepcopy(network)
            sparsify(ticket, masks.prune(ticket, density, block, scope="uniform"))
            sparse = Update(ticket, our_attack(device), x, y, reduced)
            yield row(name, batch, f"block {block}, density {density}", {"ours": sparse, "our dense": dense}, device)


def row(name: str, batch: int, masked: str, sides: dict[str, Callable[[], Tensor]], device: str) -> dict:
    for side in sides.values():
        for _ in range(3):  # compiled, searched for algorithms, recorded as a graph
            side()
    times = interleaved(sides, 7, device)
    return {
        "op": f"PGD-{STEPS} update",
        "case": f"{name}, batch {batch}, {masked}",
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "seconds": times,
        "ratios": {rival: t["median"] / times["ours"]["median"] for rival, t in times.items() if rival != "ours"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=NETWORKS, default="cpu")
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    measured = []
    for found in rows(arguments.device):
        measured.append(found)
        write_rows(arguments.out, measured)
        ratios = ", ".join(f"{rival} {ratio:.2f}x" for rival, ratio in found["ratios"].items())
        median = found["seconds"]["ours"]["median"] * 1e3
        print(f"{found['op']}  {found['case']:<52}{median:9.1f} ms; {ratios} of that time")


if __name__ == "__main__":
    main()
