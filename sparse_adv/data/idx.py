"""MNIST and Fashion-MNIST: idx files, compressed by gzip or not (LeCun et al. 1998; Xiao et al. 2017)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_adv.data.dataset import RawDataset, Split

_CLASSES = 10
_UINT8 = 8
"""Code of the element type in the header of an idx file."""
_MAX_BYTES = 256 << 20
"""Largest size of a file, unpacked; the largest of MNIST has 45 MiB."""
_PARTS = ("train", "t10k")


def read_idx(path: Path) -> RawDataset | None:
    """Read MNIST or Fashion-MNIST from a folder of idx files, or from the folders that torchvision makes below it.

    The data set's name is "fashion_mnist" if the folder's name or its parent's contains "fashion", else "mnist".

    Returns:
        The data set; None if there are no idx files.

    Raises:
        FileNotFoundError: if one of the four files is missing.
        ValueError: if a file is damaged, the files do not match, or there are two data sets.
    """
    folders = (path, path / "raw", path / "MNIST" / "raw", path / "FashionMNIST" / "raw")
    present = [folder for folder in folders if any(_files(folder, _images_name(part)) for part in _PARTS)]
    if len(present) > 1:
        raise ValueError(f"{path} contains two data sets, choose one: {present[0]} or {present[1]}")
    return _read(present[0]) if present else None


def _images_name(part: str) -> str:
    return f"{part}-images-idx3-ubyte"


def _files(folder: Path, name: str) -> list[Path]:
    names = (name, name.replace("-idx", ".idx"))  # the second one as Kaggle has it
    return [path for each in names for path in (folder / each, folder / f"{each}.gz") if path.is_file()]


def _read(folder: Path) -> RawDataset:
    train, test = (
        _split(_array(folder, _images_name(part), 3), _array(folder, f"{part}-labels-idx1-ubyte", 1), part, folder)
        for part in _PARTS
    )
    sizes = [" x ".join(map(str, split.images.shape[2:])) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder} has training images of {sizes[0]} pixels but test images of {sizes[1]}")
    fashion = "fashion" in "/".join(folder.resolve().parts[-2:]).lower()
    return RawDataset(train, test, _CLASSES, "fashion_mnist" if fashion else "mnist")


def _split(images: np.ndarray, labels: np.ndarray, part: str, folder: Path) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {part}-images but {len(labels)} {part}-labels")
    if len(labels) and labels.max() >= _CLASSES:
        raise ValueError(f"{folder} has {part}-labels up to {labels.max()}, outside [0, {_CLASSES - 1}]")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _array(folder: Path, name: str, dims: int) -> np.ndarray:
    """Read one file: two zero bytes, type, number of dimensions, sizes as big-endian int32, then the elements."""
    files = _files(folder, name)
    if not files:
        raise FileNotFoundError(f"{folder} lacks {name} (or {name}.gz)")
    path = files[0]
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _elements(file, dims, path)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or its download is incomplete: {error}") from error


def _elements(file: Any, dims: int, path: Path) -> np.ndarray:
    start = file.read(4 + 4 * dims)
    if len(start) < 4 + 4 * dims or start[:4] != bytes([0, 0, _UINT8, dims]):
        raise ValueError(f"{path} is not an idx file of bytes with {dims} dimensions")
    sizes = [int(size) for size in np.frombuffer(start, ">u4", dims, 4)]
    count = math.prod(sizes)
    if count > _MAX_BYTES:
        raise ValueError(f"{path} must have at most {_MAX_BYTES >> 20} MiB, its header has sizes {sizes}")
    # One byte more than expected, not the whole file: a small compressed file may expand a thousandfold.
    content = file.read(count + 1)
    if len(content) != count:
        got = f"more than {count}" if len(content) > count else len(content)
        raise ValueError(f"{path} must have {count} bytes after its header for sizes {sizes}, got {got}")
    return np.frombuffer(bytearray(content), np.uint8).reshape(sizes)
