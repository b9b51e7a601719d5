"""An attack (PGD-10) and a whole update of adversarial training through this library, against what people run.

    python benchmarks/bench_attack.py [--device cuda] [--network resnet18] [--out benchmarks/results/FILE.jsonl]

Sides, all on one network: "published", the loop of the published repositories in float32 and NCHW; "careful", the same
in bfloat16, channels_last and cuDNN's benchmark mode; "compile", careful with a compiled network whose weights are
frozen during the attack, since a compiled backward pass would form their gradients too; and "ours", on a GPU with the
attack as one CUDA graph. Then ours on masked networks, against ours on the dense one. For the attack alone, on a GPU,
"careful" and "compile" are CUDA graphs as well. On a CPU all is float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import captured, interleaved, write_rows
from torch import Tensor, nn

from sparse_adv import attacks, masks, sparsify
from sparse_adv.models import build

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
NETWORKS = {"cuda": {"resnet18": 64, "wrn-34-10": None}, "cpu": {"resnet18": 16}}
BATCH = {"cuda": 128, "cpu": 32}
SPARSE = {"cuda": [((64, 64), 0.1), ((64, 64), 0.2), ((1, 1), 0.1)], "cpu": [((1, 1), 0.1), ((4, 4), 0.1)]}
COMPILED_UPDATES = ("resnet18",)  # to compile another's training as well takes longer than its other rows together
ROUNDS = 5
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


def frozen_attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    adv = published_attack(model, x, y)
    for parameter in parameters:
        parameter.requires_grad_()
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

    def cast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.x.device.type, torch.bfloat16) if self.reduced else nullcontext()

    def craft(self) -> Tensor:
        with self.cast():
            return self.attack(self.forward, self.x, self.y)

    def __call__(self) -> Tensor:
        with self.cast():
            adv = self.craft()
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.forward(adv), self.y)
        loss.backward()
        self.optimizer.step()
        return loss


def our_attack(device: str) -> Attack:
    graphs = attacks.Graphs() if device == "cuda" else None
    return partial(attacks.pgd, eps=EPS, alpha=ALPHA, steps=STEPS, check=False, graphs=graphs)


def rows(device: str, name: str) -> Iterator[dict]:
    """Those that nothing is compiled for come first."""
    torch.backends.cudnn.benchmark = True
    on_gpu, batch = device == "cuda", BATCH[device]
    torch.manual_seed(0)
    network = build(name, width=NETWORKS[device][name]).to(device)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    row = partial(measured_row, device=device, network=f"{name}, batch {batch}")
    dense = Update(network, our_attack(device), x, y, on_gpu)
    careful = Update(network, published_attack, x, y, on_gpu)
    published = Update(network, published_attack, x, y, False)
    yield row("update", "dense", {"ours": dense, "published": published, "careful": careful})
    for block, density in SPARSE[device]:
        ticket = copy.deepcopy(network)
        sparsify(ticket, masks.prune(ticket, density, block, scope="uniform"))
        sparse = Update(ticket, our_attack(device), x, y, on_gpu)
        yield row("update", f"block {block}, density {density}", {"ours": sparse, "our dense": dense})
    compiled = Update(network, frozen_attack, x, y, on_gpu, compiled=True)
    rivals = {"careful": careful.craft, "compile": compiled.craft}
    if on_gpu:
        rivals = {rival: captured(craft, calls=1) for rival, craft in rivals.items()}
    yield row("attack", "dense", {"ours": dense.craft, **rivals})
    if name in COMPILED_UPDATES:
        yield row("update", "dense", {"ours": dense, "compile": compiled})


def measured_row(op: str, masked: str, sides: dict[str, Callable[[], object]], device: str, network: str) -> dict:
    for side in sides.values():
        for _ in range(3):  # compiled, searched for algorithms, recorded as a graph
            side()
    times = interleaved(sides, ROUNDS, device)
    return {
        "op": f"PGD-{STEPS} {op}",
        "case": f"{network}, {masked}",
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "seconds": times,
        "ratios": {rival: t["median"] / times["ours"]["median"] for rival, t in times.items() if rival != "ours"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=NETWORKS, default="cpu")
    parser.add_argument("--network", help="one of the device's networks: " + ", ".join(NETWORKS["cuda"]))
    parser.add_argument("--out", type=Path, help="also write a JSON line per row")
    arguments = parser.parse_args()
    names = list(NETWORKS[arguments.device])
    if arguments.network not in (None, *names):
        parser.error(f"--network must be one of {', '.join(names)} on {arguments.device}, got {arguments.network!r}")
    measured = []
    for found in (row for name in names if arguments.network in (None, name) for row in rows(arguments.device, name)):
        measured.append(found)
        write_rows(arguments.out, measured)
        ratios = ", ".join(f"{rival} {ratio:.2f}x" for rival, ratio in found["ratios"].items())
        median = found["seconds"]["ours"]["median"] * 1e3
        print(f"{found['op']}  {found['case']:<52}{median:9.1f} ms; {ratios} of that time")


if __name__ == "__main__":
    main()
