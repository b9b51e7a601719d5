"""MNIST and Fashion-MNIST: idx files, packed by gzip or not (LeCun et al. 1998; Xiao et al. 2017)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from sparse_adv.data.dataset import Split
from sparse_adv.data.source import Source

CLASSES = 10
_UINT8 = 8
_PARTS = ("train", "t10k")


def read_idx(path: Path) -> Source | None:
    """MNIST or Fashion-MNIST from this folder, or from where torchvision keeps them below it.

    The data set is called "fashion_mnist" if its folder, or the one around it, has "fashion" in its name.

    Returns:
        None if there is no such file.

    Raises:
        FileNotFoundError: if one of the four files is missing.
        ValueError: if one is damaged, or they do not fit each other.
    """
    places = (path, path / "raw", path / "MNIST" / "raw", path / "FashionMNIST" / "raw")
    found = [place for place in places if any(_files(place, _images(part)) for part in _PARTS)]
    if len(found) > 1:
        raise ValueError(f"{path} holds two data sets, name one of them: {found[0]} or {found[1]}")
    return _read(found[0]) if found else None


def _images(part: str) -> str:
    return f"{part}-images-idx3-ubyte"


def _files(folder: Path, name: str) -> list[Path]:
    return [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]


def _read(folder: Path) -> Source:
    train, test = (
        _split(_array(folder, _images(part), 3), _array(folder, f"{part}-labels-idx1-ubyte", 1), part, folder)
        for part in _PARTS
    )
    sizes = [" x ".join(map(str, split.images.shape[2:])) for split in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{folder} has training images of {sizes[0]} pixels but test images of {sizes[1]}")
    fashion = "fashion" in "/".join(folder.resolve().parts[-2:]).lower()
    return Source(train, test, CLASSES, "fashion_mnist" if fashion else "mnist")


def _split(images: np.ndarray, labels: np.ndarray, part: str, folder: Path) -> Split:
    if len(images) != len(labels):
        raise ValueError(f"{folder} has {len(images)} {part}-images but {len(labels)} {part}-labels")
    if len(labels) and labels.max() >= CLASSES:
        raise ValueError(f"{folder} has {part}-labels up to {labels.max()}, outside [0, {CLASSES - 1}]")
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def _array(folder: Path, name: str, dims: int) -> np.ndarray:
    """The array of one file: two zero bytes, type, number of dimensions, sizes as big-endian int32, then the bytes."""
    found = _files(folder, name)
    if not found:
        raise FileNotFoundError(f"{folder} lacks {name} (or {name}.gz)")
    path = found[0]
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged, as by a download cut short: {error}") from error
    begin = 4 + 4 * dims
    if len(content) < begin or content[:4] != bytes([0, 0, _UINT8, dims]):
        raise ValueError(f"{path} is no idx file of bytes in {dims} dimensions")
    sizes = [int(size) for size in np.frombuffer(content, ">u4", dims, 4)]
    if len(content) != begin + math.prod(sizes):
        raise ValueError(f"{path} must have {begin + math.prod(sizes)} bytes for {sizes}, got {len(content)}")
    return np.frombuffer(content, np.uint8, offset=begin).reshape(sizes).copy()
