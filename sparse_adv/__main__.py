"""The command line: `sparse-adv` or `python -m sparse_adv`."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sparse_adv import __version__, doctor, interruption
from sparse_adv.commands.output import print_error
from sparse_adv.tickets import TicketInvariantError
from sparse_adv.training import distributed

log = logging.getLogger("sparse_adv")

COMMANDS = {
    "search": "find a ticket: train a dense network cheaply, prune it, rewind the weights",
    "train": "train a network adversarially, dense or from a ticket",
    "evaluate": "measure accuracy on clean images and under attack",
    "benchmark": "score a pruned network as the Adversarial Pruning Benchmark does, write its row",
    "report": "compare runs: tables and plots from their folders",
    "explain": "show what each layer of a ticket costs and which kernel it runs",
    "convert": "read a pruned model of another tool, write it for this one or for PyTorch",
    "demo": "search a ticket on real digits, train it and its controls, compare",
    "doctor": "check this installation: every op against plain PyTorch",
}

_LONGEST_WORD, _LONGEST = 300, 1000
"""Greatest numbers of characters of a value, such as a path, and of a whole message that are quoted in full."""

DESCRIPTION = """\
Masked sparse convolutions and a fused PGD step for PyTorch: fast adversarial training of sparse networks."""

EXAMPLE = """\
'COMMAND --help' lists the flags of a command. From images to a comparison:
  sparse-adv search --data cifar-10-batches-py --arch resnet18 --width 16 --density 0.2 --out runs/a
  sparse-adv train --ticket runs/a/ticket.safetensors --data cifar-10-batches-py --epochs 20 --out runs/b
  sparse-adv report runs/a runs/b"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    The exit code is 0 on success, 1 if a check failed, 2 if the input was wrong, 130 if the command was stopped, and
    141 if the program that read its output ended.
    """
    _turn_sigterm_into_an_error(True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not all terminals can show all names
    given = _parser().parse_args(arguments)
    try:
        level = logging.WARNING if distributed.launched_rank() else logging.INFO
        logging.basicConfig(format="%(message)s", level=logging.DEBUG if given.verbose else level)
        logging.getLogger("matplotlib").setLevel(logging.WARNING)
        return _run(given.command, given.arguments)
    except TicketInvariantError:
        raise  # a defect of the library, not wrong input: the bug report needs the traceback
    except BrokenPipeError:
        _discard_output()
        return 141
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        _turn_sigterm_into_an_error(False)
        log.debug("where the error happened:", exc_info=True)
        print_error(f"error: {_sentence(error)}", consequence=isinstance(error, ConnectionError))
        if isinstance(error, OSError):
            _discard_output()
        return 2
    except Exception as error:  # unexpected errors also end with one sentence
        _turn_sigterm_into_an_error(False)
        log.debug("where the error happened:", exc_info=True)
        print_error(f"error: {type(error).__name__}: {_sentence(error)} (sparse-adv -v ... shows where)")
        return 2
    except KeyboardInterrupt as stop:
        print_error("; ".join(["stopped", *_advice(stop)]))
        return 130


def _run(command: str, arguments: list[str]) -> int:
    if command == "doctor":  # works without jsonargparse and the other packages of the command line
        _Parser(prog="sparse-adv doctor", description=doctor.__doc__).parse_args(arguments)
        interruption.end()
        return doctor.run()
    from sparse_adv.commands import options

    module = importlib.import_module(f"sparse_adv.commands.{command}")
    parser = options.parser_of(command, module.Options, getattr(module, "CONFIGURABLE", False))
    chosen = None
    try:
        chosen = options.parse(parser, module.Options, arguments)
        interruption.end()
        return module.run(chosen)
    except (KeyboardInterrupt, ConnectionError) as stop:
        if advice := getattr(chosen, "after_a_stop", None):
            stop.add_note(advice)
        raise
    except ValueError as error:
        raise ValueError(options.with_flag(str(error), arguments)) from error


def _advice(stop: BaseException) -> list[str]:
    """What to do after an interruption, if there is something to do."""
    return getattr(stop, "__notes__", [])


def _discard_output() -> None:
    """Discard output that could not be written: else Python tries again when it ends, and prints a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _turn_sigterm_into_an_error(on: bool) -> None:
    """Under torchrun, which ends all processes when one is lost: raise ConnectionError, so that main reports it."""

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError(f"rank {distributed.launched_rank()} was ended: another process of the run was lost")

    if os.environ.get("WORLD_SIZE"):
        signal.signal(signal.SIGTERM, end if on else signal.SIG_IGN)


def _sentence(error: Exception) -> str:
    """The message of an error in one line; errors of the operating system name the file."""
    text = str(error).partition("\nException raised from")[0]  # PyTorch's, without the stack of C++
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, ConnectionError):
        text = "; ".join([text, *_advice(error)])
    return _shortened(text)


def _shortened(text: str) -> str:
    """A text in one line, with long words cut short and unprintable characters as escape sequences."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    text = re.sub(rf"\S{{{_LONGEST_WORD},}}", lambda word: f"{word[0][:80]}... ({len(word[0])} characters)", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong without the usage in front of it."""
        print_error(f"error: {_shortened(message)}; 'sparse-adv --help' lists the commands")
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = _Parser(
        prog="sparse-adv",
        description=f"{DESCRIPTION}\n\ncommands:\n{listed}",
        epilog=EXAMPLE,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print more, and where an error happened")
    parser.add_argument("--version", action="version", version=f"sparse_adv {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="flags of the command")
    return parser


if __name__ == "__main__":
    sys.exit(main())
