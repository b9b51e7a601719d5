"""Output of the commands: sentences on a terminal, JSON lines in a pipe. With several processes only rank 0 prints."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_adv import runs
from sparse_adv.json_files import to_json
from sparse_adv.runs import EpochRecord
from sparse_adv.training import distributed

if TYPE_CHECKING:
    from tqdm import tqdm


class Output:
    """Prints results when they are known.

    Args:
        as_json: whether to print JSON lines; None for yes unless standard output is a terminal.
    """

    def __init__(self, as_json: bool | None) -> None:
        self.as_json = not sys.stdout.isatty() if as_json is None else as_json
        self._bar: tqdm | None = None

    def print(self, text: str, content: Mapping[str, object]) -> None:
        """Print the text, or the content as a line of JSON."""
        self.line(content if self.as_json else text)

    def line(self, content: str | Mapping[str, object]) -> None:
        """Print a text, or a line of JSON."""
        if distributed.rank():
            return
        if self._bar is not None:
            self._bar.clear()
        try:
            print(content if isinstance(content, str) else json.dumps(content), flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:  # such as a full disk
            raise OSError(error.errno, error.strerror, "the standard output") from error

    def epoch(self, record: EpochRecord) -> None:
        """Print the record of an epoch."""
        accuracies = {"clean": record.clean_accuracy, "robust": record.robust_accuracy}
        accuracy = "".join(f", {name} {value:.1%}" for name, value in accuracies.items() if value is not None)
        undone = " (repeated after catastrophic overfitting)" if record.undone_accuracy is not None else ""
        self.print(
            f"epoch {record.epoch}: loss {record.loss:.3f}{accuracy}, {record.total.seconds:.1f} s{undone}",
            to_json(record, with_none=False),
        )

    @contextmanager
    def progress(self, updates: int) -> Iterator[Callable[[int], None] | None]:
        """Show a progress bar over all updates of a run, on a terminal; yield a function to call after each update."""
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            yield None
            return
        hidden = None if distributed.rank() == 0 else True  # None: unless standard error is a terminal
        with tqdm(total=updates, unit="update", disable=hidden, leave=False) as bar:
            self._bar = bar
            yield lambda count: bar.update(count - bar.n if count > bar.n else 1)
        self._bar = None


def check_new(name: str, path: Path, *read: Path | None) -> None:
    """Raise ValueError if a file to be written would replace a file that is read, or a file of a run.

    Args:
        name: of the argument, for the error.
        path: of the file to be written.
        read: files that are read; None for a file that is not given.
    """
    own = path.resolve()
    if own in [other.resolve() for other in read if other is not None] or runs.is_file_of_run(own):
        raise ValueError(f"{name} must not replace a file that is read, or one of a run, got {path}")


def print_error(text: str, consequence: bool = False) -> None:
    """Print an error to standard error, unless another process of this machine has printed the same.

    Args:
        text: a sentence.
        consequence: whether the error only follows from the end of another process; it is then printed only if no
            process has printed an error.
    """
    if not _was_printed(text, consequence):
        with suppress(OSError):  # a full disk: there is no place left for a message
            print(f"sparse-adv: {text}", file=sys.stderr, flush=True)


def _was_printed(text: str, consequence: bool) -> bool:
    """Return whether another process has printed the error; if not, note that this one does."""
    # torchrun gives each process a file OWN/error.json, inside a folder for all processes of this machine and attempt.
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return False
    content = "consequence" if consequence else text
    mark = Path(own).parent.parent / f"printed_{hashlib.sha256(content.encode()).hexdigest()}"
    try:
        if consequence and any(mark.parent.glob("printed_*")):
            return True
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False
