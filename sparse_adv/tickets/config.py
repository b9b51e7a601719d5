"""How a trained network is pruned to a ticket: every number of it, checked when it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from sparse_adv import masks


@dataclass(frozen=True)
class Rule:
    """How a trained network is pruned; the defaults are the paper's.

    Attributes:
        density, block, scope, score, linear: see `masks.prune`.
        rounds: times of training, pruning and going back; round i of n keeps density^(i/n) (Frankle and Carbin 2019,
            iterative magnitude pruning). 1 is one-shot.
        rewind_step: the update of the first round to whose weights the ticket goes back (Frankle et al. 2020); 0 is
            the start.
        gather: reorder the channels before the first pruning, so that whole blocks hold more of the scores, see
            `masks.gather_channels`; the ticket then holds the initial weights in that order, too.
        stop_distance: end a round's training when its mask has moved less than this in five epochs (Early-Bird
            tickets, You et al. 2020, who take 0.1); None trains to the end. What is watched are masks before any
            gathering.
    """

    density: float = 0.2
    block: tuple[int, ...] = (1, 1)
    scope: str = "global"
    score: str | masks.Score = "relative_magnitude"
    linear: bool = True
    rounds: int = 1
    rewind_step: int = 0
    gather: bool = False
    stop_distance: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("rewind_step", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)}")
        if self.stop_distance is not None and not 0 <= self.stop_distance <= 1:
            raise ValueError(f"stop_distance must be a share in [0, 1], got {self.stop_distance}")

    def prune(self, model: nn.Module, number: int, score: str | masks.Score | None = None) -> dict[str, Tensor]:
        """The masks at the end of a round, counted from 1."""
        return masks.prune(
            model,
            density=self.density ** (number / self.rounds),
            block=self.block,
            scope=self.scope,
            score=self.score if score is None else score,
            linear=self.linear,
        )

    def order(self, model: nn.Module, shape: Sequence[int]) -> masks.ChannelOrder:
        """The order of a trained model's channels in which the last round's blocks hold the most.

        Args:
            model: dense.
            shape: shape [N, C, H, W] of its input.
        """
        return masks.gather_channels(
            model, self.density, self.block, shape, scope=self.scope, score=self.score, linear=self.linear
        )

    def facts(self) -> dict[str, Any]:
        """The rule as JSON data; a function of scores is told by its name."""
        score = self.score if isinstance(self.score, str) else getattr(self.score, "__name__", repr(self.score))
        return {**asdict(self), "block": list(self.block), "score": score}
