"""An attack (PGD-10) and an update of adversarial training through this library, against published and careful code.

    python benchmarks/bench_attack.py [--device cuda] [--network resnet18] [--out FILE.csv]
    make bench

All sides are public functions, called as in users' own loops, on one network (bench_update.py has the updates of
`training.train`):

- "published": the loop of the published repositories in float32 and NCHW;
- "careful": the same in bfloat16, channels_last and cuDNN's benchmark mode; only on a GPU;
- "compile": careful with a compiled network; its weights are frozen during the attack, because a compiled backward
  pass would compute their gradients too;
- "ours": on a GPU with the attack as one CUDA graph. Then ours on masked networks, against "ours_dense".

For the attack alone, on a GPU, "careful" and "compile" are CUDA graphs as well, and for the training step (forward,
backward, SGD on clean images) all sides. On a CPU all is float32 and NCHW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache, partial
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Case
from timing import Side, captured
from torch import Tensor, nn

from sparse_adv import attacks, engine, masks, models, sparsify

EPS, ALPHA, STEPS = 8 / 255, 2 / 255, 10
NETWORKS = {"cuda": {"resnet18": 64, "wrn-34-10": None}, "cpu": {"resnet18": 16}}
BATCH = {"cuda": 128, "cpu": 32}
Masks = list[tuple[tuple[int, ...], float]]
MASKS: dict[str, Masks] = {
    "cuda": [((64, 64), 0.1), ((64, 64), 0.2), ((1, 1), 0.1)],
    "cpu": [((1, 1), 0.1), ((4, 4), 0.1)],
}
COMPILED_STEPS = ("resnet18",)  # compiling the step of another network takes longer than all of its other cases
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Compiler = Callable[[nn.Module], nn.Module]


def published_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    steps: int = STEPS,
    alpha: float = ALPHA,
    start_eps: float = EPS,
    project: bool = True,
) -> Tensor:
    """PGD as in TRADES, MadryLab's and Wong's repositories, shortened to what they have in common; or N-FGSM."""
    model.eval()
    adv = x + torch.empty_like(x).uniform_(-start_eps, start_eps)
    if project:
        adv = adv.clamp(0, 1)
    for _ in range(steps):
        adv.requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(adv), y)
        grad = torch.autograd.grad(loss, [adv])[0]
        adv = adv.detach() + alpha * grad.sign()
        if project:
            adv = torch.min(torch.max(adv, x - EPS), x + EPS)
        adv = adv.clamp(0, 1)
    model.train()
    return adv


def frozen_attack(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """`published_attack` with frozen weights."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    adv = published_attack(model, x, y, **options)
    for parameter in parameters:
        parameter.requires_grad_()
    return adv


def our_attack(device: str) -> Attack:
    graphs = attacks.Graphs() if device == "cuda" else None
    return partial(attacks.pgd, eps=EPS, alpha=ALPHA, steps=STEPS, check=False, graphs=graphs)


class Update:
    """One update of a copy of the network: attack, forward, backward, SGD."""

    def __init__(
        self,
        network: nn.Module,
        attack: Attack,
        x: Tensor,
        y: Tensor,
        bfloat16: bool,
        compiler: Compiler = lambda model: model,
        fused: bool = False,
    ):
        """`bfloat16`: mixed precision by autocast, and channels_last. `fused`: the engine takes part in the update."""
        self.model = copy.deepcopy(network).train()
        self.attack, self.x, self.y, self.bfloat16 = attack, x, y, bfloat16
        if bfloat16:
            self.model.to(memory_format=torch.channels_last)
            self.x = x.contiguous(memory_format=torch.channels_last)
        self.forward, self.fused = compiler(self.model), fused
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.x.device.type, torch.bfloat16) if self.bfloat16 else nullcontext()

    def adversarial(self) -> Tensor:
        """The attack alone."""
        with self.autocast():
            return self.attack(self.forward, self.x, self.y)

    def __call__(self) -> Tensor:
        return self.train_on(self.adversarial())

    def training_step(self) -> Tensor:
        """The update without the attack."""
        return self.train_on(self.x)

    def train_on(self, images: Tensor) -> Tensor:
        """Forward, backward, SGD."""
        with self.autocast():
            self.optimizer.zero_grad()
            forward = engine.fuse_for_training(self.model, images) if self.fused else self.forward
            loss = F.cross_entropy(forward(images), self.y)
        loss.backward()
        self.optimizer.step()
        return loss


class Setup:
    """A network, its images, and the updates that several cases share."""

    def __init__(self, name: str, device: str = "cpu", quick: bool = False):
        torch.manual_seed(0)
        self.device, self.on_gpu = device, device == "cuda"
        self.name, width, batch = ("digits_cnn", 4, 2) if quick else (name, NETWORKS[device][name], BATCH[device])
        self.network = models.build(self.name, width=width).to(device)
        self.x = torch.rand(batch, *models.find(self.name).input_shape, device=device)
        self.y = torch.randint(10, (batch,), device=device)
        # The backend "eager" compiles nothing: compiling takes minutes.
        self.compiler = partial(torch.compile, backend="eager" if quick else "inductor")

    def update_of(self, network: nn.Module, attack: Attack, **options: Any) -> Update:
        return Update(network, attack, self.x, self.y, self.on_gpu, **options)

    @cached_property
    def ours(self) -> Update:
        return self.update_of(self.network, our_attack(self.device), fused=True)

    @cached_property
    def published(self) -> Update:
        return Update(self.network, published_attack, self.x, self.y, bfloat16=False)

    @cached_property
    def careful(self) -> Update:
        return self.update_of(self.network, published_attack)

    @cached_property
    def compiled(self) -> Update:
        return self.update_of(self.network, frozen_attack, compiler=self.compiler)

    def masked(self, block: tuple[int, ...], density: float) -> nn.Module:
        """A copy of the network, pruned by magnitude."""
        ticket = copy.deepcopy(self.network)
        return sparsify(ticket, masks.prune(ticket, density, block, scope="uniform"))

    def case(self, op: str, mask: str, sides: dict[str, Side], rounds: int = 5, warmup: int = 4) -> Case:
        """The default has warm-up calls, in which cuDNN searches for algorithms and graphs are captured."""
        dtype = "bfloat16" if self.on_gpu else "float32"
        labels = {"op": op, "network": self.name, "batch": len(self.x), "mask": mask, "dtype": dtype}
        return Case(labels, sides, rounds=rounds, warmup=warmup)

    def update(self) -> Case:
        careful = {"careful": self.careful} if self.on_gpu else {}
        return self.case(f"PGD-{STEPS} update", "dense", {"ours": self.ours, "published": self.published, **careful})

    def masked_update(self, block: tuple[int, ...], density: float) -> Case:
        ours = self.update_of(self.masked(block, density), our_attack(self.device), fused=True)
        sides = {"ours": ours, "ours_dense": self.ours}
        return self.case(f"PGD-{STEPS} update", f"block {block}, density {density}", sides)

    def attack(self) -> Case:
        plain = {"careful": self.careful} if self.on_gpu else {"published": self.published}
        rivals = {name: update.adversarial for name, update in {**plain, "compile": self.compiled}.items()}
        if self.on_gpu:
            rivals = {name: captured(side, calls=1) for name, side in rivals.items()}
        return self.case(f"PGD-{STEPS} attack", "dense", {"ours": self.ours.adversarial, **rivals})

    def training_step(self) -> Case:
        """The case of forward, backward and SGD on clean images; on a GPU each side is a CUDA graph."""
        plain = {"careful": self.careful} if self.on_gpu else {"published": self.published}
        updates = {"ours": self.ours, **plain, "compile": self.compiled}
        sides: dict[str, Side] = {name: update.training_step for name, update in updates.items()}
        if self.on_gpu:
            sides = {name: captured(side, calls=1) for name, side in sides.items()}
        return self.case("training step", "dense", sides)


def cases(names: Sequence[str], device: str, quick: bool = False) -> Iterator[Case]:
    """Cases without a compiled side come first, since compiling may exceed a time limit."""
    for name in names:
        setup = Setup(name, device, quick)
        yield setup.update()
        if device == "cpu" or name not in COMPILED_STEPS:  # the others are in bench_update.py
            for block, density in MASKS[device]:
                yield setup.masked_update(block, density)
        yield setup.attack()
        if name in COMPILED_STEPS:
            yield setup.training_step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = harness.argument_parser(__doc__, tuple(NETWORKS))
    parser.add_argument("--network", help="only this one; on a CPU resnet18, on a GPU also wrn-34-10")
    options = harness.start(parser, arguments)
    names = tuple(NETWORKS[options.device])
    if options.network not in (None, *names):
        parser.error(f"--network must be one of {', '.join(names)} on {options.device}, got {options.network!r}")
    harness.measure(cases([options.network] if options.network else names, options.device, options.quick), options)


setup_of = lru_cache(maxsize=1)(Setup)


@pytest.mark.parametrize("side", ["ours", "published"])
def test_update(timed, quick, side):
    timed(setup_of("resnet18", quick=quick).update(), side)


@pytest.mark.parametrize("side", ["ours", "ours_dense"])
@pytest.mark.parametrize("mask", MASKS["cpu"], ids=str)
def test_masked_update(timed, quick, mask, side):
    timed(setup_of("resnet18", quick=quick).masked_update(*mask), side)


@pytest.mark.parametrize("side", ["ours", "published", "compile"])
def test_attack(timed, quick, side):
    timed(setup_of("resnet18", quick=quick).attack(), side)


@pytest.mark.parametrize("side", ["ours", "published", "compile"])
def test_training_step(timed, quick, side):
    timed(setup_of("resnet18", quick=quick).training_step(), side)


if __name__ == "__main__":
    main()
