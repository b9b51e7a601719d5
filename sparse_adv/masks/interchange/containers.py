"""Files of tensors: torch.save, safetensors and NumPy, recognised by their first bytes; no code in them is executed."""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sparse_adv import torch_files
from sparse_adv.errors import first_line
from sparse_adv.plain_pickles import PlainDtype, plain_scalar, unpickle_arrays

_NUMPY = b"\x93NUMPY"
_TORCH = (b"PK\x03\x04", b"\x80")
"""A zip archive, or a bare pickle as torch before 1.6 wrote it."""

_HARMLESS: list[Any] = [
    argparse.Namespace,
    (PurePosixPath, "pathlib.PosixPath"),
    (PureWindowsPath, "pathlib.WindowsPath"),
    PlainDtype,
    (PlainDtype, "numpy.dtype"),
    (plain_scalar, "numpy.core.multiarray.scalar"),
    (plain_scalar, "numpy._core.multiarray.scalar"),
]
"""Classes that checkpoints often hold, for settings and accuracies; NumPy's numbers become Python's."""

_MOST_MASKS = 10_000
"""Largest number of masks in a list; a list has one mask for each layer of a network."""

COMBINE = "combine masks with their weights by `sparse-adv convert WEIGHTS TARGET --masks FILE`"
"""What to do with a file of masks alone."""

_REMEDY = (
    "if you trust the file, load it where it was written and save its tensors alone: "
    "torch.save(model.state_dict(), path)"
)

_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def is_npy(path: Path) -> bool:
    """Return whether a file is a NumPy array file."""
    return _first_bytes(path).startswith(_NUMPY)


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; an empty dict for files of other formats."""
    if is_npy(path) or _is_torch(path):
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise _unreadable(path, error) from error


def read_tensors(path: Path) -> Any:
    """Read a file of torch.save (with `weights_only=True`) or safetensors, onto the CPU.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged, has another format, or contains other objects than tensors and plain data.
    """
    if is_npy(path):
        raise ValueError(f"{str(path)!r} is a NumPy file: {COMBINE}")
    try:
        if _is_torch(path):
            with path.open("rb") as file, torch.serialization.safe_globals(_HARMLESS):
                return torch_files.load(file)
        return load_file(path)
    except Exception as error:  # both libraries raise many types of errors for damaged files
        raise _unreadable(path, error) from error


def read_npy_list(path: Path) -> list[torch.Tensor]:
    """Read the arrays in a NumPy object array, or the rows of an array of numbers, as tensors.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is damaged, or contains other objects than arrays of numbers.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version not in _NPY_HEADERS:
                raise ValueError(f"version {version} of the format is not supported")
            _, _, dtype = _NPY_HEADERS[version](file)
            if dtype.hasobject:
                arrays = unpickle_arrays(file)
            else:
                file.seek(0)
                arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray) and arrays.ndim == 0:
            raise ValueError("it holds no list of masks")
        if len(arrays) > _MOST_MASKS:  # masks without elements take no bytes in the file
            raise ValueError(f"it holds {len(arrays)} masks, more than {_MOST_MASKS}")
        return [torch.from_numpy(np.array(array)) for array in arrays]
    except Exception as error:
        raise _unreadable(path, error) from error


def _is_torch(path: Path) -> bool:
    start = _first_bytes(path)
    # A safetensors file begins with the length of its header, eight bytes of any value, and the header's brace.
    return start.startswith(_TORCH) and start[8:9] != b"{"


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder: name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    with path.open("rb") as file:
        return file.read(9)


def _unreadable(path: Path, error: Exception) -> ValueError:
    text = str(error)
    begins = _first_bytes(path)
    refused = torch_files.why_refused(error)
    if begins and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in begins):  # a web page, a Git LFS pointer
        reason = f"it is text that begins with {begins.decode()!r}, perhaps of a download that failed"
    elif refused:
        reason = f"{refused}; {_REMEDY}"
    elif text.startswith("Weights only load failed"):
        reason = f"torch.load(weights_only=True) refuses it; {_REMEDY}"
    else:
        reason = first_line(error)[:300]
    return ValueError(f"{str(path)!r} is not a readable file of tensors: {reason}")
