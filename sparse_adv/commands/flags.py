"""Flags that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

from sparse_adv import models
from sparse_adv.config import OBJECTIVES, PRECISIONS, SCHEDULES, PruneConfig, TrainConfig

_RECIPE = {
    "objective": "what an update sees: " + ", ".join(OBJECTIVES),
    "epochs": "passes over the training images",
    "lr": "learning rate of SGD",
    "momentum": "of SGD",
    "weight_decay": "of SGD",
    "schedule": "of the learning rate, by step: " + ", ".join(SCHEDULES),
    "milestones": "shares of the epochs after which the piecewise rate falls to a tenth",
    "warmup_epochs": "epochs in which the rate climbs",
    "warmup_start_lr": "where it climbs from, such as the search's rate",
    "eps": "radius of the attack's ball, in image units",
    "norm": "of the ball: linf, l2",
    "alpha": "step size of the attack; left out, the objective's own",
    "steps": "of the objectives pgd and trades",
    "beta": "weight of the robust term of trades",
    "replays": "how often free updates on each batch",
    "max_grad_norm": "largest norm of an update's gradient; 0 leaves it alone",
    "ema_decay": "decay per step of averaged weights, which are then evaluated and kept; 0 for none",
    "precision": "what autocast computes in: " + ", ".join(PRECISIONS),
    "evaluate_every": "epochs between evaluations on held-out images",
    "evaluation_steps": "of the PGD attack of evaluations",
    "overfitting_monitor": "look for a collapse of robustness, undo it and train that epoch with PGD",
}

_RULE = {
    "density": "share of the weights that the ticket keeps",
    "block": "block shape of the masks, BO,BI or BO,BI,BR,BS",
    "scope": "how kept weights are shared out among layers: global, uniform, erk",
    "score": "what ranks weights: magnitude, relative_magnitude",
    "linear": "prune linear layers too",
    "rounds": "times of training, pruning and going back; 1 is one-shot",
    "rewind_step": "update to whose weights the ticket goes back; 0 is the start",
    "permute_channels": "reorder channels before pruning, so that whole blocks hold more; for blocks such as 64,64",
    "early_stop_distance": "end the search when the mask has moved less than this share in five epochs; 0.1",
}


_TEXTS = ("str", "str | Callable[[str, Tensor], Tensor]", "Objective", "Schedule", "Norm", "Precision", "Scope")

_METAVARS = {
    "int": "N",
    "tuple[int, ...]": "N,N",
    "tuple[float, ...]": "X,X",
    **dict.fromkeys(_TEXTS, "NAME"),
}


def number(text: str) -> float:
    """A decimal number or a fraction: "0.03", "8/255"."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number or a fraction such as 8/255, got '{text}'") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas: a block shape."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas, such as 4,1, got '{text}'") from None


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas; nothing at all for none."""
    return tuple(number(part) for part in text.split(",") if part)


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got '{text}'") from None


def command(commands: Any, name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A new command's parser. Flags are not abbreviated, so that a config file and a later version mean the same."""
    return commands.add_parser(
        name,
        help=help,
        description=description,
        allow_abbrev=False,
        formatter_class=_Help,
    )


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults that say something; what a flag left out means is told by its text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_output(parser: argparse.ArgumentParser) -> None:
    """How a command speaks."""
    parser.add_argument(
        "--json",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="JSON lines instead of text for people; left out, text on a terminal and JSON when piped",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """A file of flags."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file whose keys are flags; flags win over it")
    parser.add_argument("--print-config", action="store_true", help="print such a file with all settings, and stop")


def add_data(parser: argparse.ArgumentParser, data: str | None = "digits", seed: int | None = 0) -> None:
    """Which images there are, and on which device."""
    group = parser.add_argument_group("data")
    left_out = "" if data else "; left out, the run's"
    group.add_argument("--data", default=data, help=f"'digits', or a folder or archive of images{left_out}")
    group.add_argument("--limit", type=whole, metavar="N", help="use the first N training images only")
    group.add_argument("--validation", type=number, help="share, or number, of training images to hold out")
    group.add_argument("--seed", type=whole, default=seed, help="of split, weights, order of the images and attacks")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, one GPU such as cuda:0, or auto, which is cuda where there is a GPU",
    )


def add_batches(parser: argparse.ArgumentParser) -> None:
    """How training goes through the images."""
    group = parser.add_argument_group("batches")
    group.add_argument("--batch-size", type=whole, default=128, help="images per update, over all processes")
    group.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crop and flip; left out, of 32 x 32 colour images",
    )


def add_network(parser: argparse.ArgumentParser, arch: str | None) -> None:
    """Which network."""
    group = parser.add_argument_group("network")
    left_out = "" if arch else "; left out, the ticket or the run says it"
    group.add_argument("--arch", default=arch, help=", ".join(models.names()) + left_out)
    group.add_argument("--width", type=whole, help="channels of the first stage; left out, the published number")


def add_recipe(parser: argparse.ArgumentParser, defaults: TrainConfig) -> None:
    """A flag for every number of a recipe but its seed."""
    _add_fields(parser.add_argument_group("recipe"), _RECIPE, defaults)


def add_rule(parser: argparse.ArgumentParser) -> None:
    """A flag for every number of a pruning rule."""
    _add_fields(parser.add_argument_group("pruning"), _RULE, PruneConfig())


def recipe_of(options: argparse.Namespace) -> TrainConfig:
    """The recipe that the flags describe."""
    return TrainConfig(**{name: getattr(options, name) for name in _RECIPE}, seed=options.seed)


def rule_of(options: argparse.Namespace) -> PruneConfig:
    """The pruning rule that the flags describe."""
    return PruneConfig(**{name: getattr(options, name) for name in _RULE})


def _add_fields(group: Any, texts: dict[str, str], defaults: Any) -> None:
    types = {field.name: str(field.type) for field in dataclasses.fields(defaults)}
    for name, text in texts.items():
        flag, kind, default = f"--{name.replace('_', '-')}", types[name], getattr(defaults, name)
        if kind == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
        else:
            parse = {
                "int": whole,
                "tuple[int, ...]": whole_numbers,
                "tuple[float, ...]": numbers,
                **dict.fromkeys(_TEXTS, str),
            }.get(kind, number)
            if name == "eps":
                default = f"{255 * default:g}/255"
            elif isinstance(default, tuple):
                default = ",".join(map(str, default))
            group.add_argument(flag, type=parse, default=default, help=text, metavar=_METAVARS.get(kind, "X"))
