"""Dataclasses as JSON; reading checks that there are exactly the fields of the class, with values of their types."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

import dacite

from sparse_adv.files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
JSONObject: TypeAlias = dict[str, JSON]

Record = TypeVar("Record", bound="DataclassInstance")


def to_json(record: DataclassInstance, *, with_none: bool = True) -> JSONObject:
    """Return the fields of a dataclass, and of those inside it, as a JSON object.

    Args:
        record: fields are numbers, text, None, dataclasses, or tuples, lists and dicts of these.
        with_none: whether fields that are None are written; if not, `from_json` gives them their defaults.

    Examples:
        >>> from sparse_adv.config import NetworkConfig
        >>> to_json(NetworkConfig("vgg16"))
        {'arch': 'vgg16', 'width': None}
        >>> to_json(NetworkConfig("vgg16"), with_none=False)
        {'arch': 'vgg16'}
    """
    fields = dataclasses.asdict(record)
    return json.loads(json.dumps(fields if with_none else _without_none(fields), allow_nan=False))


def from_json(kind: type[Record], content: Mapping[str, JSON], source: str) -> Record:
    """Return the dataclass from which `to_json` made this JSON object.

    Args:
        kind: the dataclass.
        content: the JSON object; fields that are missing take their defaults.
        source: where the object comes from, for messages.

    Raises:
        ValueError: if a key is unknown, a field without a default is missing, or a value is of another type or out of
            range.

    Examples:
        >>> from sparse_adv.config import NetworkConfig
        >>> from_json(NetworkConfig, {"arch": "vgg16"}, "run.json")
        NetworkConfig(arch='vgg16', width=None)
        >>> from_json(NetworkConfig, {"arch": "vgg16", "depth": 16}, "run.json")
        Traceback (most recent call last):
        ...
        ValueError: run.json has the unknown key 'depth': another version of sparse_adv wrote it
    """
    try:
        return dacite.from_dict(kind, content, dacite.Config(strict=True, cast=[tuple]))
    except dacite.UnexpectedDataError as error:
        key = min(error.keys)
        raise ValueError(
            f"{source} has the unknown key {str(key)[:80]!r}: another version of sparse_adv wrote it"
        ) from error
    except dacite.MissingValueError as error:
        raise ValueError(f"{source} lacks the key {error.field_path!r}") from error
    except (dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError, RecursionError) as error:  # dacite expects right types
        raise ValueError(f"{source} has a value of a wrong type: {error}") from error


def read(kind: type[Record], path: Path) -> Record:
    """Read a file that holds one dataclass; ValueError names the file and what is wrong with it."""
    return from_json(kind, _object(_read_text(path), str(path)), str(path))


def read_lines(kind: type[Record], path: Path) -> list[Record]:
    """Read a file that holds a dataclass in each line; ValueError names file, line and what is wrong."""
    lines = _read_text(path).splitlines()
    places = [f"{path}, line {number}" for number in range(1, len(lines) + 1)]
    return [from_json(kind, _object(line, place), place) for line, place in zip(lines, places, strict=True)]


def write(path: Path, record: DataclassInstance) -> None:
    """Write a file that holds one dataclass, whole or not at all.

    Examples:
        >>> import tempfile
        >>> from sparse_adv.config import NetworkConfig
        >>> path = Path(tempfile.mkdtemp()) / "network.json"
        >>> write(path, NetworkConfig("vgg16"))
        >>> read(NetworkConfig, path)
        NetworkConfig(arch='vgg16', width=None)
    """
    write_text(path, json.dumps(to_json(record), indent=2) + "\n")


def write_lines(path: Path, records: Iterable[DataclassInstance]) -> None:
    """Write a file that holds a dataclass in each line, without fields that are None; whole or not at all.

    Examples:
        >>> import tempfile
        >>> from sparse_adv.config import NetworkConfig
        >>> path = Path(tempfile.mkdtemp()) / "networks.jsonl"
        >>> write_lines(path, [NetworkConfig("vgg16"), NetworkConfig("resnet18", 16)])
        >>> [network.width for network in read_lines(NetworkConfig, path)]
        [None, 16]
    """
    write_text(path, "".join(json.dumps(to_json(record, with_none=False)) + "\n" for record in records))


def flatten(content: Mapping[str, JSON], prefix: str = "") -> Iterator[tuple[str, JSON]]:
    """Yield the leaves of nested objects, named by their path.

    Examples:
        >>> dict(flatten({"train": {"lr": 0.1, "milestones": [0.5]}, "name": None}))
        {'train.lr': 0.1, 'train.milestones': [0.5], 'name': None}
    """
    for key, value in content.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _object(text: str, source: str) -> JSONObject:
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{source} is not a JSON object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant[:40]} is not a finite number")


def _finite(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8") from error


def _without_none(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
