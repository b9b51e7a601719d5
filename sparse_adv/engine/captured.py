"""Passes of a program as CUDA graphs, for searches: their steps cannot be captured as a whole.

After each step the host of a search reads which images have fallen, so no graph can hold the attack. But the passes
over the model are the same each time. Two graphs replay the forward and the backward pass. The loss runs between them
without a graph, and may be any function of the logits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparse_adv.errors import first_cause
from sparse_adv.ops.cuda_graph import Capturer, holders, inside_a_call, without_cached_casts

log = logging.getLogger(__name__)

Backward = Callable[[Tensor], Tensor | None]
"""Returns the gradient of the images for a gradient of the logits; None if the logits do not depend on the images."""
Forward = Callable[[Tensor], tuple[Tensor, Backward | None]]
"""Returns the logits of images, and the backward pass if one may follow."""

PASSES_BEFORE = 50
"""Number of passes before the next one is captured. Two captures with their warm-up and trial take as long as a few
passes, and the host waits for the GPU. Searches of 100 steps and more gain from them; PGD-20 and PGD-50 would not."""
_TOLERANCE = 1e-2
"""Greatest relative difference of a replay: cuDNN may sum a gradient in another order each time."""


@dataclass
class _Replays:
    """The graphs of a forward and a backward pass, and the memory that they read."""

    images: Tensor
    forward: Callable[[], Tensor]
    gradient: Tensor
    backward: Callable[[], Tensor | None] | None = None


class CapturedPasses:
    """A pass that is replayed once it has been made often; replays read the weights that its capture read.

    Args:
        capturer: makes the graphs.
    """

    def __init__(self, capturer: type[Capturer]) -> None:
        self._capturer_type = capturer
        self._capturer: Capturer | None = None
        self._made = 0
        self._replays: _Replays | None = None
        self.reason = ""
        """Why the pass cannot be captured."""
        holders.add(self)

    def forget(self) -> None:
        """Delete the graphs, because the weights have changed or the graphs cannot be replayed any more."""
        self._made, self._replays = 0, None

    def run(self, forward: Forward, images: Tensor) -> tuple[Tensor, Backward | None]:
        """Run or replay the forward pass and return its result. A later pass may overwrite this result.

        Args:
            forward: the same each time.
            images: of the same shape each time.
        """
        if inside_a_call() or self.reason or self._capturer_type.is_capturing():
            return forward(images)
        if self._replays is None and self._made == PASSES_BEFORE:
            self._capture(forward, images)
        if self._replays is None:
            self._made += 1
            return forward(images)
        self._replays.images.copy_(images)
        return self._replays.forward(), None if self._replays.backward is None else self._replay_backward

    def _replay_backward(self, gradient: Tensor) -> Tensor | None:
        assert self._replays is not None and self._replays.backward is not None
        self._replays.gradient.copy_(gradient)
        return self._replays.backward()

    def _capture(self, forward: Forward, images: Tensor) -> None:
        """Capture the passes and compare a replay with what they give without; note the reason if that fails."""
        try:
            with without_cached_casts():
                self._replays = self._captured(forward, images.clone())
        except Exception as error:  # of any kind: the same pass has just run without one
            self.reason = first_cause(error)
            log.info("passes of an attack are not replayed as CUDA graphs: %s", self.reason)

    def _captured(self, forward: Forward, images: Tensor) -> _Replays:
        if self._capturer is None:
            self._capturer = self._capturer_type(images.device)
        expected, gradient = self._warmed_up(self._capturer, forward, images)
        backward: Backward | None = None

        def captured_forward() -> Tensor:
            nonlocal backward
            logits, backward = forward(images)
            return logits

        replays = _Replays(images, self._capturer.capture(captured_forward), gradient)
        if backward is not None:
            replays.backward = self._capturer.capture(partial(backward, gradient))
        # No replay before both are captured: autograd, which takes part in the passes, would see changed tensors.
        actual = [replays.forward(), None if replays.backward is None else replays.backward()]
        for result, wanted in zip(actual, expected, strict=True):
            if result is not None and wanted is not None and not _agree(result, wanted):
                raise ValueError("a replay gave another result")
        return replays

    @staticmethod
    def _warmed_up(capturer: Capturer, forward: Forward, images: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Run the passes where they will be captured; return their results, and the gradient of the logits for them."""
        (logits, backward), waits = capturer.warm_up(lambda: forward(images))
        logits, gradient, of_images = logits.clone(), torch.ones_like(logits), None
        if backward is not None:
            of_images, waits_too = capturer.warm_up(partial(backward, gradient))
            of_images, waits = None if of_images is None else of_images.clone(), waits or waits_too
        if waits:
            raise ValueError("a step synchronises with the GPU")
        return [logits, of_images], gradient


def _agree(result: Tensor, wanted: Tensor) -> bool:
    same = (result == wanted) | (result.isnan() & wanted.isnan())  # also where logits of absent classes are infinite
    difference = (result - wanted).masked_fill(same, 0)
    size = wanted.nan_to_num(nan=0, posinf=0, neginf=0)
    return bool(difference.double().norm() <= _TOLERANCE * size.double().norm())
