"""CIFAR-10 and CIFAR-100 as published (Krizhevsky 2009): a folder of pickled batches, or the archive of it."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

import numpy as np
import torch

from sparse_adv.data.dataset import Split
from sparse_adv.data.source import Source
from sparse_adv.files import unpickle_arrays


class _Edition(NamedTuple):
    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    classes: int
    name: str


_EDITIONS = (
    _Edition(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "labels",
        10,
        "cifar10",
    ),
    _Edition("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "fine_labels", 100, "cifar100"),
)


def read_cifar(path: Path) -> Source | None:
    """CIFAR from its folder, from its archive (whatever that is called), or from the folder that one of them lies in.

    Returns:
        None if nothing of the kind is there.

    Raises:
        FileNotFoundError: if a batch is missing.
        ValueError: if something is damaged or is not what CIFAR has there, or `path` holds both editions.
    """
    if path.is_file():
        return _from_archive(path)
    found = [(edition, place) for edition in _EDITIONS if (place := _place(path, edition))]
    if len(found) > 1:
        raise ValueError(f"{path} holds two data sets, name one of them: {found[0][1]} or {found[1][1]}")
    for edition, place in found:
        return _from_folder(place, edition) if place.is_dir() else _from_archive(place)
    return None


def _place(path: Path, edition: _Edition) -> Path | None:
    """Where the edition is: an incomplete folder is still one, what it lacks is named when it is read."""
    if path.resolve().name == edition.folder or any((path / name).is_file() for name in edition.train):
        return path
    return next((place for place in (path / edition.folder, path / edition.archive) if place.exists()), None)


def _from_folder(folder: Path, edition: _Edition) -> Source:
    def open_batch(name: str) -> IO[bytes]:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} lacks the batch {name!r}")
        return path.open("rb")

    return _source(open_batch, edition, folder)


def _from_archive(path: Path) -> Source | None:
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return None
    found: dict[tuple[str, ...], bytes] = {}
    wanted = {(edition.folder, name) for edition in _EDITIONS for name in (*edition.train, *edition.test)}
    try:
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                place = PurePosixPath(member.name).parts[-2:]
                content = archive.extractfile(member) if place in wanted else None
                if content:
                    found[place] = content.read()
            while unpacked.read(1 << 20):  # only the end of the file has the checksum
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is no .tar.gz archive or is damaged, as by a download cut short: {error}") from error
    edition = next((edition for edition in _EDITIONS if any(folder == edition.folder for folder, _ in found)), None)
    if edition is None:
        return None

    def open_batch(name: str) -> IO[bytes]:
        if (edition.folder, name) not in found:
            raise FileNotFoundError(f"{path} lacks the batch {name!r}")
        return io.BytesIO(found[edition.folder, name])

    return _source(open_batch, edition, path)


def _source(open_batch: Callable[[str], IO[bytes]], edition: _Edition, place: Path) -> Source:
    train, test = (_split(open_batch, names, edition, place) for names in (edition.train, edition.test))
    return Source(train, test, edition.classes, edition.name)


def _split(open_batch: Callable[[str], IO[bytes]], names: Sequence[str], edition: _Edition, place: Path) -> Split:
    pixels, classes = [], []
    for name in names:
        with open_batch(name) as file:
            try:
                images, labels = _batch(unpickle_arrays(file), edition)
            except ValueError as error:
                raise ValueError(f"batch {name!r} of {place} {error}") from error
        pixels.append(images)
        classes.append(labels)
    return Split(torch.from_numpy(np.concatenate(pixels)), torch.from_numpy(np.concatenate(classes)))


def _batch(loaded: object, edition: _Edition) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(loaded, dict):
        raise ValueError(f"must hold a dict, got {type(loaded).__name__}")
    # Python 2's text comes as bytes; what somebody pickled anew has text.
    images = loaded.get(b"data", loaded.get("data"))
    labels = loaded.get(edition.labels.encode(), loaded.get(edition.labels))
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072:
        raise ValueError("must hold 'data', uint8 of 3072 bytes per image")
    if not isinstance(labels, list) or len(labels) != len(images) or not all(isinstance(x, int) for x in labels):
        raise ValueError(f"must hold {edition.labels!r}, a list of one whole number per image")
    if labels and not 0 <= min(labels) <= max(labels) < edition.classes:
        raise ValueError(f"has labels from {min(labels)} to {max(labels)}, outside [0, {edition.classes - 1}]")
    return images.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)
