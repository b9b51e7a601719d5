"""A whole update of adversarial training on a CPU: attack, forward, backward, SGD, of a masked ResNet-18.

    python benchmarks/bench_training.py [--width 64] [--batch 64] [--threads 2] [--out FILE.csv]
    make bench-train

"ours" is the masked network with the engine, "without_engine" the same with the engine turned off, and "careful" the
dense network as a careful user of PyTorch writes it: channels_last, weights frozen during the attack. All sides are
float32 and keep freed memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import harness
import pytest
import torch
from bench_attack import ALPHA, EPS, STEPS, Attack, Update, frozen_attack
from harness import Case
from torch import Tensor, nn

from sparse_adv import attacks, masks, models, sparsify

SIDES = ("ours", "without_engine", "careful")
TOY = (4, 2)


class Row(NamedTuple):
    """What is trained, and with which mask."""

    objective: str
    block: tuple[int, ...] | None = None
    density: float = 1.0

    @property
    def mask(self) -> str:
        return "dense" if self.block is None else f"block {self.block}, density {self.density}"


ROWS = (
    Row("PGD-10", (4, 4), 0.1),
    Row("PGD-10", (2, 2), 0.1),
    Row("PGD-10", (1, 1), 0.1),
    Row("PGD-10", (4, 4), 0.2),
    Row("N-FGSM", (4, 4), 0.1),
    Row("PGD-10"),
)


def our_attack(objective: str, engine: bool) -> Attack:
    if objective == "N-FGSM":
        return partial(attacks.n_fgsm, eps=EPS, check=False, engine=engine)
    return partial(attacks.pgd, eps=EPS, alpha=ALPHA, steps=STEPS, check=False, engine=engine)


def careful_n_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """N-FGSM as its authors write it, with frozen weights."""
    return frozen_attack(model, x, y, steps=1, start_eps=2 * EPS, alpha=EPS, project=False)


@lru_cache(maxsize=1)
def case(row: Row, width: int = 64, batch: int = 64) -> Case:
    torch.manual_seed(0)
    network = models.build("resnet18", width=width)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    ticket = copy.deepcopy(network)
    if row.block is not None:
        sparsify(ticket, masks.prune(ticket, row.density, row.block, scope="uniform"))
    careful_attack = careful_n_fgsm if row.objective == "N-FGSM" else frozen_attack
    network.to(memory_format=torch.channels_last)
    sides = {
        "ours": Update(ticket, our_attack(row.objective, engine=True), x, y, bfloat16=False),
        "without_engine": Update(ticket, our_attack(row.objective, engine=False), x, y, bfloat16=False),
        "careful": Update(network, careful_attack, x.contiguous(memory_format=torch.channels_last), y, bfloat16=False),
    }
    labels = {
        "op": f"{row.objective} update",
        "network": f"resnet18 width {width}",
        "batch": batch,
        "mask": row.mask,
        "dtype": "float32",
    }
    return Case(labels, sides, ["careful"], rounds=5, warmup=2)


def cases(width: int, batch: int) -> Iterator[Case]:
    for row in ROWS:
        yield case(row, width, batch)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=64)
    options = harness.start(parser, arguments)
    width, batch = TOY if options.quick else (options.width, options.batch)
    harness.measure(cases(width, batch), options)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.objective} {row.mask}")
def test_update(timed, quick, row, side):
    timed(case(row, *(TOY if quick else (64, 64))), side)


if __name__ == "__main__":
    main()
