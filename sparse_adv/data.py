"""Data sets as tensors: images in [0, 1], split into train, validation and test."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Labelled images: float32 [N, C, H, W] in [0, 1] and int64 [N]."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """Train on `train`, choose and watch on `validation`, touch `test` once, at the end."""

    train: Split
    validation: Split
    test: Split


def digits(validation: int = 300, test: int = 300, seed: int = 0) -> Dataset:
    """Scikit-learn's bundled handwritten digits: 1797 real images of 1 x 8 x 8 pixels, no download.

    At eps 8/255 even natural training is robust here; eps 0.2 makes a task of it.

    Args:
        validation, test: how many images to keep apart.
        seed: decides which images those are.

    Raises:
        ValueError: if nothing would be left to train on.
        ModuleNotFoundError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the digits come with scikit-learn: pip install "sparse_adv[demo]"') from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div_(16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes).long()
    return split(Split(images, labels), validation, test, seed)


def split(whole: Split, validation: int, test: int, seed: int = 0) -> Dataset:
    """Divide images at random into train, validation and test."""
    count = len(whole.labels)
    if min(validation, test) < 0 or validation + test >= count:
        raise ValueError(f"validation and test must leave some of {count} images to train on, got {validation}, {test}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = order.split([count - validation - test, validation, test])
    return Dataset(*(Split(whole.images[part], whole.labels[part]) for part in parts))
