"""`load`: a data set by its place."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from sparse_adv.data.cifar import read_cifar
from sparse_adv.data.dataset import Dataset, Split, hold_out
from sparse_adv.data.digits import read_digits
from sparse_adv.data.folders import read_folders
from sparse_adv.data.idx import read_idx
from sparse_adv.data.source import Source

VALIDATION = 0.1

UNDERSTOOD = (
    "'digits', cifar-10-batches-py, cifar-100-python or their .tar.gz, a folder of MNIST's idx files, or a folder of "
    "PNG or JPEG images for each class"
)


def load(
    source: str | Path,
    *,
    validation: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Read a data set and hold validation images out of its training images.

    Args:
        source: "digits" (scikit-learn's, no download), or a folder or archive: CIFAR-10 and CIFAR-100 as published,
            MNIST and Fashion-MNIST (idx files), or a tree of PNG and JPEG images, see `folders.read_folders`.
        validation: share of the training images to hold out, or from 1 on their number; None for a tenth, or for the
            validation images that the data set has of its own.
        limit: use the first N training images only, before any are held out.
        seed: of the choice of validation images.
        device: where the images shall live.

    Raises:
        FileNotFoundError: if there is nothing at that place, or a part of it is missing.
        ValueError: if it is nothing that is understood, damaged, or too few images are left.
        ModuleNotFoundError: if a package that reads it is missing.
    """
    found = _read(source)
    train, held = found.train, found.validation
    if limit is not None:
        if not 2 <= limit <= len(train.labels):
            raise ValueError(
                f"limit must be from 2 to the {len(train.labels)} training images of {source}, got {limit}"
            )
        train = Split(train.images[:limit], train.labels[:limit])
    if held is None or validation is not None:
        train, held = hold_out(train, _count(validation, len(train.labels)), seed)
    return Dataset(train, held, found.test, found.classes, found.name).to(device)


def _read(source: str | Path) -> Source:
    if source == "digits":
        return read_digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no data set at {path}; only 'digits' needs no files")
    for read in (read_cifar, read_idx, read_folders):
        found = read(path)
        if found is not None:
            return found
    raise ValueError(f"{path} is no data set that is understood: {UNDERSTOOD}")


def _count(validation: float | None, images: int) -> int:
    if validation is None:
        return max(1, round(VALIDATION * images))
    if not 0 < validation < math.inf or (validation > 1 and validation != int(validation)):
        raise ValueError(f"validation must be a share in (0, 1) or a whole number of images, got {validation:g}")
    count = round(validation * images) if validation < 1 else int(validation)
    if not 0 < count < images:
        raise ValueError(f"validation must hold out some of {images} images and leave some, got {validation:g}")
    return count
