"""A whole update of adversarial training on a CPU: crop and flip, attack, forward, backward, SGD.

    python benchmarks/bench_training.py [--network resnet18] [--width 64] [--batch 64] [--rows 0,3] [--out FILE.csv]
    make bench-train

"ours" is the masked network with the engine, "without_engine" the same with the engine turned off, "careful" the
dense network as a careful user of PyTorch writes it (channels_last, weights frozen during the attack), and "compile"
the same under `torch.compile`. It compiles for minutes; --no-compile leaves it out. All sides are float32 and keep
freed memory.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import harness
import pytest
import torch
from bench_attack import ALPHA, EPS, STEPS, Attack, Compiler, Update, frozen_attack
from harness import Case
from torch import Tensor, nn

from sparse_adv import attacks, masks, models, sparsify
from sparse_adv.data import crop_and_flip


class Row(NamedTuple):
    """The objective that is trained, and the mask."""

    objective: str
    block: tuple[int, ...] | None = None
    density: float = 1.0

    @property
    def mask(self) -> str:
        return "dense" if self.block is None else f"block {self.block}, density {self.density}"


class Setting(NamedTuple):
    """Network, its width (0 for the default) and batch size."""

    network: str = "resnet18"
    width: int = 64
    batch: int = 64
    compiles: bool = False


USUAL, TOY = Setting(), Setting(width=8, batch=2)

ROWS = (
    Row("PGD-10", (4, 4), 0.1),
    Row("PGD-10", (2, 2), 0.1),
    Row("PGD-10", (1, 1), 0.1),
    Row("PGD-10", (4, 4), 0.2),
    Row("PGD-10"),
    Row("N-FGSM", (4, 4), 0.1),
    Row("N-FGSM"),
    Row("PGD-10", (4, 4, 3, 3), 0.1),
    Row("PGD-10", (1, 1, 3, 3), 0.1),
    Row("PGD-10", (4, 4, 3, 3), 0.2),
    Row("N-FGSM", (4, 4, 3, 3), 0.1),
)


class AugmentedUpdate(Update):
    """An update on images that are cropped and mirrored anew."""

    def __call__(self) -> Tensor:
        unmoved = self.x
        shifts, flips = torch.randint(9, (2, len(unmoved))), torch.rand(len(unmoved)) < 0.5
        layout = torch.channels_last if not unmoved.is_contiguous() else torch.contiguous_format
        self.x = crop_and_flip(unmoved, shifts, flips).contiguous(memory_format=layout)
        try:
            return super().__call__()
        finally:
            self.x = unmoved


def our_attack(objective: str, engine: bool) -> Attack:
    if objective == "N-FGSM":
        return partial(attacks.n_fgsm, eps=EPS, check=False, engine=engine)
    return partial(attacks.pgd, eps=EPS, alpha=ALPHA, steps=STEPS, check=False, engine=engine)


def careful_n_fgsm(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """N-FGSM as its authors write it, with frozen weights."""
    return frozen_attack(model, x, y, steps=1, start_eps=2 * EPS, alpha=EPS, project=False)


@lru_cache(maxsize=1)
def network_and_images(setting: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    network = models.build(setting.network, **({"width": setting.width} if setting.width else {}))
    return network, torch.rand(setting.batch, 3, 32, 32), torch.randint(10, (setting.batch,))


@lru_cache(maxsize=1)
def rivals(objective: str, setting: Setting) -> dict[str, Update]:
    """The dense network, trained by PyTorch."""
    network, x, y = network_and_images(setting)
    attack = careful_n_fgsm if objective == "N-FGSM" else frozen_attack
    compilers: dict[str, Compiler] = {"careful": lambda model: model}
    if setting.compiles:
        torch.compiler.reset()
        compilers["compile"] = torch.compile
    network = copy.deepcopy(network).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    return {
        side: AugmentedUpdate(network, attack, x, y, bfloat16=False, compiler=compiler)
        for side, compiler in compilers.items()
    }


@lru_cache(maxsize=1)
def case(row: Row, setting: Setting) -> Case:
    network, x, y = network_and_images(setting)
    ticket = copy.deepcopy(network)
    if row.block is not None:
        sparsify(ticket, masks.prune(ticket, row.density, row.block, scope="uniform"))
    else:
        ticket, x = (value.to(memory_format=torch.channels_last) for value in (ticket, x))
    ours, without_engine = (
        AugmentedUpdate(ticket, our_attack(row.objective, engine), x, y, bfloat16=False, fused=engine)
        for engine in (True, False)
    )
    dense = rivals(row.objective, setting)
    labels = {
        "op": f"{row.objective} update",
        "network": f"{setting.network} width {setting.width}" if setting.width else setting.network,
        "batch": setting.batch,
        "mask": row.mask,
        "dtype": "float32",
    }
    return Case(labels, {"ours": ours, "without_engine": without_engine, **dense}, list(dense), rounds=5, warmup=1)


def cases(setting: Setting, rows: Sequence[Row]) -> Iterator[Case]:
    for row in rows:
        yield case(row, setting)


def chosen_rows(text: str) -> list[Row]:
    """Parse an argument such as "0,3"."""
    rows = {str(number): row for number, row in enumerate(ROWS)}
    numbers = text.split(",")
    if not rows.keys() >= set(numbers):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 to {len(ROWS) - 1}, such as 0,3, got {text!r}")
    return [rows[number] for number in numbers]


def network(text: str) -> str:
    try:
        models.find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__)
    parser.add_argument("--network", default="resnet18", type=network, help="of models.build for 3x32x32 images")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; 0 for the network's own")
    parser.add_argument("--batch", type=harness.positive, default=64)
    parser.add_argument("--rows", type=chosen_rows, default=ROWS, help="which of ROWS, such as 0,3")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = harness.start(parser, arguments)
    setting = TOY if options.quick else Setting(options.network, options.width, options.batch, options.compile)
    harness.measure(cases(setting, options.rows), options)


@pytest.mark.parametrize("side", ["ours", "without_engine", "careful"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.objective} {row.mask}")
def test_update(timed, quick, row, side):
    timed(case(row, TOY if quick else USUAL), side)


if __name__ == "__main__":
    harness.run(main)
