"""Weights as safetensors for everyone, and the state that a run continues from."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_adv.files import write_bytes

_FORMAT = "sparse_adv weights 1"


def write_weights(path: Path, state_dict: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state dict as safetensors, whole or not at all.

    Args:
        path: the file.
        state_dict: tensors by name; those that share memory are written apart.
        facts: JSON data for the file's metadata, such as the epoch and the accuracies.
    """
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}
    write_bytes(path, save(tensors, {"format": _FORMAT, "facts": json.dumps(dict(facts))}))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict and the facts that were written with it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or no file of weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file of weights {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no readable file of weights: {error}") from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state: tensors, numbers, text and plain containers of them."""
    # Through memory: torch.save to a full disk ends in a RuntimeError that does not say so.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a run's state; nothing but tensors and plain containers is unpickled.

    Raises:
        ValueError: if the file is damaged.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        return torch.load(content, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file fails in any way it likes
        raise ValueError(
            f"{str(path)!r} is damaged, the run cannot continue: delete its folder to begin anew"
        ) from error
