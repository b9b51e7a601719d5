"""A run of `AutoAttack` on checked arguments: one attack after the other, each on the images that are still robust."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.autoattack_state import Result, State
from sparse_adv.attacks.autoattack_versions import MEMBERS, Settings, with_enough_classes
from sparse_adv.attacks.ball import Ball, into_ball
from sparse_adv.attacks.checks import LabelRange, check_label_range
from sparse_adv.attacks.gradient_masking import signs_of_masking
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.success import is_correct
from sparse_adv.engine import input_gradients
from sparse_adv.ops.random_start import as_philox_state


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a run attacks, and how."""

    title: str
    """"AutoAttack", or what runs instead."""
    names: tuple[str, ...]
    """Of the attacks, in their order."""
    settings: Settings
    model: Model
    get_logits: Callable[[Tensor], Tensor]
    """What the model itself returns in eval mode, without engine and autocast."""
    ball: Ball
    engine: bool
    device: torch.device | None
    """To which batches are moved; None to leave them where they are."""
    images: Tensor
    """All images, on the CPU; so are the labels."""
    labels: Tensor
    label_range: LabelRange
    batch: int
    """Images per batch."""
    log: Callable[[str], None]

    def run(self, fingerprint: str, seed: int | None, path: Path | None, draws: bool) -> Result:
        """Run the attacks that have not finished.

        Args:
            fingerprint: digest of the model, the images and the options.
            seed: of a new run; None to draw one.
            path: the file of the state; None for a run that cannot be continued.
            draws: whether the model is known to draw random numbers.
        """
        state = State.read(path, fingerprint) if path is not None and path.exists() else None
        if state is not None:
            seed = state.seed
        elif seed is None:
            seed = int(as_philox_state(None)[0])
        first, truth = (tensor[: self.batch].to(self.device) for tensor in (self.images, self.labels))
        logits = self.get_logits(first)
        budgets = self._budgets(logits)
        self.log(
            f"{self.title}: {budgets}; {self.ball.norm}, eps {self.ball.eps_in_words}, {len(self.images)} images, "
            f"seed {seed}"
        )
        ball = self.ball.of(torch.arange(len(first), device="cpu"))._asdict()
        signs = signs_of_masking(self.model, first, truth, **ball)
        if path is not None and state is not None and not any("between two calls" in sign for sign in signs):
            state.check_logits(logits, path)
        if draws:
            signs = [sign for sign in signs if "between two calls" not in sign]
        for sign in signs:
            self.log(f"warning: {sign}")
        if state is None:
            state = self._initial(fingerprint, seed)
        else:
            done = ", ".join(name for name in state.accuracy if name != "clean") or "no attack"
            self.log(f"continued from {path}: {done} finished")
        self.log(f"clean accuracy {state.accuracy['clean']:.2%}")
        for name in self.names:
            if name not in state.accuracy:
                self._attack(name, state, path)
        before = list(state.accuracy)[-2]
        if self.names[-1] == "square" and before != "clean" and state.accuracy["square"] < state.accuracy[before]:
            signs.append("square, which needs no gradients, found examples where the gradient attacks found none")
            self.log(f"warning: {signs[-1]}")
        return state.result(self.title, budgets, signs)

    def _budgets(self, logits: Tensor) -> str:
        """The attacks with their budgets in words; raises ValueError if they or the labels do not fit the logits."""
        classes = with_enough_classes(self.names, logits.shape[1])
        check_label_range(self.label_range, classes)
        return "; ".join(f"{name} ({MEMBERS[name].budget(self.settings, classes)})" for name in self.names)

    def _initial(self, fingerprint: str, seed: int) -> State:
        batches = batches_of(self.images, self.labels, self.batch, self.device)
        logits = torch.cat([self.get_logits(x).cpu() for x, _ in batches])
        return State.initial(fingerprint, seed, self.images, self.labels, logits)

    def _attack(self, name: str, state: State, path: Path | None) -> None:
        """Run one attack on the images that are still robust, batch by batch, and save the state after each."""
        start, before = time.perf_counter(), int(state.robust.sum())
        if not state.pending.any():
            state.pending = state.robust.clone()
            state.unconfirmed[name] = 0
        while state.pending.any():
            began = time.perf_counter()
            index = state.pending.nonzero().squeeze(1)[: self.batch]
            self._attack_batch(name, state, index)
            state.pending[index] = False
            state.seconds += time.perf_counter() - began
            if path is not None and state.pending.any():
                state.write_if_due(path)
        state.accuracy[name] = state.robust.double().mean().item()
        if path is not None:
            state.write(path)
        self.log(
            f"after {name}: robust accuracy {state.accuracy[name]:.2%} ({int(state.robust.sum())} of {before} still "
            f"robust; {state.unconfirmed[name]} examples unconfirmed in float32; {time.perf_counter() - start:.1f} s)"
        )

    def _attack_batch(self, name: str, state: State, index: Tensor) -> None:
        """Run one attack on the images at `index`, and note what it found.

        An unconfirmed example ended the search for its image too early. So the image is attacked again without autocast
        and engine, because these round differently. With averaged gradients no example ends a search.
        """
        # A generator for each batch and attack, so that an interrupted run draws the same numbers again.
        own_seed = state.seed * 1_000_003 + zlib.crc32(name.encode()) + int(index[0])
        generator = torch.Generator().manual_seed(own_seed % 2**63)
        options = MEMBERS[name].options(self.settings)
        attack, left = partial(MEMBERS[name].attack, self.model, generator=generator, **options), index
        for exact in (False, True):
            if not len(left):
                break
            x, y, ball = self.images[left].to(self.device), self.labels[left].to(self.device), self.ball.of(left)
            with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
                adv = attack(x, y, **ball._asdict(), engine=self.engine and not exact)
            found, is_fooled, predictions, claimed = self._verified(adv, x, y, ball.on(x))
            state.adversarial[left[is_fooled]] = found[is_fooled]
            state.predictions[left[is_fooled]] = predictions[is_fooled]
            state.robust[left[is_fooled]] = False
            left = left[claimed & ~is_fooled] if options.get("eot_iter", 1) == 1 else left[:0]
            state.unconfirmed[name] += len(left) if not exact else 0

    def _verified(self, adv: Tensor, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The examples, moved into the ball; whether the model misclassifies each; its classes; and what the search
        claimed.

        All are on the CPU.
        """
        with (
            torch.no_grad(),
            in_mode(as_module(self.model)[0], "eval") as model,
            input_gradients(model, adv, self.engine) as searched,
        ):
            claimed = ~is_correct(searched.logits(adv), y)
        inside = into_ball(adv, x, ball)
        logits = self.get_logits(inside)
        is_fooled = ~is_correct(logits, y) & inside.isfinite().flatten(1).all(1)
        return inside.cpu(), is_fooled.cpu(), logits.argmax(1).cpu(), claimed.cpu()


def batches_of(
    images: Tensor, labels: Tensor, size: int, device: torch.device | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images and labels in batches, moved to the device if there is one."""
    for x, y in zip(images.split(size), labels.split(size), strict=True):
        yield x.to(device), y.to(device)
