"""What training refuses in one sentence: models with nothing to train, and batches that a model cannot take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from sparse_adv.attacks.checks import int64_labels
from sparse_adv.attacks.modes import bn_mode
from sparse_adv.errors import first_line
from sparse_adv.masks.layers import check_initialized


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError unless a model has weights and some of them require a gradient.

    Examples:
        >>> check_trainable(nn.Linear(2, 2).requires_grad_(False))
        Traceback (most recent call last):
        ...
        ValueError: model must have a parameter that requires a gradient, got none
    """
    for name, module in model.named_modules():
        check_initialized(name, module)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model must have its weights in memory, got {name!r} on the meta device")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")


def count_batches(batches: Iterable[Any]) -> int:
    """Return the number of batches of an epoch.

    Raises:
        TypeError: if the batches have no length.
        ValueError: if there is none.

    Examples:
        >>> count_batches([])
        Traceback (most recent call last):
        ...
        ValueError: batches must hold at least one batch, got none
    """
    if not isinstance(batches, Sized):
        raise TypeError(
            f"batches must have a length and be iterable once an epoch (a list, a DataLoader, data.Batches), got "
            f"{type(batches).__name__}"
        )
    if not len(batches):
        raise ValueError("batches must hold at least one batch, got none")
    return len(batches)


def pairs_of(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches as (images, labels), labels of any integer dtype as int64.

    Raises:
        TypeError: if a batch is not two tensors, for example a dict or a tuple of three.
        ValueError: if a batch is a single image.

    Examples:
        >>> next(pairs_of([{"image": torch.zeros(1), "label": torch.zeros(1)}]))
        Traceback (most recent call last):
        ...
        TypeError: a batch must be two tensors (images, labels), got a dict
    """
    for batch in batches:
        listed = isinstance(batch, list | tuple)
        if not listed or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
            kinds = [type(part).__name__ for part in batch] if listed else []
            what = f"({', '.join(kinds)})" if listed else f"a {type(batch).__name__}"
            raise TypeError(f"a batch must be two tensors (images, labels), got {what[:100]}")
        if not batch[1].dim():
            raise ValueError("a batch must have labels [N], got a single one: give the DataLoader a batch_size")
        yield batch[0], int64_labels(batch[1])


@contextmanager
def first_pass(images: Tensor) -> Iterator[None]:
    """Name the images in an error of a model's first pass: their shape or dtype may not fit the model.

    Examples:
        >>> with first_pass(images := torch.zeros(1, 2, dtype=torch.float64)):
        ...     nn.Linear(2, 1)(images)
        Traceback (most recent call last):
        ...
        ValueError: model does not take images of shape (1, 2) and dtype torch.float64: mat1 and mat2 must have the ...
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        about = f"shape {tuple(images.shape)} and dtype {images.dtype}"
        raise ValueError(f"model does not take images of {about}: {first_line(error)}") from error


def check_batch_sizes(model: nn.Module, batches: Iterable[Any], x: Tensor) -> None:
    """Raise ValueError before the first update if an epoch begins or ends with a batch that BatchNorm cannot train on.

    That is a batch of one image, in a network with a BatchNorm whose channels then have a single value.
    """
    if 1 not in (len(x), _last_size(batches)):
        return
    try:
        with bn_mode(model, "batch"), torch.no_grad():
            model(x[:1])
    except ValueError as error:
        raise ValueError(
            "batches must have more than one image in each batch, also in the last, to train BatchNorm: take more "
            f"images, another batch_size or, of a DataLoader, drop_last=True ({error})"
        ) from error


def _last_size(batches: Iterable[Any]) -> int | None:
    """The number of images in the last batch of a list, or of a DataLoader that keeps its last batch; else None."""
    if isinstance(batches, Sequence):
        return len(batches[-1][1])
    sampler = getattr(batches, "batch_sampler", None)
    if type(sampler) is not BatchSampler or sampler.drop_last or not isinstance(sampler.sampler, Sized):
        return None
    return (len(sampler.sampler) - 1) % sampler.batch_size + 1
