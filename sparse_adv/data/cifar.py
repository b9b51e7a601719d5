"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009): a folder of pickled batches, or the archive of that folder."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from sparse_adv.data.dataset import RawDataset, Split
from sparse_adv.plain_pickles import unpickle_arrays


class _Variant(NamedTuple):
    """File names, key of the labels, number of classes and name of CIFAR-10 or CIFAR-100."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    classes: int
    name: str


_VARIANTS = (
    _Variant(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        classes=10,
        name="cifar10",
    ),
    _Variant(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test=("test",),
        labels="fine_labels",
        classes=100,
        name="cifar100",
    ),
)


def read_cifar(path: Path) -> RawDataset | None:
    """Read CIFAR from its folder, from its archive (of any name), or from a folder that contains one of them.

    Returns:
        The data set; None if there is no such folder or archive.

    Raises:
        FileNotFoundError: if a batch is missing.
        ValueError: if a file is damaged or has unexpected contents, or `path` contains both CIFAR-10 and CIFAR-100.
    """
    if path.is_file():
        return _from_archive(path)
    present = [(variant, place) for variant in _VARIANTS if (place := _locate(path, variant))]
    if len(present) > 1:
        raise ValueError(f"{path} contains two data sets, choose one: {present[0][1]} or {present[1][1]}")
    for variant, place in present:
        return _from_folder(place, variant) if place.is_dir() else _from_archive(place)
    return None


def _locate(path: Path, variant: _Variant) -> Path | None:
    """Return the folder or archive of a variant. A folder may be incomplete: reading it names the missing batch."""
    if path.resolve().name == variant.folder or any((path / name).is_file() for name in variant.train):
        return path
    return next((place for place in (path / variant.folder, path / variant.archive) if place.exists()), None)


def _from_folder(folder: Path, variant: _Variant) -> RawDataset:
    def open_batch(name: str) -> IO[bytes]:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks the batch {name!r}")
        return path.open("rb")

    return _read(open_batch, variant, folder)


def _from_archive(path: Path) -> RawDataset | None:
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":  # not gzip
            return None
    batches: dict[tuple[str, ...], bytes] = {}
    wanted = {(variant.folder, name) for variant in _VARIANTS for name in (*variant.train, *variant.test)}
    try:
        with gzip.open(path) as compressed:
            unpacked: Any = _Bounded(compressed)
            with tarfile.open(fileobj=unpacked, mode="r|") as archive:
                for member in archive:
                    place = PurePosixPath(member.name).parts[-2:]
                    content = archive.extractfile(member) if place in wanted else None
                    if content:
                        batches[place] = content.read()
            while unpacked.read(1 << 20):  # gzip verifies its checksum at the end of the file
                pass
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a .tar.gz archive, is damaged, or its download is incomplete: {error}"
        ) from error
    variant = next((variant for variant in _VARIANTS if any(folder == variant.folder for folder, _ in batches)), None)
    if variant is None:
        return None

    def open_batch(name: str) -> IO[bytes]:
        if (variant.folder, name) not in batches:
            raise FileNotFoundError(f"{path} lacks the batch {name!r}")
        return io.BytesIO(batches[variant.folder, name])

    return _read(open_batch, variant, path)


class _Bounded:
    """Reads a compressed file only up to the size that CIFAR can have: a small file may expand a thousandfold."""

    _LIMIT = 400 << 20

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, self._LIMIT

    def read(self, count: int) -> bytes:
        content = self.file.read(count)
        self.left -= len(content)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {self._LIMIT >> 20} MiB")
        return content


def _read(open_batch: Callable[[str], IO[bytes]], variant: _Variant, place: Path) -> RawDataset:
    train, test = (_split(open_batch, names, variant, place) for names in (variant.train, variant.test))
    return RawDataset(train, test, variant.classes, variant.name)


def _split(open_batch: Callable[[str], IO[bytes]], names: Sequence[str], variant: _Variant, place: Path) -> Split:
    images, labels = [], []
    for name in names:
        with open_batch(name) as file:
            try:
                batch_images, batch_labels = _arrays(unpickle_arrays(file), variant)
            except ValueError as error:
                raise ValueError(f"batch {name!r} of {place} {error}") from error
        images.append(batch_images)
        labels.append(batch_labels)
    return Split(torch.from_numpy(np.concatenate(images)), torch.from_numpy(np.concatenate(labels)))


def _arrays(batch: object, variant: _Variant) -> tuple[np.ndarray, np.ndarray]:
    """Return images [N, 3, 32, 32] and labels [N] of an unpickled batch."""
    if not isinstance(batch, dict):
        raise ValueError(f"must hold a dict, got {type(batch).__name__}")
    # The published files were pickled by Python 2: their keys are bytes. Files pickled again have str keys.
    images = batch.get(b"data", batch.get("data"))
    labels = batch.get(variant.labels.encode(), batch.get(variant.labels))
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError("must hold 'data', a uint8 array with 3072 bytes per image")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(isinstance(x, int) for x in labels):
        raise ValueError(f"must hold {variant.labels!r}, a list with one integer per image")
    if labels and not 0 <= min(labels) <= max(labels) < variant.classes:
        raise ValueError(f"has labels from {min(labels)} to {max(labels)}, outside [0, {variant.classes - 1}]")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
