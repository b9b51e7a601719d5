"""The config files of a command: YAML mappings from its flags to their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, set_loader

from sparse_adv import recipes

_MAX_CONFIG, _MAX_DEPTH, _MAX_EVENTS = 1 << 16, 20, 1000
"""Most bytes, levels and events of a config file; jsonargparse takes seconds for some thousand keys."""
_NOT_IN_A_FILE = frozenset({"config", "print_config", "help"})
"""Options that a config file cannot have."""
_ONLY_OF = {
    "train": ("name", "ticket", "reinit", "shuffle", "method", "interval"),
    "search": ("score", "rounds", "rewind_step", "keep_weights", "half_resolution"),
}
"""Some options of the commands that write a config.yaml, by which its command is recognised."""
MODE = "sparse_adv"
"""Name of the function that reads config files, for jsonargparse."""


class _Loader(yaml.SafeLoader):
    """Reads only null, true, false and text: flags parse text themselves, and a folder called 1e3 is not 1000.0."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [each for each in resolvers if each[0].rpartition(":")[2] in ("bool", "null")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _load(content: str) -> object:
    return yaml.load(content, _Loader)


set_loader(MODE, _load, (yaml.YAMLError,))


def split(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the config files that arguments name (for a recipe, its file), and the other arguments.

    Examples:
        >>> split(["--epochs", "1", "--config", "a.yaml", "--config=b.yaml", "--", "--config"])[1]
        ['--epochs', '1', '--', '--config']
    """
    files, others, words = [], [], iter(arguments)
    for word in words:
        flag, is_joined, name = word.partition("=")
        if word == "--":
            others += [word, *words]
        elif flag != "--config":
            others.append(word)
        elif is_joined or (name := next(words, "")):
            files.append(recipes.path(name[len(recipes.PREFIX) :]) if name.startswith(recipes.PREFIX) else Path(name))
        else:
            others.append(word)  # no file is given: the parser says so
    return files, others


def check(parser: ArgumentParser, file: Path) -> None:
    """Raise ValueError unless a file is a YAML mapping from options to values.

    Content that grows when it is read, by aliases or nesting, is refused. So is a repeated key, because YAML would drop
    its first value.
    """
    if not file.exists():
        raise FileNotFoundError(f"--config {file}: there is no such file")
    if not file.is_file():  # a pipe, which cannot be read a second time
        raise ValueError(f"--config {file} is not a regular file: save its content to one first")
    with file.open("rb") as opened:
        content = opened.read(_MAX_CONFIG + 1)
    if len(content) > _MAX_CONFIG:
        raise ValueError(f"{file} must have at most {_MAX_CONFIG >> 10} KiB")
    depth = 0
    try:
        for number, event in enumerate(yaml.parse(content, yaml.SafeLoader)):
            if number > _MAX_EVENTS:
                raise ValueError(f"{file} must have at most {_MAX_EVENTS // 2} values")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"{file} has the alias *{event.anchor!s:.20}, which is not supported: write the value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ValueError(f"{file} is nested more than {_MAX_DEPTH} levels deep")
        root = yaml.compose(content, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{file} must be a YAML mapping from options to values, such as 'epochs: 20'")
        _check_keys(parser, file, root)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}") from error


def _check_keys(parser: ArgumentParser, file: Path, root: yaml.MappingNode) -> None:
    """Raise ValueError unless each key is an option, once, and the values of switches are true or false."""
    known = actions_by_flag(parser)
    positional = {action.dest for action in parser._actions if not action.option_strings}
    seen: set[str] = set()
    for key, value in root.value:
        name = _text_of(key).replace("-", "_")
        action = known.get(f"--{name.replace('_', '-')}")
        if name in seen:
            raise ValueError(f"{file} has the key {name[:40]!r} twice: keep one")
        if name in _NOT_IN_A_FILE:
            raise ValueError(f"{file} has the key {name!r}, which is for the command line only")
        if action is None and name not in positional:
            other = next((other for other, keys in _ONLY_OF.items() if name in keys), None)
            foreign = f"{name!r} is an option of `{other}`, not of this command"
            unknown = no_option(name, known) if other is None else foreign
            raise ValueError(f"{file}: {unknown}")
        if isinstance(action, ActionYesNo) and name != action.dest.replace("-", "_"):
            raise ValueError(f"{file} has the key {name!r}: write '{action.dest}: false'")
        if isinstance(action, ActionYesNo) and not _is_true_or_false(value, action.default):
            raise ValueError(f"{file}: {name} must be true or false, got {_text_of(value)[:40]!r}")
        seen.add(name)


def _text_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _is_true_or_false(value: yaml.Node, default: object) -> bool:
    """Whether a switch may have this value; null may stand for a default that is None."""
    tag = value.tag.rpartition(":")[2]
    words = ("true", "false", "yes", "no")
    return tag == "bool" or (tag == "null" and default is None) or (tag == "str" and value.value.lower() in words)


def actions_by_flag(parser: ArgumentParser) -> dict[str, argparse.Action]:
    """Return the actions of a parser by their flags."""
    return {flag: action for action in parser._actions for flag in action.option_strings}


def no_option(given: str, flags: Iterable[str]) -> str:
    """Say that there is no such flag or key of a config file, and which one may have been meant."""
    names = [flag.removeprefix("--") for flag in flags if flag.startswith("--")]
    near = get_close_matches(given.removeprefix("--").replace("_", "-"), names, n=1, cutoff=0.75)
    meant = [f"--{name}" if given.startswith("--") else name.replace("-", "_") for name in near]
    return f"there is no option {given[:40]!r}" + (f"; did you mean {meant[0]!r}?" if meant else "")
