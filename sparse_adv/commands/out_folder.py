"""The folder that a command writes, `--out`, and the config.yaml in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sparse_adv import runs
from sparse_adv.files import write_text
from sparse_adv.training import distributed

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NO_SETTING = frozenset({"config", "json"})
"""Options that are not settings of the run."""


def check_folder(path: Path) -> None:
    """Raise NotADirectoryError if --out, or a folder above it, is a file."""
    there = next((each for each in (path, *path.parents) if each.exists()), None)
    if there is not None and not there.is_dir():
        raise NotADirectoryError(f"--out must be a folder, got {path}, where {there} is a file")


def flat(options: DataclassInstance) -> dict[str, object]:
    """The options as plain YAML and JSON data: what a config file holds."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            values |= flat(value)
        elif field.name not in NO_SETTING:
            values[field.name] = plain(value)
    return values


def write_config(folder: Path, options: DataclassInstance) -> None:
    """Write the options to config.yaml in a run's folder, for `--config`; only rank 0 writes.

    `check_config` has made sure before the run that it replaces only an earlier config of the run.
    """
    if distributed.rank() == 0:
        given = {name: value for name, value in flat(options).items() if value is not None}
        write_text(folder / runs.CONFIG, yaml.safe_dump(given, sort_keys=False))


def check_config(folder: Path) -> None:
    """Raise NotADirectoryError if --out is a file, FileNotFoundError if it holds a run that has lost its settings, and
    ValueError if it holds the user's own config.yaml and no run.
    """
    check_folder(folder)
    runs.check_info(folder)
    path = folder / runs.CONFIG
    if path.exists() and not (folder / runs.INFO).exists():
        raise ValueError(f"{path} would be replaced by the one that the run writes: rename it, or take another --out")


def plain(value: object) -> object:
    """A value of an option as YAML and JSON have it: tuples as lists, paths as text."""
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
