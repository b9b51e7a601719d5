"""Config files, whose keys are flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparse_adv.files import write_text

CONFIG = "config.yaml"

_UNCONFIGURED = {"config", "print_config", "json", "verbose", "run"}
"""Options that are no setting."""


def with_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with those of its config file before them.

    Raises:
        ValueError: if the file is no YAML mapping or has a key that is no flag.
        FileNotFoundError: if there is no such file.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(list(arguments))[0].config
    if path is None:
        return list(arguments)
    flags = known_flags(parser)
    tokens: list[str] = []
    for key, value in _read(path).items():
        flag = f"--{key.replace('_', '-')}"
        if flag not in flags or flag == "--config":
            raise ValueError(f"{path}: no setting is called {key!r}{suggestion(flag, flags)}")
        if isinstance(value, bool):
            tokens.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            tokens.append(f"{flag}={','.join(map(str, value)) if isinstance(value, list) else value}")
    return [*tokens, *arguments]


def known_flags(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a command."""
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def suggestion(flag: str, flags: Sequence[str]) -> str:
    """A question about the flag that may have been meant, or nothing."""
    near = get_close_matches(flag, flags, n=1)
    return f"; did you mean {near[0][2:]!r}?" if near else ""


def config_text(options: argparse.Namespace) -> str:
    """The settings as a config file."""
    import yaml

    return yaml.safe_dump(_given(options), sort_keys=False)


def write_config(folder: Path, options: argparse.Namespace) -> None:
    """Leave the settings in a run's folder, ready for `--config`."""
    write_text(folder / CONFIG, config_text(options))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """All that a config file can hold."""
    return {
        name: _plain(value) for name, value in vars(options).items() if name not in _UNCONFIGURED and value is not None
    }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace("\n", " ")
        raise ValueError(f"{path} is no YAML file: {where}") from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path} must hold settings as 'name: value', got {type(found).__name__}")
    return found
