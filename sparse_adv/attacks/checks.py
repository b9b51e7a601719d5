"""The values that an attack refuses: images outside [lo, hi], labels that are no class of the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparse_adv.ops.pgd_step import check_floating

Labels = tuple[int, int] | None
"""The least and the greatest label of a batch; None where there is none to look at."""


def check_batch(x: Tensor, y: Any, labelled: bool = True, lo: float = 0.0, hi: float = 1.0) -> Labels:
    """Refuse images outside [lo, hi] or not finite, and labels that do not fit them; on a GPU this waits, once.

    Args:
        x: float tensor [N, ...], the images.
        y: int64 tensor [N], their labels, if `labelled`; else it is not looked at.
        lo, hi: the range of pixel values.

    Returns:
        The labels' range, for `check_labels` once the model's classes are known.

    Raises:
        TypeError: if x is not floating or y not int64.
        ValueError: if a value or shape is out of range.
    """
    _check_images(x)
    fitting = labelled and _labels_fit(x, y)
    labels = None
    if x.numel():
        least, greatest = _extremes(x, y if fitting else None).tolist()
        _check_pixels(least[0], greatest[0], lo, hi)
        labels = (int(least[1]), int(greatest[1])) if fitting else None
    if labelled and not fitting:
        _refuse_labels(x, y)
    return labels


def check_labels(labels: Labels, classes: int) -> None:
    """Raises ValueError if labels of this range are not all among so many classes."""
    if labels is not None and (labels[0] < 0 or labels[1] >= classes):
        raise ValueError(f"y must lie in [0, {classes - 1}], the model's classes, got {labels[0]} to {labels[1]}")


def classes_of(logits: Tensor, images: int) -> int:
    """How many classes the model tells apart; raises ValueError if these are no logits of so many images."""
    if logits.dim() != 2 or len(logits) != images:
        raise ValueError(f"model must return logits [{images}, classes], got shape {tuple(logits.shape)}")
    return logits.shape[1]


class Inspection:
    """Checks one batch after the other, on a GPU without waiting: what it saw stays there until it is asked for.

    Args:
        deferred: whether wrong values are told by `report` and not at once. What the host knows, shapes and dtypes, is
            always told at once.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self._classes = 0
        self._seen: Tensor | None = None

    def admit(self, x: Tensor, y: Tensor, classes: int) -> Tensor:
        """Look at images, which should lie in [0, 1], and at their labels, as `check_batch` does.

        Returns:
            Labels to go on with. Where the verdict is still to come, all of them are classes: with one that is none, a
            GPU would give up the whole process before anybody could say why.
        """
        if not self.deferred:
            check_labels(check_batch(x, y), classes)
            return y
        _check_images(x)
        if not _labels_fit(x, y):
            _refuse_labels(x, y)
        if not x.numel():
            return y
        self._classes = classes
        seen = _extremes(x, y)
        if self._seen is not None:
            seen = torch.stack([torch.minimum(self._seen[0], seen[0]), torch.maximum(self._seen[1], seen[1])])
        self._seen = seen
        return y.clamp(0, classes - 1)

    def report(self) -> None:
        """Say what was wrong with the batches since the last report; waits for the GPU.

        Raises:
            ValueError: if a value was out of range.
        """
        seen, self._seen = self._seen, None
        if seen is not None:
            least, greatest = seen.tolist()
            _check_pixels(least[0], greatest[0], 0.0, 1.0)
            check_labels((int(least[1]), int(greatest[1])), self._classes)


def _check_images(x: Tensor) -> None:
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be a batch of images [N, ...], got shape {tuple(x.shape)}")


def _check_pixels(low: float, high: float, lo: float, hi: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("x must be finite, got NaN or infinite values")
    if low < lo or high > hi:
        raise ValueError(
            f"x must lie in [{lo:g}, {hi:g}], got values from {low:g} to {high:g}: put the normalisation inside "
            "the model"
        )


def _labels_fit(x: Tensor, y: Any) -> bool:
    return isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == x.shape[:1]


def _refuse_labels(x: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        raise TypeError(f"y must be an int64 tensor, got {y.dtype if isinstance(y, Tensor) else type(y).__name__}")
    raise ValueError(f"y must have one label per image, shape [{len(x)}], got {tuple(y.shape)}")


def _extremes(x: Tensor, y: Tensor | None) -> Tensor:
    """float64 [2, 1 or 2]: least and greatest pixel and, if there are labels, least and greatest label; NaN spreads."""
    found = [tensor.detach().aminmax() for tensor in (x, y) if tensor is not None]
    return torch.stack([torch.stack([each[end].double() for each in found]) for end in (0, 1)])
