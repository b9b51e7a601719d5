"""Safe reading of files of torch.save: tensors and plain data, in bounded memory and time."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from contextlib import suppress
from typing import IO, Any

import torch

_LONGEST_NAME = 1000
"""Most characters in the name of a class or function. PyTorch's error messages take time quadratic in this length:
minutes for 75,000."""


def load(file: IO[bytes], device: torch.device | str = "cpu") -> Any:
    """Read a file with `torch.load(weights_only=True)`, which runs no code from it.

    Args:
        file: open for reading bytes.
        device: of the tensors.

    Raises:
        Exception: of many types, if the file is damaged, compressed, or holds anything but tensors and plain data.

    Examples:
        >>> file = io.BytesIO()
        >>> torch.save({"bias": torch.zeros(2)}, file)
        >>> load(file)
        {'bias': tensor([0., 0.])}
    """
    size = file.seek(0, io.SEEK_END)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise ValueError("it is a TorchScript program: save the state_dict() of its module")
            if archive.namelist() and all(name.endswith(".npy") for name in archive.namelist()):
                raise ValueError("it is a NumPy archive (.npz): save its arrays as tensors with torch.save")
            if not any(name.endswith("data.pkl") for name in archive.namelist()):
                raise ValueError("it is a zip archive that torch.save did not write")
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it is compressed, which torch.save does not do")
            for name in archive.namelist():
                if name.endswith(".pkl"):
                    _check_names(io.BytesIO(archive.read(name)))
    else:
        file.seek(0)
        _check_names(file)
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)


def refused_object(error: Exception) -> str | None:
    """The class or function because of which `load` refused a file; None if it failed for another reason.

    Examples:
        >>> file = io.BytesIO()
        >>> torch.save({"layer": torch.nn.Identity()}, file)
        >>> try:
        ...     load(file)
        ... except pickle.UnpicklingError as error:
        ...     refused_object(error)
        'torch.nn.modules.linear.Identity'
    """
    found = re.search(r"GLOBAL (\S{1,100})", str(error))
    return found and found[1]


def why_refused(error: Exception) -> str | None:
    """Words for the refusal of a class or function by `load`; None if it failed for another reason."""
    refused = refused_object(error)
    return refused and f"it contains {refused}, which is neither a tensor nor plain data"


def _check_names(file: IO[bytes]) -> None:
    """Raise UnpicklingError for a very long name in the pickles at the start of a file (before torch 1.6, several)."""
    with suppress(ValueError):  # the file is no pickle: torch.load says so
        while file.read(1) == b"\x80":
            file.seek(-1, io.SEEK_CUR)
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL" and len(str(argument)) > _LONGEST_NAME:
                    raise pickle.UnpicklingError(f"it names a class of {len(str(argument))} characters")
