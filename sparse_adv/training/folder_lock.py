"""The lock on a run's folder: one thread at a time writes there, and only into the folder that it has locked."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path
from weakref import WeakValueDictionary, finalize

from sparse_adv import runs
from sparse_adv.files import remove_remains
from sparse_adv.training import distributed


class FolderLock:
    """A lock on a folder. It ends when nothing refers to it any more, at the latest with the process.

    Args:
        folder: of the run; None for a run that writes nothing.
        descriptor: of the locked file; None if there is no file to check.
    """

    def __init__(self, folder: Path | None, descriptor: int | None = None) -> None:
        self.folder = None if folder is None else folder.absolute()  # the working directory may change
        self.thread = threading.get_ident()
        self.inode = None if descriptor is None else _inode(os.fstat(descriptor))
        self.close = finalize(self, _close, descriptor)

    def check(self) -> None:
        """Raise FileNotFoundError if the folder was deleted or replaced: another run may be in its place."""
        if self.folder is None or self.inode is None:
            return
        try:
            found = _inode((self.folder / runs.LOCK).stat())
        except FileNotFoundError:
            found = None
        if found != self.inode:
            raise FileNotFoundError(f"{self.folder} was deleted or replaced while its run went on: the run ends here")


_held: WeakValueDictionary[tuple[int, int], FolderLock] = WeakValueDictionary()
"""The locks of this process by the inode of their file; no other file can have that inode while the file is open."""


def hold(folder: Path | None) -> FolderLock:
    """Lock a folder for this process; it is created if it does not exist. In a distributed run only rank 0 locks it.

    Half-written files of killed processes are deleted. If locking is impossible, as on some network file systems, the
    run goes on without a lock.

    Args:
        folder: of the run; None to lock nothing.

    Returns:
        The lock: a thread that holds it already gets the same one.

    Raises:
        BlockingIOError: if another process or thread holds it.
        ValueError: if its name is not UTF-8, which safetensors requires.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> lock = hold(folder)
        >>> lock.check()
        >>> hold(folder) is lock
        True
    """
    if folder is not None and not _is_utf8(str(folder)):
        raise ValueError(f"folder must have a name in UTF-8, got {str(folder)!r}")
    if folder is None or distributed.rank():
        return FolderLock(None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / runs.LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # the folder cannot be written; the next write says so
        return FolderLock(folder)
    known = _held.get(_inode(os.fstat(descriptor)))
    if known is not None:
        os.close(descriptor)
        others = {thread.ident for thread in threading.enumerate() if thread is not threading.current_thread()}
        if known.thread in others:
            raise BlockingIOError(f"{folder} is being written by another thread of this process")
        return known
    lock = FolderLock(folder, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        writer = os.pread(descriptor, 200, 0).decode(errors="replace")
        raise BlockingIOError(f"{folder} is being written by another process ({writer})") from error
    except OSError:
        return FolderLock(folder)
    for name in runs.FILES:
        remove_remains(folder / name)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}".encode(), 0)
    assert lock.inode is not None
    _held[lock.inode] = lock
    return lock


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _inode(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _release_in_child() -> None:
    """A forked process, such as a worker of a DataLoader, would hold the locks beyond the end of the run."""
    for lock in list(_held.values()):
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_release_in_child)
