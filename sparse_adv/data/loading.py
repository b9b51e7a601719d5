"""`load`: read a data set from its name or path."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_adv.argument_types import checks_types
from sparse_adv.config.checks import require_part
from sparse_adv.data.cifar import read_cifar
from sparse_adv.data.dataset import Dataset, RawDataset, Split, hold_out, stratified
from sparse_adv.data.digits import read_digits
from sparse_adv.data.folders import read_folders
from sparse_adv.data.idx import read_idx

_VALIDATION_FRACTION = 0.1

_FORMATS = (
    "cifar-10-batches-py or cifar-100-python (folder or .tar.gz), MNIST or Fashion-MNIST (folder of idx files), or a "
    "folder that has a subfolder of images for each class"
)


@checks_types
def load(
    source: str | Path,
    *,
    validation: float | None = None,
    limit: int | None = None,
    share: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Read a data set and hold validation images out of its training images.

    Args:
        source: "digits" (included in scikit-learn, no download), or the path of a folder or archive: CIFAR-10 or
            CIFAR-100 as published, MNIST or Fashion-MNIST (idx files), or a folder with a subfolder of images for each
            class, see `folders.read_folders`.
        validation: what to hold out of the training images: a fraction below 1, or a number of images; None for the
            data set's own validation images, or for a tenth if it has none.
        limit: use only the first `limit` training images, before any are held out.
        share: use only this fraction of the training images that are left after that, see `stratified`.
        seed: seed of the choice of validation images, and of the training images of a share.
        device: device of the images and labels.

    Returns:
        The data set; its test images do not depend on any argument but `source`.

    Raises:
        FileNotFoundError: if the path does not exist, or a file of the data set is missing.
        ValueError: if the format is not one of the above, a file is damaged, a split has no image, or validation, limit
            or share is out of range.
        ModuleNotFoundError: if the package that reads the format is not installed.

    Examples:
        >>> from sparse_adv import data
        >>> dataset = data.load("digits", validation=100)
        >>> dataset.train.images.shape
        torch.Size([1397, 1, 8, 8])
        >>> len(dataset.validation.labels), len(dataset.test.labels), dataset.classes
        (100, 300, 10)
    """
    raw = _read(source)
    train, held_out = raw.train, raw.validation
    for name, part in (("training", train), ("validation", held_out), ("test", raw.test)):
        if part is not None and not len(part.labels):
            raise ValueError(f"{source} must have {name} images, got none")
    if limit is not None:
        if not 2 <= limit <= len(train.labels):
            raise ValueError(
                f"limit must be from 2 to the {len(train.labels)} training images of {source}, got {limit!r}"
            )
        train = Split(train.images[:limit], train.labels[:limit])
    if held_out is None or validation is not None:
        train, held_out = hold_out(train, _validation_count(validation, len(train.labels)), seed)
    train = stratified(train, share, seed)
    return Dataset(train, held_out, raw.test, raw.classes, raw.name, raw.class_names).to(device)


def _read(source: str | Path) -> RawDataset:
    if source == "digits":
        return read_digits()
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"there is no data set at {path}: no such file or folder")
    for read in (read_cifar, read_idx, read_folders):
        raw = read(path)
        if raw is not None:
            return raw
    raise ValueError(f"{path} is not a data set in a supported format: {_FORMATS}")


def _validation_count(validation: float | None, images: int) -> int:
    if validation is None:
        return max(1, round(_VALIDATION_FRACTION * images))
    require_part(validation)
    count = round(validation * images) if validation < 1 else int(validation)
    if not 0 < count < images:
        raise ValueError(f"validation must hold out at least one of {images} images and not all, got {validation:g}")
    return count
