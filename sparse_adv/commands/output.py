"""What a command says: sentences on a terminal, JSON lines in a pipe; of several processes one speaks."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_adv.json_files import to_json
from sparse_adv.runs import EpochRecord
from sparse_adv.training import distributed


class Output:
    """Prints results as they come.

    Args:
        as_json: None decides by whether standard output is a terminal.
    """

    def __init__(self, as_json: bool | None) -> None:
        self.as_json = not sys.stdout.isatty() if as_json is None else as_json
        self._bar: Any = None

    def say(self, text: str, content: Mapping[str, Any]) -> None:
        """Print the text for people, or the content as a line of JSON for programs."""
        if distributed.rank():
            return
        if self._bar is not None:
            self._bar.clear()
        print(json.dumps(content) if self.as_json else text, flush=True)

    def epoch(self, record: EpochRecord) -> None:
        """Tell what an epoch brought."""
        accuracies = {"clean": record.clean_accuracy, "robust": record.robust_accuracy}
        accuracy = "".join(f", {name} {value:.1%}" for name, value in accuracies.items() if value is not None)
        undone = " (repeated after catastrophic overfitting)" if record.undone_accuracy is not None else ""
        self.say(
            f"epoch {record.epoch}: loss {record.loss:.3f}{accuracy}, {record.total.seconds:.1f} s{undone}",
            to_json(record, with_none=False),
        )

    @contextmanager
    def progress(self, updates: int) -> Iterator[Any]:
        """A bar over all updates of a run, on a terminal only; yields what to call after each."""
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            yield None
            return
        with tqdm(
            total=updates,
            unit="update",
            disable=None if distributed.rank() == 0 else True,
            leave=False,
        ) as self._bar:

            def step(count: int) -> None:
                self._bar.update(count - self._bar.n if count > self._bar.n else 1)

            yield step
        self._bar = None


def complain(text: str, follows: bool = False) -> None:
    """Say on standard error what went wrong; what several processes of a machine have to say, one of them says.

    Args:
        text: a sentence.
        follows: whether it only tells what another process's end led to; then nothing is said where that process has
            spoken.
    """
    if not _was_said(text, follows):
        print(f"sparse-adv: {text}", file=sys.stderr)


def _was_said(text: str, follows: bool) -> bool:
    """Whether another process has said it; from now on, this one has."""
    # torchrun gives each process a file OWN/error.json in a folder for all processes of the machine and the attempt.
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if own is None:
        return False
    told = "what follows" if follows else text
    mark = Path(own).parent.parent / f"said_{hashlib.sha256(told.encode()).hexdigest()}"
    try:
        if follows and any(mark.parent.glob("said_*")):
            return True
        mark.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:
        return False
    return False
