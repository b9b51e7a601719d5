"""The ticket file: masks, initial weights and where they come from, in one safetensors file.

Tensors `mask/<module>` are bit-packed (uint8, NumPy's packbits order), `weight/<key>` the initial state dict. The
metadata holds JSON: the masks' shapes, the provenance, and a SHA-256 of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_adv.files import write_bytes
from sparse_adv.masks.algebra import density, largest_block
from sparse_adv.masks.layers import parameter_of
from sparse_adv.ops import build_facts
from sparse_adv.ops.masked_conv2d_mask import check_mask

TICKET_FORMAT = "sparse_adv ticket 1"
"""What the metadata of a ticket file calls its format."""


@dataclass(frozen=True)
class Ticket:
    """What a ticket search found: masks keyed by module name, the initial weights, and how they came about."""

    masks: dict[str, Tensor]
    state_dict: dict[str, Tensor]
    provenance: dict[str, Any]


def save_ticket(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    state_dict: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> None:
    """Write a ticket; a file of that name is replaced at once or not at all.

    Args:
        path: the file, by custom `*.safetensors`.
        masks: bool masks keyed by module name.
        state_dict: the weights to begin training with; it must hold the weight of each mask.
        provenance: JSON data, such as seed, data set and recipe. The library adds its version, torch's, the date, the
            density of weights and each layer's largest block, where the caller does not give them.

    Raises:
        ValueError: if a mask has no weight of its shape in `state_dict`, or the provenance is not JSON data.
    """
    check_fit(masks, state_dict)
    try:
        provenance_json = json.dumps(_facts(masks) | dict(provenance))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must be JSON data: {error}") from error
    tensors = {f"mask/{name}": torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in masks.items()}
    tensors |= {f"weight/{key}": value for key, value in own_copies(state_dict).items()}
    metadata = {
        "format": TICKET_FORMAT,
        "provenance": provenance_json,
        "mask_shapes": json.dumps({name: list(mask.shape) for name, mask in masks.items()}),
        "sha256": _digest(tensors),
    }
    write_bytes(Path(path), save(tensors, metadata))


def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Read a ticket.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, cut short or no ticket.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ticket file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if metadata.get("format") != TICKET_FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {TICKET_FORMAT!r}")
        if metadata["sha256"] != _digest(tensors):
            raise ValueError("its contents do not match its checksum")
        masks = {
            name: _unpack(tensors[f"mask/{name}"], shape) for name, shape in json.loads(metadata["mask_shapes"]).items()
        }
        provenance = json.loads(metadata["provenance"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no readable ticket file: {error}") from error
    weights = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
    return Ticket(masks, weights, provenance)


def check_fit(masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raises TypeError or ValueError unless `state_dict` holds a weight of its shape for each mask."""
    for name, mask in masks.items():
        check_mask(mask, linear=True)
        key = parameter_of(name)
        if key not in state_dict or state_dict[key].shape != mask.shape:
            found = tuple(state_dict[key].shape) if key in state_dict else "nothing"
            raise ValueError(f"state_dict must hold {key!r} of the mask's shape {tuple(mask.shape)}, found {found}")


def own_copies(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each with memory of its own: safetensors refuses tied weights otherwise."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}


def _facts(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "sparse_adv": build_facts()["version"],
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "density": density(masks) if masks else None,
        "blocks": {name: largest_block(mask) for name, mask in masks.items()},
    }


def _unpack(packed: Tensor, shape: list[int]) -> Tensor:
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(np.bool_)).reshape(shape)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
