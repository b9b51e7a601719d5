"""Trees with a folder of PNG or JPEG images for each class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_adv.data.dataset import Split
from sparse_adv.data.source import Source

SUFFIXES = (".png", ".jpg", ".jpeg")
TEST_SHARE = 10
"""Without a test folder every tenth image of each class is a test image."""


def read_folders(path: Path) -> Source | None:
    """Images from `train/CLASS/*.png` and `test/CLASS/*.png`, and `val` or `valid` if there; or from `CLASS/*.png`.

    Classes are numbered in the order of their names. They take turns, so that the first images are of all classes.
    Without `test`, every tenth image of each class, by name, is a test image, whatever the seed of a run. Transparency
    is ignored; if every image is grey, they have one channel.

    Returns:
        None if there is no such tree.

    Raises:
        ValueError: if an image is damaged or has another size than the first, or the parts have other classes.
        ModuleNotFoundError: if Pillow is missing.
    """
    if not path.is_dir():
        return None
    train = path / "train" if _classes(path / "train") else path
    return _read(path, train) if _classes(train) else None


def _read(root: Path, train: Path) -> Source:
    classes = _classes(train)
    parts = {"train": _files(train, classes)}
    for name in ("test", "val", "valid") if train != root else ():
        if (root / name).is_dir():
            if odd := sorted(set(_classes(root / name)) ^ set(classes)):
                raise ValueError(f"{root / name} and {train} must have the same classes, only one has {odd[0]!r}")
            parts[name] = _files(root / name, classes)
    if "test" not in parts:
        parts["test"] = [found[TEST_SHARE - 1 :: TEST_SHARE] for found in parts["train"]]
        if not any(parts["test"]):
            raise ValueError(f"{root} needs a test folder, or {TEST_SHARE} images in a class to take a test image from")
        parts["train"] = [[f for i, f in enumerate(found, 1) if i % TEST_SHARE] for found in parts["train"]]
    reader = _Reader()
    splits = reader.one_format({name: reader.split(files) for name, files in parts.items()})
    validation = splits.get("val", splits.get("valid"))
    return Source(splits["train"], splits["test"], len(classes), root.resolve().name, validation)


def _classes(folder: Path) -> list[str]:
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    return [child.name for child in children if child.is_dir() and _images(child)]


def _files(folder: Path, classes: list[str]) -> list[list[Path]]:
    return [_images(folder / name) for name in classes]


def _images(folder: Path) -> list[Path]:
    # A Mac leaves "._name.png", which is no image, beside every image that it copies.
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")


class _Reader:
    """Reads images of one size; the first decides which."""

    def __init__(self) -> None:
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('images are read by Pillow: pip install "sparse_adv[data]"') from error
        self._pillow: Any = Image
        self._first: tuple[Path, tuple[int, int]] | None = None
        self._grey = True

    def split(self, files: list[list[Path]]) -> Split:
        """The images of each class, as [N, 3, H, W]."""
        turns = sorted((turn, label, file) for label, found in enumerate(files) for turn, file in enumerate(found))
        images = np.stack([self._image(file) for _, _, file in turns])
        labels = torch.tensor([label for _, label, _ in turns])
        return Split(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels)

    def one_format(self, splits: dict[str, Split]) -> dict[str, Split]:
        """One channel for all if every image so far was grey."""
        if not self._grey:
            return splits
        return {name: Split(part.images[:, :1].contiguous(), part.labels) for name, part in splits.items()}

    def _image(self, file: Path) -> np.ndarray:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", self._pillow.DecompressionBombWarning)
                image = self._pillow.open(file, formats=("PNG", "JPEG"))
            with image:
                mode, size = image.mode, image.size
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # a damaged image fails in any way it likes; so does one that would fill the memory
            raise ValueError(f"{file} is no readable image: {error}") from error
        if mode[0] in "IF":
            raise ValueError(f"{file} must have 8 bits per channel, got an image of mode {mode!r}")
        self._first = self._first or (file, size)
        first, wanted = self._first
        if size != wanted:
            raise ValueError(
                f"all images must have one size: {file} is {size[0]} x {size[1]}, {first} is {wanted[0]} x {wanted[1]}"
            )
        self._grey &= mode in ("L", "1", "LA")
        return pixels
