"""Gradients of a batch that becomes smaller while an attack runs: adversarial images need no more steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sparse_adv.engine import input_gradients
from sparse_adv.engine.gradients import LossOfLogits


class BatchGradients:
    """`engine.input_gradients` of a model for batches of at most as many images as the first one.

    The kernels of a program are chosen for its whole batch, and some programs cannot compute fewer images. So when half
    of the batch or less is left, a program for half the size takes over. Only halves are used, because a model keeps
    few programs.

    Args:
        model: in the modes in which it is to run.
        images: the whole batch.
        use_engine: as in `engine.input_gradients`.
    """

    def __init__(self, model: nn.Module, images: Tensor, use_engine: bool) -> None:
        self._model, self._images, self._use_engine = model, images.detach(), use_engine
        self._size = len(images)
        self._opened = ExitStack()
        self._enter()

    def logits(self, x: Tensor) -> Tensor:
        """What the model returns."""
        self._fit(len(x))
        return self.formed_by.logits(x)

    def gradient(self, x: Tensor, loss: LossOfLogits) -> Tensor:
        """The gradient of the sum of loss(logits) with respect to the input."""
        self._fit(len(x))
        return self.formed_by.gradient(x, loss)

    def close(self) -> None:
        """Give the program back."""
        self._opened.close()

    def _enter(self) -> None:
        opened = input_gradients(self._model, self._images[: self._size], self._use_engine)
        self.formed_by = self._opened.enter_context(opened)

    def _fit(self, count: int) -> None:
        size = len(self._images)
        while 0 < count <= size // 2:
            size = -(-size // 2)
        if size != self._size:
            self.close()
            self._size = size
            self._enter()


@contextmanager
def batch_gradients(model: nn.Module, images: Tensor, use_engine: bool) -> Iterator[BatchGradients]:
    """Open `BatchGradients` with autograd enabled, in `no_grad` and `inference_mode` too; close them at the end."""
    with torch.inference_mode(False), torch.enable_grad():
        gradients = BatchGradients(model, images, use_engine)
        try:
            yield gradients
        finally:
            gradients.close()
