"""Ctrl-C while the command line is imported, which takes more than a second: it ends at once, with one line."""

from __future__ import annotations

import os
import signal
import sys


def _end_at_once(number: int, frame: object) -> None:
    try:
        os.write(2, b"sparse-adv: stopped\n")
    finally:  # also if nobody reads that: an exception would pass through the imports, some of which swallow it
        os._exit(130)  # no file is open yet


def begin() -> None:
    """From now on Ctrl-C ends the process at once, if it was started as the command line and does not ignore Ctrl-C."""
    started = [os.path.basename(word) for word in sys.orig_argv[-len(sys.argv) :][:1]]
    if started in (["sparse-adv"], ["sparse_adv"]) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)


def end() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again, if `begin` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
