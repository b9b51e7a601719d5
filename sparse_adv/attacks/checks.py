"""Validation of the input of an attack: images in [lo, hi], labels that are classes of the model."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.ops.arguments import check_floating, check_tensors

log = logging.getLogger(__name__)

_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)
_ROUNDING = 1e-6
"""Pixels may leave the range by this much, times a bound above 1: float32 transforms give values such as -3e-8."""

LabelRange = tuple[int, int] | None
"""Smallest and largest label of a batch; None without labels to check."""


def check_batch(
    images: Tensor, labels: object, with_labels: bool = True, lo: float | Tensor = 0.0, hi: float | Tensor = 1.0
) -> LabelRange:
    """Check the values of a batch; on a GPU this synchronises once.

    Args:
        images: float tensor [N, ...].
        labels: int64 tensor [N]; anything if not `with_labels`.
        with_labels: whether labels are checked.
        lo, hi: range of pixel values, numbers or, for each channel, tensors [C].

    Returns:
        The range of the labels, for `check_label_range` as soon as the number of classes is known.

    Raises:
        TypeError: if images are not floating point or labels not int64.
        ValueError: if images are outside of [lo, hi] by more than 1e-6 (times a bound above 1), or not finite, or a
            shape is wrong.
    """
    check_images(images)
    valid = _valid_labels(images, labels) if with_labels else None
    label_range = None
    if images.numel():
        smallest, largest = _extremes(images, valid).tolist()
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            _check_channels(images, lo, hi)
        else:
            _check_pixel_range(smallest[0], largest[0], lo, hi)
        label_range = None if valid is None else (int(smallest[1]), int(largest[1]))
    if with_labels and valid is None:
        raise _labels_error(images, labels)
    return label_range


def check_images(images: Tensor) -> None:
    """Raise TypeError or ValueError unless these are a batch of images, whatever their values."""
    if getattr(images, "dtype", None) == torch.uint8:
        raise TypeError("images must be a floating point tensor, got torch.uint8: data.to_unit(images) is one")
    check_floating("images", images)
    if images.dim() < 2:
        raise ValueError(f"images must be a batch [N, ...], got shape {tuple(images.shape)}")
    if len(images) and not images.numel():
        raise ValueError(f"images must have pixels, got shape {tuple(images.shape)}")
    check_has_values("images", images)


def check_labels(images: Tensor, labels: object) -> None:
    """Raise TypeError or ValueError unless these are int64 labels of the images, whatever their values."""
    if _valid_labels(images, labels) is None:
        raise _labels_error(images, labels)


def check_has_values(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the tensor is on the meta device, which has only shapes."""
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the device meta")


def check_label_range(label_range: LabelRange, classes: int) -> None:
    """Raise ValueError if a label is not in [0, classes - 1]."""
    if label_range is not None and (label_range[0] < 0 or label_range[1] >= classes):
        raise ValueError(
            f"labels must lie in [0, {classes - 1}], the model's classes, got {label_range[0]} to {label_range[1]}"
        )


def check_classes(labels: Tensor, classes: int) -> None:
    """Raise ValueError if a label is not in [0, classes - 1]; on a GPU this synchronises."""
    if len(labels):
        check_label_range((int(labels.min()), int(labels.max())), classes)


def count_classes(logits: object, images: int) -> int:
    """Return the number of classes.

    Raises:
        TypeError: if the model's output is not a tensor.
        ValueError: if it is not logits [images, classes].
    """
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"model must return logits [{images}, classes], got a {type(logits).__name__}: wrap it in a function that "
            "returns the logits alone"
        )
    if logits.dim() != 2 or len(logits) != images:
        raise ValueError(f"model must return logits [{images}, classes], got shape {tuple(logits.shape)}")
    return logits.shape[1]


def int64_labels(labels: Any) -> Any:
    """Return labels of another integer dtype as int64, and anything else unchanged."""
    if isinstance(labels, Tensor) and labels.dtype in _INTEGERS:
        return labels.long()
    return labels


def reads_at_once(device: torch.device) -> bool:
    """Return whether the host can read values of this device's tensors without waiting for queued work.

    Examples:
        >>> reads_at_once(torch.device("cpu")), reads_at_once(torch.device("cuda"))
        (True, False)
    """
    return device.type == "cpu"


class InputValidator:
    """Validates batches of images in [0, 1] and labels; on a GPU it can do so without synchronising.

    Args:
        deferred: False: `check` raises errors about values. True: `check` only updates the range of all values seen, on
            the device, and `raise_deferred` raises. Wrong shapes and dtypes raise in `check` in both cases, because the
            host knows them.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self._classes = 0
        self._seen: Tensor | None = None

    def check(self, images: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Validate a batch.

        Args:
            images: float tensor [N, ...].
            labels: int64 tensor [N].
            classes: number of classes of the model.

        Returns:
            Labels to compute with. If deferred, they are clamped to [0, classes - 1], because on a GPU a label out of
            range triggers a device-side assert that ends the process before `raise_deferred` is called.

        Raises:
            TypeError, ValueError: as in `check_batch`.
        """
        if not self.deferred:
            check_label_range(check_batch(images, labels), classes)
            return labels
        check_images(images)
        check_labels(images, labels)
        if not images.numel():
            return labels
        self._classes = classes
        seen = _extremes(images, labels)
        if self._seen is not None:
            seen = torch.stack([torch.minimum(self._seen[0], seen[0]), torch.maximum(self._seen[1], seen[1])])
        self._seen = seen
        return labels.clamp(0, classes - 1)

    def raise_deferred(self) -> None:
        """Raise ValueError if a value was out of range since the last call; synchronises with the GPU."""
        seen, self._seen = self._seen, None
        if seen is not None:
            smallest, largest = seen.tolist()
            _check_pixel_range(smallest[0], largest[0], 0.0, 1.0)
            check_label_range((int(smallest[1]), int(largest[1])), self._classes)


def _check_pixel_range(smallest: float, largest: float, lo: float, hi: float) -> None:
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError("images must be finite, got NaN or infinite values")
    if lo <= smallest and largest <= hi:
        return
    rounding = _ROUNDING * max(1.0, *(abs(bound) for bound in (lo, hi) if math.isfinite(bound)))
    if lo - rounding <= smallest and largest <= hi + rounding:
        _warn_of_rounding(lo, hi)
    else:
        raise ValueError(
            f"images must lie in [{lo:g}, {hi:g}], got values from {smallest:.7g} to {largest:.7g}: put the "
            "normalisation inside the model"
        )


def _check_channels(images: Tensor, lo: float | Tensor, hi: float | Tensor) -> None:
    bounds = (torch.as_tensor(bound, dtype=images.dtype, device=images.device) for bound in (lo, hi))
    lows, highs = (bound.expand(images.shape[1]).tolist() for bound in bounds)
    for channel, (low, high) in enumerate(zip(lows, highs, strict=True)):
        smallest, largest = images[:, channel].detach().aminmax()
        try:
            _check_pixel_range(smallest.item(), largest.item(), low, high)
        except ValueError as error:
            raise ValueError(f"channel {channel}: {error}") from None


@cache
def _warn_of_rounding(lo: float, hi: float) -> None:
    log.warning(
        "images leave [%g, %g] by no more than rounding (%g, times a bound above 1): changed images lie inside",
        *(lo, hi, _ROUNDING),
    )


def _valid_labels(images: Tensor, labels: object) -> Tensor | None:
    """Return the labels if type, dtype and shape are right, else None."""
    if isinstance(labels, Tensor):
        check_tensors(labels=labels)
        check_has_values("labels", labels)
        if labels.dtype == torch.int64 and labels.shape == images.shape[:1]:
            return labels
    return None


def _labels_error(images: Tensor, labels: object) -> TypeError | ValueError:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        actual = labels.dtype if isinstance(labels, Tensor) else shortened(labels)
        return TypeError(f"labels must be an int64 tensor, got {actual}")
    other = ": attacks.pgd takes others with a function (logits, labels) as its loss" if labels.dim() > 1 else ""
    return ValueError(f"labels must have one label per image, shape [{len(images)}], got {tuple(labels.shape)}{other}")


def _extremes(images: Tensor, labels: Tensor | None) -> Tensor:
    """float64 [2, 1 or 2]: minimum and maximum of the pixels and, if given, of the labels; NaN if a pixel is NaN."""
    ranges = [tensor.detach().aminmax() for tensor in (images, labels) if tensor is not None]
    return torch.stack([torch.stack([extremes[i].double() for extremes in ranges]) for i in (0, 1)])
