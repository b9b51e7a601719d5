"""The command line: `sparse-adv` or `python -m sparse_adv`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_adv import doctor, masks, models
from sparse_adv.experiments import digits
from sparse_adv.nn import explain, sparsify

log = logging.getLogger("sparse_adv")

DESCRIPTION = """\
Weight-sparse convolutions and a fused PGD step as PyTorch ops: fast robust training of sparse networks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 where a check failed, or 2 where the input was wrong."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.DEBUG if options.verbose else logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        return options.command(options)
    except (ValueError, TypeError, ArithmeticError, OSError, ImportError) as error:
        log.debug("where it happened:", exc_info=True)
        print(f"sparse-adv: error: {error}", file=sys.stderr)
        return 2


def _demo(options: argparse.Namespace) -> int:
    found = digits.run(
        options.out,
        epochs=options.epochs,
        search_epochs=options.search_epochs,
        density=options.density,
        block=options.block,
        seed=options.seed,
    )
    print(found)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    return doctor.run()


def _explain(options: argparse.Namespace) -> int:
    ticket = masks.load_ticket(options.ticket)
    name = options.arch or ticket.provenance.get("arch")
    if name is None:
        raise ValueError(f"{options.ticket} does not say which network it is for: name one with --arch")
    architecture = models.find(name)
    model = models.build(name)
    model.load_state_dict(ticket.state_dict)
    sparsify(model, ticket.masks)
    print(explain(model, (options.batch, *architecture.input_shape)))
    return 0


def _block(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas, such as 4,1, got '{text}'") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-adv", description=DESCRIPTION, epilog="'COMMAND --help' tells more.")
    parser.add_argument("-v", "--verbose", action="store_true", help="tell more, and show where an error happened")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="search a ticket on real digits, train it and its controls, compare",
        description="Searches a ticket on scikit-learn's digits (dense, FGSM), then trains the ticket, the same mask "
        "re-initialised and the dense network with PGD-10 at eps 0.2; writes a table, a picture, the ticket and a line "
        "of JSON per epoch. About two minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for what it finds")
    demo.add_argument(
        "--epochs", type=int, default=digits.TRAINING.epochs, help="of adversarial training, for each of the three runs"
    )
    demo.add_argument("--search-epochs", type=int, default=digits.SEARCH.epochs, help="of the ticket search")
    demo.add_argument("--density", type=float, default=0.1, help="share of the weights that the ticket keeps")
    demo.add_argument("--block", type=_block, default=(1, 1), metavar="BO,BI[,BR,BS]", help="block shape of the mask")
    demo.add_argument("--seed", type=int, default=0, help="of split, weights, order of images and attacks")
    demo.set_defaults(command=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="check this installation",
        description="Prints versions and what the ops use, compares a small forward and backward of every op with "
        "plain PyTorch, and ends with SUCCESS (exit code 0) or FAILURE (exit code 1).",
    )
    doctor.set_defaults(command=_doctor)

    explainer = commands.add_parser(
        "explain",
        help="show what each layer of a ticket costs and which kernel it takes",
        description="Loads a ticket file into its network and prints, layer by layer, shape, block, both densities and "
        "the path that the kernels choose.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    explainer.add_argument("ticket", type=Path, help="a ticket file, such as runs/demo/ticket.safetensors")
    explainer.add_argument("--arch", help="name of the network; left out, the ticket says it")
    explainer.add_argument("--batch", type=int, default=128, help="batch size to choose paths for")
    explainer.set_defaults(command=_explain)
    return parser


if __name__ == "__main__":
    sys.exit(main())
