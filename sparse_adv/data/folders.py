"""Folders with a subfolder of images for each class."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_adv.data.dataset import RawDataset, Split

_SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".pgm": "PPM",
    ".pnm": "PPM",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""Suffixes of images, and Pillow's names of their formats. Pillow's other formats run programs or hold no pixels."""
_NO_IMAGES = ("thumbs.db", "desktop.ini")
_NOTES = (".txt", ".md", ".csv", ".json", ".xml")
_MAX_PIXELS = 1 << 24
"""Largest number of pixels of an image: larger images are damaged, or made to fill the memory."""
_SPLITS = {"test": "test", "val": "validation", "valid": "validation", "validation": "validation"}
"""Folders next to train, and what their images are for."""
_NAME = "folder"
"""Name of the data set. With the folder's own name, the network might get the normalisation of a known data set."""
_TEST_EVERY = 10
"""Without a test folder, every tenth image of each class is a test image."""


def read_folders(path: Path) -> RawDataset | None:
    """Read `train/CLASS/*.png`, `test/CLASS/*.png` and, if present, `val`, `valid` or `validation`; or `CLASS/*.png`.

    Images are PNG, JPEG, BMP, GIF (of one frame), PPM, TIFF or WebP. Hidden files and notes (*.txt, *.md, *.csv,
    *.json, *.xml) are left out. Refused are any other file or folder in the folder of a class, images next to the
    folders of classes, another folder of images next to train, and a class without images. Classes are numbered in
    alphabetical order. Images are ordered by their position within the class, then by class, so that the first images
    contain all classes. Without a test folder every tenth image of each class, in alphabetical order, is a test image
    in every run. Alpha channels are ignored. If all images are grey, they get one channel, else three.

    Returns:
        The data set; None if there are no such folders.

    Raises:
        ValueError: if an image is damaged or its size differs from the first one's, a file is not an image or not in a
            class, there is only one class, two folders hold validation images, or the splits have different classes.
        ModuleNotFoundError: if Pillow is not installed.
    """
    if not path.is_dir():
        return None
    train = path / "train" if _classes(path / "train") else path
    return _read(path, train) if _classes(train) else None


def _read(root: Path, train: Path) -> RawDataset:
    classes = _classes(train)
    if len(classes) == 1:
        raise ValueError(f"{train} must have a folder for each class, has only {classes[0]!r}")
    parts = {"train": _files_by_class(train, classes)}
    for folder in _other_splits(root) if train != root else ():
        if different := sorted(set(_classes(folder)) ^ set(classes)):
            raise ValueError(f"{folder} and {train} must have the same classes, only one has {different[0]!r}")
        if (split := _SPLITS[folder.name]) in parts:
            raise ValueError(f"{root} must have one folder of {split} images, {folder.name!r} is a second one")
        parts[split] = _files_by_class(folder, classes)
    if "test" not in parts:
        parts["test"] = [files[_TEST_EVERY - 1 :: _TEST_EVERY] for files in parts["train"]]
        if few := [name for name, files in zip(classes, parts["test"], strict=True) if not files]:
            raise ValueError(
                f"{root} needs a folder test, or {_TEST_EVERY} images in each class to take a test image from: "
                f"{few[0]!r} has fewer"
            )
        parts["train"] = [[f for i, f in enumerate(files, 1) if i % _TEST_EVERY] for files in parts["train"]]
    reader = _Reader()
    splits = _of_equal_channels({name: reader.read_split(files) for name, files in parts.items()})
    return RawDataset(
        splits["train"], splits["test"], len(classes), _NAME, splits.get("validation"), class_names=tuple(classes)
    )


def _of_equal_channels(splits: dict[str, Split]) -> dict[str, Split]:
    """Give grey splits three channels if another split has colours."""
    channels = max(part.images.shape[1] for part in splits.values())
    return {
        name: Split(part.images.expand(-1, channels, -1, -1).contiguous(), part.labels) for name, part in splits.items()
    }


def _other_splits(root: Path) -> list[Path]:
    """The folders of splits next to train; raise ValueError if another folder holds images."""
    folders = [
        path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "." and path.name != "train"
    ]
    for folder in folders:
        if folder.name not in _SPLITS and any(map(_images, [folder, *filter(Path.is_dir, folder.iterdir())])):
            raise ValueError(f"{folder} holds images and is none of {', '.join(_SPLITS)}: rename it, or move it away")
    return [folder for folder in folders if folder.name in _SPLITS]


def _classes(folder: Path) -> list[str]:
    """The folders of classes; none if no folder holds images."""
    children = sorted(folder.iterdir()) if folder.is_dir() else []
    children = [child for child in children if child.is_dir() and child.name[0] != "."]
    if not any(_images(child) for child in children):
        return []
    if loose := _images(folder):
        raise ValueError(f"{loose[0]} is in no folder of a class: move it into one, or remove it")
    for child in children:
        others = (file for file in _visible(child) if file.suffix.lower() not in _SUFFIXES or not file.is_file())
        if other := next(others, None):
            raise ValueError(f"{other} is not the file of an image ({', '.join(_SUFFIXES)}): convert it, or remove it")
        if not _images(child):
            raise ValueError(f"{child} must hold images of a class, but is empty")
    return [child.name for child in children]


def _files_by_class(folder: Path, classes: list[str]) -> list[list[Path]]:
    return [_images(folder / name) for name in classes]


def _images(folder: Path) -> list[Path]:
    return [file for file in _visible(folder) if file.suffix.lower() in _SUFFIXES]


def _visible(folder: Path) -> list[Path]:
    # macOS writes a file "._name.png", which is not an image, next to each copied image.
    files = [file for file in folder.iterdir() if file.name[0] != "."]
    return sorted(f for f in files if f.name.lower() not in _NO_IMAGES and not f.name.lower().endswith(_NOTES))


class _Reader:
    """Reads images that must all have the size of the first one."""

    def __init__(self) -> None:
        try:
            from PIL import Image, ImageOps
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('Pillow is needed to read images: pip install "sparse_adv[data]"') from error
        self._pillow: Any = Image
        self._upright: Any = ImageOps.exif_transpose  # cameras note which side of a picture is up
        self._first: tuple[Path, tuple[int, int]] | None = None

    def read_split(self, files_by_class: list[list[Path]]) -> Split:
        """Read the images of each class as uint8 [N, C, H, W], one channel while all of them are grey, else three."""
        ordered = sorted((i, label, file) for label, files in enumerate(files_by_class) for i, file in enumerate(files))
        images = np.empty((0, 1, 0, 0), dtype=np.uint8)
        for place, (_, _, file) in enumerate(ordered):
            pixels = self._read_image(file)
            if not place:
                images = np.empty((len(ordered), *pixels.shape), dtype=np.uint8)
            if len(pixels) > images.shape[1]:
                images = images.repeat(len(pixels), axis=1)
            images[place] = pixels
        return Split(torch.from_numpy(images), torch.tensor([label for _, label, _ in ordered], device="cpu"))

    def _read_image(self, file: Path) -> np.ndarray:
        """[C, H, W] in uint8."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", self._pillow.DecompressionBombWarning)
                image = self._pillow.open(file, formats=sorted(set(_SUFFIXES.values())))
            with image:
                if math.prod(image.size) > _MAX_PIXELS:
                    raise ValueError(f"it has more than {_MAX_PIXELS} pixels")
                if getattr(image, "n_frames", 1) > 1:
                    raise ValueError(f"it has {image.n_frames} frames")
                mode = image.mode
                has_more_bits = mode[0] in "IF" or _drops_bits(image)
                image = self._upright(image)
                if mode in ("P", "PA"):  # Pillow would warn that their colours have an alpha channel
                    image = image.convert("RGBA")
                pixels = np.asarray(image.convert("L" if mode in ("L", "1", "LA") else "RGB"))
                if mode in ("P", "PA") and bool((pixels == pixels[..., :1]).all()):
                    pixels = pixels[..., 0]
        except Exception as error:  # Pillow raises many types for damaged files or those that would fill the memory
            raise ValueError(f"{file} is not a readable image: {error}") from error
        if has_more_bits:
            raise ValueError(f"{file} must have 8 bits per channel, it has more: convert it, or scale its values")
        size = pixels.shape[1::-1]
        self._first = self._first or (file, size)
        first, first_size = self._first
        if size != first_size:
            raise ValueError(
                f"all images must have one size: {file} is {size[0]} x {size[1]}, "
                f"{first} is {first_size[0]} x {first_size[1]}"
            )
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _drops_bits(image: Any) -> bool:
    """Whether Pillow would drop the lower bits of an image: its colours have at most 8 bits."""
    for decoder, _, _, arguments in image.tile:
        words = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(word, str) and ";16" in word for word in words):  # as "RGB;16B" of PNG and TIFF
            return True
        if decoder.startswith("ppm") and isinstance(words[-1], int) and words[-1] > 255:  # the largest value
            return True
    return False
