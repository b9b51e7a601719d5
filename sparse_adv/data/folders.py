"""Folders with a subfolder of PNG or JPEG images for each class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_adv.data.dataset import RawDataset, Split

_SUFFIXES = (".png", ".jpg", ".jpeg")
_TEST_EVERY = 10
"""Without a test folder, every tenth image of each class is a test image."""


def read_folders(path: Path) -> RawDataset | None:
    """Read `train/CLASS/*.png`, `test/CLASS/*.png` and, if present, `val` or `valid`; or only `CLASS/*.png`.

    Classes are numbered in alphabetical order. Images are ordered by their position within the class, then by class, so
    that the first images contain all classes. Without a test folder every tenth image of each class, in alphabetical
    order, is a test image in every run. Alpha channels are ignored. If all images are grey, they get one channel, else
    three.

    Returns:
        The data set; None if there are no such folders.

    Raises:
        ValueError: if an image is damaged or its size differs from the first one's, or the folders of the splits have
            different classes.
        ModuleNotFoundError: if Pillow is not installed.
    """
    if not path.is_dir():
        return None
    train = path / "train" if _classes(path / "train") else path
    return _read(path, train) if _classes(train) else None


def _read(root: Path, train: Path) -> RawDataset:
    classes = _classes(train)
    parts = {"train": _files_by_class(train, classes)}
    for name in ("test", "val", "valid") if train != root else ():
        if (root / name).is_dir():
            if different := sorted(set(_classes(root / name)) ^ set(classes)):
                raise ValueError(f"{root / name} and {train} must have the same classes, only one has {different[0]!r}")
            parts[name] = _files_by_class(root / name, classes)
    if "test" not in parts:
        parts["test"] = [files[_TEST_EVERY - 1 :: _TEST_EVERY] for files in parts["train"]]
        if not any(parts["test"]):
            raise ValueError(
                f"{root} needs a folder test, or {_TEST_EVERY} images in a class to take a test image from"
            )
        parts["train"] = [[f for i, f in enumerate(files, 1) if i % _TEST_EVERY] for files in parts["train"]]
    reader = _Reader()
    splits = reader.drop_grey_channels({name: reader.read_split(files) for name, files in parts.items()})
    validation = splits.get("val", splits.get("valid"))
    return RawDataset(splits["train"], splits["test"], len(classes), root.resolve().name, validation)


def _classes(folder: Path) -> list[str]:
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    return [child.name for child in children if child.is_dir() and _images(child)]


def _files_by_class(folder: Path, classes: list[str]) -> list[list[Path]]:
    return [_images(folder / name) for name in classes]


def _images(folder: Path) -> list[Path]:
    # macOS writes a file "._name.png", which is not an image, next to each copied image.
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES and file.name[0] != ".")


class _Reader:
    """Reads images that must all have the size of the first one."""

    def __init__(self) -> None:
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('Pillow is needed to read images: pip install "sparse_adv[data]"') from error
        self._pillow: Any = Image
        self._first: tuple[Path, tuple[int, int]] | None = None
        self._all_grey = True

    def read_split(self, files_by_class: list[list[Path]]) -> Split:
        """Read the images of each class as uint8 [N, 3, H, W]."""
        ordered = sorted((i, label, file) for label, files in enumerate(files_by_class) for i, file in enumerate(files))
        images = np.stack([self._read_image(file) for _, _, file in ordered])
        labels = torch.tensor([label for _, label, _ in ordered])
        return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)

    def drop_grey_channels(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Reduce three channels to one if all images read so far were grey."""
        if not self._all_grey:
            return splits
        return {name: Split(part.images[:, :1].contiguous(), part.labels) for name, part in splits.items()}

    def _read_image(self, file: Path) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", self._pillow.DecompressionBombWarning)
                image = self._pillow.open(file, formats=("PNG", "JPEG"))
            with image:
                mode, size = image.mode, image.size
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # Pillow raises many types for a damaged file, or for one that would fill the memory
            raise ValueError(f"{file} is not a readable image: {error}") from error
        if mode[0] in "IF":
            raise ValueError(f"{file} must have 8 bits per channel, got an image of mode {mode!r}")
        self._first = self._first or (file, size)
        first, first_size = self._first
        if size != first_size:
            raise ValueError(
                f"all images must have one size: {file} is {size[0]} x {size[1]}, "
                f"{first} is {first_size[0]} x {first_size[1]}"
            )
        self._all_grey &= mode in ("L", "1", "LA")
        return pixels
