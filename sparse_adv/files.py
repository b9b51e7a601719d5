"""Files that appear whole or not at all, and NumPy arrays out of pickles that nobody has checked."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_ARRAYS = {
    (module, name)
    for package in ("numpy.core", "numpy._core")
    for module, name in [(f"{package}.multiarray", "_reconstruct"), (f"{package}.multiarray", "scalar")]
} | {
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that a pickle of NumPy arrays calls; `_codecs.encode` turns text into the bytes that Python 2 wrote."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; at the end it reaches the disk and becomes `path`, after an error it vanishes.

    A reader, and whoever comes after a crash, sees the old file or the new one, never half of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield draft
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_bytes(path, text.encode())


def unpickle_arrays(file: IO[bytes]) -> Any:
    """Read a pickle that may hold NumPy arrays and Python's own containers, numbers and text, and nothing else.

    Args:
        file: open for reading bytes. Python 2's text comes as bytes.

    Raises:
        ValueError: if the pickle asks for anything else, is cut short or is no pickle.
    """
    try:
        return _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle fails in any way it likes
        raise ValueError(f"is no readable pickle of arrays: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a NumPy array")
        return super().find_class(module, name)
