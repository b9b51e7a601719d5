"""Atomic writing of files."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: yield a temporary path next to `path`; on success sync the file to disk and rename it, on error
    delete it.

    At every moment, and after a crash, a reader finds the whole old file or the whole new one. Missing parent folders
    are created. Whatever exists but is not a regular file, such as a folder or /dev/null, is not replaced.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "file.txt"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_text("text")
        >>> path.read_text()
        'text'
    """
    with _beside(path) as temporary:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)


def check_writable(path: Path) -> None:
    """Raise OSError unless `replacing` can write the file. Call it before the long computation of the file's content.

    Missing parent folders are created.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> check_writable(folder / "new" / "file.txt")
        >>> check_writable(folder)
        Traceback (most recent call last):
        IsADirectoryError: ...
    """
    with _beside(path) as temporary:
        temporary.touch()


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and delete the file at the end; errors name `path`."""
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code) if path.is_dir() else "Not a regular file", str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        reason = "Not a folder, or a link to one that does not exist"
        raise NotADirectoryError(errno.ENOTDIR, reason, str(path.parent)) from error
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):  # None: such as a full disk
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically, see `replacing`."""
    write_bytes(path, text.encode())


def remove_remains(path: Path) -> None:
    """Delete the temporary files that killed processes left next to a file. No process may be writing the file
    meanwhile.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file.txt"
        >>> path.with_name(".123.file.txt").touch()
        >>> remove_remains(path)
        >>> list(path.parent.iterdir())
        []
    """
    for other in path.parent.glob(f".*.{glob.escape(path.name)}"):
        if other.name[1 : -len(path.name) - 1].isdecimal():
            other.unlink(missing_ok=True)
