"""The ascent of Auto-PGD: steps with momentum whose size follows the progress of each image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks import movement
from sparse_adv.attacks.ball import Ball, into_ball
from sparse_adv.attacks.geometry import direction, per_image
from sparse_adv.attacks.options import check_settings
from sparse_adv.attacks.queries import Queries
from sparse_adv.attacks.success import is_adversarial
from sparse_adv.attacks.zero_gradients import warn_if_zero
from sparse_adv.ops.random_start import as_philox_state

MOMENTUM = 0.75
"""Weight of the newest step; the step before gets the rest."""


@dataclass(frozen=True)
class AscentSettings:
    """The settings that all ascents of an attack share; `apgd` documents them."""

    ball: Ball
    steps: int
    rho: float
    eot_iter: int
    targeted: bool
    zero_is_suspicious: bool = False
    """Whether a gradient of 0 is worth a warning, see `zero_gradients`."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=1)
        check_count("eot_iter", self.eot_iter, least=1)
        check_settings(rho=self.rho)


@dataclass
class _State:
    """The ascent of the images that are still robust; all tensors have the first dimension of `index`."""

    index: Tensor
    """Place of each image in the batch."""
    clean: Tensor
    arguments: tuple[Tensor, ...]
    """Arguments of the loss after the logits: labels, and targets if there are any."""
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step: Tensor
    rises: Tensor
    """Steps since the last checkpoint that raised the loss."""
    checked_loss: Tensor
    """Highest loss at the last checkpoint."""
    halved: Tensor
    """Whether the step was halved at the last checkpoint."""

    def kept(self, keep: Tensor) -> _State:
        """The state of some of the images."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        arguments = tuple(argument[keep] for argument in values.pop("arguments"))
        return _State(arguments=arguments, **{name: value[keep] for name, value in values.items()})


class Attacker:
    """A batch under attack: which images are still robust, and the best result of each."""

    def __init__(
        self,
        queries: Queries,
        images: Tensor,
        labels: Tensor,
        settings: AscentSettings,
        generator: torch.Generator | None,
    ) -> None:
        self._queries, self._images, self._labels = queries, images, labels
        self._settings, self._philox_state = settings, as_philox_state(generator, "generator").to(images.device)
        logits = self.logits = queries.logits(images)
        """Of the clean images."""
        self.result = images.clone()
        self._loss = torch.full((len(images),), -math.inf, device=images.device, dtype=torch.float64)
        """Of each result. Losses of any dtype are compared in float64."""
        self._errors = is_adversarial(logits, labels, self._settings.targeted).long()
        """Number of the eot_iter passes that misclassified each result, or reached its target."""
        self._robust = torch.arange(len(images), device=images.device)
        if settings.eot_iter == 1:
            self._robust = self._robust[self._errors == 0]
        true = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], True)
        self.wrong_classes = logits.masked_fill(true, -math.inf).argsort(1, descending=True)[:, :-1]

    def ascend(self, objective: Callable[..., Tensor], rank: int | None = None) -> None:
        """One start and all steps for the images that are still robust; with eot_iter 1 an image leaves when it falls.

        Args:
            objective: computes the loss of each image from logits and labels, and from targets if there is a rank.
            rank: the targets are the wrong classes of this rank.
        """
        if not len(self._robust):
            return
        state = self._start(objective, rank)
        since = 0
        checkpoints = frozenset(_checkpoints(self._settings.steps))
        for k in range(1, self._settings.steps + 1):
            if not len(state.index):
                break
            self._move(state, MOMENTUM if k > 1 else 1.0)
            state, last_loss = self._evaluated(state, objective, with_gradient=k < self._settings.steps)
            state.rises += state.loss > last_loss
            improved = state.loss > state.best_loss
            state.best = state.x.where(per_image(improved, state.x), state.best)
            state.best_gradient = state.gradient.where(per_image(improved, state.x), state.best_gradient)
            state.best_loss = state.loss.where(improved, state.best_loss)
            since += 1
            if k in checkpoints:
                self._halve_steps(state, since)
                since = 0
        better = (state.best_loss > self._loss[state.index]) & (self._errors[state.index] == 0)
        self._loss[state.index[better]] = state.best_loss[better]
        self._put(state.index[better], state.best[better])
        self._robust = state.index

    def _start(self, objective: Callable[..., Tensor], rank: int | None) -> _State:
        """A random start for each robust image, with loss and gradient there."""
        index = self._robust
        ball = self._settings.ball.of(index)
        clean = self._images[index]
        arguments = (self._labels[index],) if rank is None else (self._labels[index], self.wrong_classes[index, rank])
        x = movement.start(clean, ball, self._philox_state)
        movement.advance(self._philox_state, clean)
        zero = self._loss.new_zeros(len(index))
        step = torch.zeros_like(zero, dtype=clean.dtype) + 2 * ball.radii
        never = torch.zeros_like(zero, dtype=torch.bool)
        state = _State(index, clean, arguments, x, x, x, zero, x, x, zero, step, zero, zero, never)
        state, _ = self._evaluated(state, objective, with_gradient=True)
        if self._settings.zero_is_suspicious:
            warn_if_zero(self._queries.attacked, state.gradient)
        return replace(
            state,
            best=state.x,
            best_gradient=state.gradient,
            best_loss=state.loss,
            checked_loss=state.loss,
            rises=torch.zeros_like(state.loss),
            halved=torch.zeros_like(state.loss, dtype=torch.bool),
        )

    def _move(self, state: _State, weight: float) -> None:
        way = direction(state.gradient, self._settings.ball.norm)
        ahead = self._project(state.x + per_image(state.step, state.x) * way, state)
        moved = state.x + weight * (ahead - state.x) + (1 - weight) * (state.x - state.previous)
        state.previous, state.x = state.x, self._project(moved, state)

    def _project(self, x: Tensor, state: _State) -> Tensor:
        """The nearest point of the ball: a step of size 0."""
        return movement.step(x, state.gradient, state.clean, 0.0, self._settings.ball.of(state.index))

    def _evaluated(self, state: _State, objective: Callable[..., Tensor], with_gradient: bool) -> tuple[_State, Tensor]:
        """Evaluate loss and gradient at x; return the state of the images still robust, and their loss before."""
        losses: list[Tensor] = []
        errors = torch.zeros_like(state.index)

        def loss(logits: Tensor) -> Tensor:
            nonlocal errors
            value = objective(logits, *state.arguments)
            losses.append(value.detach().double())
            errors = errors + is_adversarial(logits.detach(), state.arguments[0], self._settings.targeted)
            return value

        last_loss, passes = state.loss, range(self._settings.eot_iter)
        if with_gradient:
            state.gradient = torch.stack([self._queries.gradient(state.x, loss) for _ in passes]).mean(0)
        else:
            for _ in passes:
                loss(self._queries.logits(state.x))
        state.loss = torch.stack(losses).mean(0)
        fallen = (errors > 0) & (errors >= self._errors[state.index])
        if not bool(fallen.any()):
            return state, last_loss
        self._errors[state.index[fallen]] = errors[fallen]
        self._put(state.index[fallen], state.x[fallen])
        if self._settings.eot_iter > 1:
            return state, last_loss
        return state.kept(~fallen), last_loss[~fallen]

    def _put(self, index: Tensor, x: Tensor) -> None:
        self.result[index] = into_ball(x, self._images[index], self._settings.ball.of(index))

    def _halve_steps(self, state: _State, since: int) -> None:
        """At a checkpoint: halve the steps that brought no progress and return to the best points."""
        stuck = ~state.halved & (state.best_loss <= state.checked_loss)
        halve = (state.rises < self._settings.rho * since) | stuck
        state.step = state.step.where(~halve, state.step / 2)
        state.x = state.best.where(per_image(halve, state.x), state.x)
        state.gradient = state.best_gradient.where(per_image(halve, state.x), state.gradient)
        # `loss` is not set to the highest loss: as in the paper, the next step is compared with the point just left.
        state.halved, state.checked_loss = halve, state.best_loss
        state.rises = torch.zeros_like(state.rises)


def _checkpoints(steps: int) -> Iterator[int]:
    """The steps after which step sizes may be halved."""
    before, fraction = 0.0, 0.22
    while fraction <= 1:
        yield math.ceil(round(fraction * steps, 6))  # 0.41 * 100 would be 41.000000000000004
        before, fraction = fraction, fraction + max(fraction - before - 0.03, 0.06)
