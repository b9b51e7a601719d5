"""Files of tensors, known by their first bytes: torch.save's, safetensors, NumPy's; nothing in them is executed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_adv.files import unpickle_arrays

_NUMPY = b"\x93NUMPY"
_TORCH = (b"PK", b"\x80")
"""A zip archive; a bare pickle, as torch wrote before 1.6."""

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npy(path: Path) -> bool:
    """Whether this is a NumPy array file."""
    return _starts_with(path, _NUMPY)


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; of any other file, none."""
    if _starts_with(path, _NUMPY, *_TORCH):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> Any:
    """What torch.save (`weights_only=True` must suffice) or safetensors wrote, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another kind, or holds more than tensors and plain data.
    """
    if is_npy(path):
        raise ValueError(f"{str(path)!r} is a NumPy file: give it as mask_path, and the weights as path")
    try:
        if _starts_with(path, *_TORCH):
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:  # a damaged file fails in any way it likes
        raise _unreadable(path, error) from error


def read_npy_list(path: Path) -> list[torch.Tensor]:
    """The arrays in an object array, or the rows of a plain one, as tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds anything but arrays of numbers.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in _NPY_HEADERS:
                raise ValueError(f"its version of the format is {version}")
            _, _, dtype = _NPY_HEADERS[version](file)
            if dtype.hasobject:
                arrays = unpickle_arrays(file)
            else:
                file.seek(0)
                arrays = np.load(file, allow_pickle=False)
        return [torch.from_numpy(np.array(array)) for array in arrays]
    except Exception as error:
        raise _unreadable(path, error) from error


def _starts_with(path: Path, *beginnings: bytes) -> bool:
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    with path.open("rb") as file:
        return file.read(max(map(len, beginnings))).startswith(beginnings)


def _unreadable(path: Path, error: Exception) -> ValueError:
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)", text)
    if asked:
        reason = f"it asks for {asked[1]}, which is neither tensor nor plain data"
    elif text.startswith("Weights only load failed"):
        reason = "torch.load(weights_only=True) refuses it"
    else:
        reason = text.partition("\n")[0] or type(error).__name__
    return ValueError(f"{str(path)!r} is no readable file of tensors: {reason}")
