"""Atomic writing of files, and safe reading of pickled NumPy arrays."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""All that unpickling NumPy arrays needs; `_codecs.encode` gives the bytes of arrays that Python 2 pickled."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: yield a temporary path beside `path`; on success sync it to disk and rename it, on error delete it.

    At every moment, and after a crash, a reader finds the whole old file or the whole new one. Missing parent folders
    are created.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("text")
        >>> path.read_text()
        'text'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically, see `replacing`."""
    write_bytes(path, text.encode())


def unpickle_arrays(file: IO[bytes]) -> Any:
    """Read a pickle that consists of NumPy arrays and Python's own containers, numbers and text.

    Nothing else is unpickled, so that a malicious file cannot run code.

    Args:
        file: open for reading bytes. Text that Python 2 pickled is returned as bytes.

    Raises:
        ValueError: if the file contains anything else, is cut short, or is not a pickle.

    Examples:
        >>> import io
        >>> unpickle_arrays(io.BytesIO(pickle.dumps({"labels": [1, 2]})))
        {'labels': [1, 2]}
    """
    try:
        return _ArrayUnpickler(file, encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises many types of errors
        raise ValueError(f"is not a readable pickle of arrays: {error}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of a NumPy array")
        return super().find_class(module, name)
