"""Turns the dataclass of a command's options into flags and help, and parses flags and config files into it.

A command is a module with a dataclass `Options`, whose docstring is the help, and a function `run(Options) -> int`.
A field that is itself a dataclass (`TrainConfig`, ...) gives a flag for each of its own fields. A method
`check_flags(flags)` may refuse given flags, whatever their values are.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Container, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from sparse_adv import recipes
from sparse_adv.commands import config_files
from sparse_adv.commands.flag_values import comma_separated, integer, number, one_of, or_null, path, text
from sparse_adv.commands.out_folder import plain
from sparse_adv.config import TrainConfig
from sparse_adv.config.checks import refuse_unused

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

POSITIONAL: dict[str, bool] = {"positional": True}
"""Metadata of a field that is given by position instead of by a flag."""

AFTER_A_STOP = "start the same command again, it continues after the last whole epoch"
"""What to do after an interruption, of commands that train."""
_FLAG_OF = {"state_path": "state"}
"""Flags with another name than the argument in Python that they are given to."""
_TENSORS = frozenset({"images", "masks"})
"""Arguments in Python that are no flags: those of the same names count images, or name a file."""


def parser_of(command: str, options: type, configurable: bool = False) -> ArgumentParser:
    """The parser of a command.

    Args:
        command: its name.
        options: the dataclass of its options.
        configurable: whether `--config FILE` reads flags from a YAML file, which `--print_config` writes.
    """
    help = docstring_parser.parse(options.__doc__ or "")
    description = "\n\n".join(part for part in (help.short_description, help.long_description) if part)
    parser = ArgumentParser(
        prog=f"sparse-adv {command}",
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=_Help,
        parser_mode=config_files.MODE,
    )
    if configurable:
        file = "YAML file with one flag per key (flags on the command line override it)"
        if TrainConfig in get_type_hints(options).values():
            file += f", or a published recipe, written {recipes.PREFIX}NAME; names: {', '.join(recipes.names())}"
        parser.add_argument("--config", action="config", help=file)
    _add_fields(parser, parser, options, None)
    return parser


def parse(parser: ArgumentParser, options: type[T], arguments: Sequence[str]) -> T:
    """Parse the arguments of a command into its options.

    Raises:
        ValueError: if a flag or key is wrong, naming it and the one that may have been meant; if there is no such
            recipe.
        FileNotFoundError: if a config file does not exist.
    """
    known = config_files.actions_by_flag(parser)
    for flag in _flags(arguments):
        if flag not in known:
            raise ValueError(config_files.no_option(flag, known))
    files, others = config_files.split(arguments)
    for file in files:
        config_files.check(parser, file)
    try:
        # Files first, because a later value replaces an earlier one.
        namespace = parser.parse_args([*(f"--config={file}" for file in files), *others])
    except (ArgumentError, ArgumentTypeError) as error:
        raise ValueError(_spaced_list(parser, others) or _sentence(error, known)) from error
    built = _build(options, namespace)
    if hasattr(built, "check_flags"):
        built.check_flags(set(_flags(others)))
    return built


def with_flag(message: str, arguments: Sequence[str]) -> str:
    """Replace the Python argument at the start of an error message by its flag, if that is among the arguments.

    Examples:
        >>> with_flag("search_epochs must be at least 1, got 0", ["--search-epochs=0"])
        '--search-epochs must be at least 1, got 0'
    """
    name, _, rest = message.partition(" ")
    flag = f"--{_FLAG_OF.get(name, name).replace('_', '-')}"
    is_given = flag in _flags(arguments) and name not in _TENSORS
    says_so = name in _FLAG_OF or rest.startswith(("must ", "is ", "needs "))
    return f"{flag} {rest}" if is_given and says_so else message


def _spaced_list(parser: ArgumentParser, words: Sequence[str]) -> str | None:
    """What to write instead, if the numbers of a flag are separated by spaces and not by commas; else None."""
    for flag, action in config_files.actions_by_flag(parser).items():
        if flag in words and str(action.metavar) in ("N,N", "X,X"):
            after = words[words.index(flag) + 1 :]
            numbers = list(takewhile(lambda word: word.replace(".", "").isdecimal(), after))
            if len(numbers) > 1:
                return f"{flag} must be numbers separated by commas: write {flag} {','.join(numbers)}"
    return None


def _flags(arguments: Sequence[str]) -> list[str]:
    """The flags among the arguments of a command, without their values."""
    words = takewhile(lambda word: word != "--", arguments)
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def check_training(train: TrainConfig, default: TrainConfig) -> None:
    """Raise ValueError if a setting of training has no effect, or the radius is the default of another norm.

    Args:
        train: the settings of the command.
        default: its default settings.
    """
    refuse_unused(train, default, train.without_effect())
    if train.norm != default.norm and train.eps == default.eps:
        raise ValueError(f"--norm {train.norm} needs its own --eps: the default {train.eps:g} is for {default.norm}")


def _add_fields(parser: ArgumentParser, group: Any, kind: Any, defaults: DataclassInstance | None) -> None:
    hints = get_type_hints(kind)
    texts = {each.arg_name: each.description for each in docstring_parser.parse(kind.__doc__ or "").params}
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], getattr(defaults, field.name, field.default)
        if dataclasses.is_dataclass(hint):
            title = docstring_parser.parse(hint.__doc__ or "").short_description
            inner = parser.add_argument_group(field.name, description=title)
            _add_fields(parser, inner, hint, None if default is dataclasses.MISSING else default)
        else:
            _add_flag(group, field, hint, default, texts.get(field.name))


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any, default: object, help: str | None) -> None:
    if hint in (bool, bool | None):
        yes_no = ActionYesNo(no_prefix="no-")
        group.add_argument(f"--{field.name.replace('_', '-')}", action=yes_no, help=help, default=default)
        return
    optional = type(None) in get_args(hint)
    hint = next((each for each in get_args(hint) if each is not type(None)), hint) if optional else hint
    if get_origin(hint) is Literal:
        parse: Callable[..., object] = partial(one_of, get_args(hint))
        metavar = f"{{{','.join(get_args(hint))}}}"
    else:
        parse, metavar = _PARSERS.get(hint, (text, field.name.upper()))
    if optional and hint not in (str, Path):  # a run or a file may be called null
        parse = partial(or_null, parse)
    more: dict[str, Any] = {"type": partial(parse, field.name), "help": help}
    if field.metadata.get("positional"):
        more |= {"nargs": "+"} if hint == tuple[Path, ...] else {}
        group.add_argument(field.name, metavar=field.name.upper(), **more)
        return
    more |= {"required": True} if default is dataclasses.MISSING else {"default": plain(default)}
    group.add_argument(f"--{field.name.replace('_', '-')}", metavar=metavar, **more)


_PARSERS: dict[object, tuple[Callable[..., object], str]] = {
    int: (integer, "N"),
    float: (number, "X"),
    tuple[int, ...]: (partial(comma_separated, integer), "N,N"),
    tuple[float, ...]: (partial(comma_separated, number), "X,X"),
    Path: (path, "PATH"),
    tuple[Path, ...]: (path, "PATH"),
}


def _build(kind: Any, namespace: Namespace) -> Any:
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        value = _build(hint, namespace) if dataclasses.is_dataclass(hint) else namespace[field.name]
        if hint in (Path, Path | None) and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(map(Path, value) if hint == tuple[Path, ...] else value)
        values[field.name] = value
    return kind(**values)


def _sentence(error: Exception, flags: Container[str]) -> str:
    """What was wrong: jsonargparse wraps the errors of argparse and of the functions above in its own errors."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and isinstance(cause, Exception):
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, ArgumentTypeError):
            return str(cause)
    for cause in causes:
        if isinstance(cause, ArgumentError) and cause.argument_name:
            return f"{cause.argument_name.partition('/')[0]}: {cause.message}"
    text = " ".join(str(error).split())
    missing = re.search(r"the following arguments are required: (.*)", text)
    if missing is None:
        return text
    flag_of = {name: f"--{name.replace('_', '-')}" for name in missing[1].split(", ")}
    return f"missing: {', '.join(flag if flag in flags else name for name, flag in flag_of.items())}"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help texts with the default of each flag, unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)
