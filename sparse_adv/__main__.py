"""The command line: `sparse-adv` or `python -m sparse_adv`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from sparse_adv import __version__, doctor
from sparse_adv.commands import config, convert, demo, evaluate, explain, flags, output, report, search, train
from sparse_adv.tickets import TicketInvariantError
from sparse_adv.training import distributed

log = logging.getLogger("sparse_adv")

DESCRIPTION = """\
Weight-sparse convolutions and a fused PGD step as PyTorch ops: fast robust training of sparse networks."""

EPILOG = """\
'COMMAND --help' tells more. From images to a comparison:
  sparse-adv search --data cifar-10-batches-py --arch resnet18 --width 16 --density 0.2 --out runs/a
  sparse-adv train --ticket runs/a/ticket.safetensors --data cifar-10-batches-py --epochs 20 --out runs/b
  sparse-adv report runs/a runs/b"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 where a check failed, 2 where the input was wrong, 130 where stopped."""
    _heed_termination(True)
    parser, commands = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parsed(parser, commands, given)
        level = logging.WARNING if distributed.launched_rank() else logging.INFO
        logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else level)
        logging.getLogger("matplotlib").setLevel(logging.WARNING)
        if getattr(options, "print_config", False):
            print(config.config_text(options), end="")
            return 0
        return options.run(options)
    except TicketInvariantError:
        raise  # our defect, and no wrong input: whoever reports it needs the place
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        _heed_termination(False)
        log.debug("where it happened:", exc_info=True)
        output.complain(f"error: {_sentence(error)}", follows=isinstance(error, ConnectionError))
        return 2
    except KeyboardInterrupt:
        output.complain("stopped; the same command continues after the last whole epoch")
        return 130


def _heed_termination(heed: bool) -> None:
    """Let torchrun, which ends all processes when one is lost, be heard as an error, so that a sentence is said."""

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ConnectionError(f"rank {distributed.launched_rank()} was ended: another process of the run was lost")

    if "WORLD_SIZE" in os.environ:
        signal.signal(signal.SIGTERM, end if heed else signal.SIG_IGN)


def _parsed(parser: argparse.ArgumentParser, commands: Any, given: list[str]) -> argparse.Namespace:
    """Arguments with those of the config file before them; a flag that does not exist is told with its like."""
    named = next((i for i, word in enumerate(given) if word in commands.choices), None)
    if named is not None:
        chosen = commands.choices[given[named]]
        given = [*given[: named + 1], *config.with_config(chosen, given[named + 1 :])]
    options, unknown = parser.parse_known_args(given)
    if unknown:
        word = unknown[0].partition("=")[0]
        known = config.known_flags(commands.choices[given[named]]) if named is not None else []
        raise ValueError(f"there is no {word!r} here{config.suggestion(word, known)}")
    return options


def _sentence(error: Exception) -> str:
    """What an error says, in one line; a full disk and its like name the file."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    if isinstance(error, ConnectionError):
        text += "; start the same command again, it continues after the last whole epoch"
    return text


def _doctor(options: argparse.Namespace) -> int:
    return doctor.run()


def _parser() -> tuple[argparse.ArgumentParser, Any]:
    parser = argparse.ArgumentParser(
        prog="sparse-adv",
        description=DESCRIPTION,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparse_adv {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more, and show where an error happened")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (search, train, evaluate, report, explain, convert, demo):
        module.add(commands)
    checkup = flags.command(
        commands,
        "doctor",
        "check this installation",
        "Prints versions and what the ops use, compares a small forward and backward of every op with plain PyTorch, "
        "and ends with SUCCESS (exit code 0) or FAILURE (exit code 1).",
    )
    checkup.set_defaults(run=_doctor)
    return parser, commands


if __name__ == "__main__":
    sys.exit(main())
