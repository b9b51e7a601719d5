"""Ticket files: masks, weights to start from and provenance, in one safetensors file.

Tensors `mask/<module>` are packed bits (uint8, in the order of numpy.packbits), `weight/<key>` the state dict. The
metadata contains JSON: the shapes of the masks, the provenance, and a SHA-256 checksum of all tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_adv.argument_types import checks_types
from sparse_adv.facts import software
from sparse_adv.files import write_bytes
from sparse_adv.masks.algebra import density
from sparse_adv.masks.blocks import largest_block
from sparse_adv.masks.layers import parameter_of
from sparse_adv.ops.masked_conv2d_mask import check_mask

TICKET_FORMAT = "sparse_adv ticket 1"
"""Value of "format" in the metadata of a ticket file."""


@dataclass(frozen=True)
class Ticket:
    """Masks, and weights to train under them: the result of a ticket search, or of reading a pruned model.

    Args:
        masks: bool masks keyed by module name.
        state_dict: the weights to start training from, as the dense model's state dict.
        provenance: JSON data about the origin, such as seed, data set and hyperparameters.

    Examples:
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Conv2d(3, 8, 3)
        >>> ticket = masks.Ticket(masks.prune(model, 0.5), model.state_dict(), {"seed": 0})
        >>> list(ticket.masks), list(ticket.state_dict)
        ([''], ['weight', 'bias'])
    """

    masks: dict[str, Tensor]
    state_dict: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)


@checks_types
def save_ticket(path: str | os.PathLike[str], ticket: Ticket) -> None:
    """Write a ticket to a file; an existing file is replaced completely or, after an error, not at all.

    Versions, the git commit, the date, the density and each layer's largest block are added to the
    provenance unless it already has entries of these names ("sparse_adv", "torch", "python", "commit", "date", ...).

    Args:
        path: the file, by convention *.safetensors.
        ticket: the ticket; its state dict must have the weight of each mask. If it is a sparse model's, the masks in it
            are left out.

    Raises:
        TypeError: if a mask is not a bool tensor.
        ValueError: if a mask has no weight of its shape in the state dict, the state dict holds other masks or
            something that is not a tensor, or the provenance is not JSON data.

    Examples:
        >>> import tempfile
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Conv2d(3, 8, 3)
        >>> ticket = masks.Ticket(masks.prune(model, 0.5), model.state_dict(), {"seed": 0})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     masks.save_ticket(f"{folder}/ticket.safetensors", ticket)
        ...     loaded = masks.load_ticket(f"{folder}/ticket.safetensors")
        >>> loaded.masks[""].equal(ticket.masks[""]), loaded.provenance["seed"], loaded.provenance["density"]
        (True, 0, 0.5)
    """
    check_masks_fit(ticket.masks, ticket.state_dict)
    state_dict = of_dense_model(ticket.masks, ticket.state_dict)
    default = _default_provenance(ticket.masks)
    try:
        provenance = json.dumps(default | dict(ticket.provenance))
    except (TypeError, ValueError) as error:
        raise ValueError(f"provenance must be JSON data: {error}") from error
    tensors = {f"mask/{name}": torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in ticket.masks.items()}
    tensors |= {f"weight/{key}": value for key, value in independent_copies(state_dict).items()}
    metadata = {
        "format": TICKET_FORMAT,
        "provenance": provenance,
        "mask_shapes": json.dumps({name: list(mask.shape) for name, mask in ticket.masks.items()}),
        "sha256": _checksum(tensors),
    }
    write_bytes(Path(path), save(tensors, metadata))


@checks_types
def load_ticket(path: str | os.PathLike[str]) -> Ticket:
    """Read a ticket from a file that `save_ticket` wrote; see there for an example.

    Args:
        path: the file.

    Returns:
        The ticket, with its tensors on the CPU.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged or is not a ticket.

    Examples:
        >>> load_ticket("no_such_file.safetensors")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no ticket file 'no_such_file.safetensors'
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
        if missing := {"sha256", "mask_shapes", "provenance"} - metadata.keys():
            raise ValueError(f"it lacks {min(missing)!r}")
        if metadata["sha256"] != _checksum(tensors):
            raise ValueError("its contents do not match its checksum")
        shapes, provenance = json.loads(metadata["mask_shapes"]), json.loads(metadata["provenance"])
        if not isinstance(provenance, dict):
            raise ValueError("its provenance is not a JSON object")
        if {f"mask/{name}" for name in shapes} != {key for key in tensors if key.startswith("mask/")}:
            raise ValueError("its mask_shapes do not name its masks")
        masks = {name: _unpack(tensors[f"mask/{name}"], shape) for name, shape in shapes.items()}
        weights = {key.removeprefix("weight/"): value for key, value in tensors.items() if key.startswith("weight/")}
        check_masks_fit(masks, weights)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a readable ticket file: {error}") from error
    return Ticket(masks, weights, provenance)


def check_masks_fit(masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raise TypeError or ValueError unless a state dict holds only tensors, with a weight of each mask's shape."""
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict must hold tensors alone, got {key!r}, a {type(value).__name__}")
    for name, mask in masks.items():
        check_mask(mask, linear=True)
        key = parameter_of(name)
        if key not in state_dict:
            raise ValueError(f"state_dict must have {key!r} for the mask of {name!r}, but has no such tensor")
        if state_dict[key].shape != mask.shape:
            raise ValueError(
                f"state_dict must have {key!r} of the mask's shape {tuple(mask.shape)}, "
                f"got {tuple(state_dict[key].shape)}"
            )


def check_finite(masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a weight or bias has a value, outside of what the masks prune, that is not finite."""
    mask_of = {parameter_of(name): mask for name, mask in masks.items()}
    for key, value in state_dict.items():
        name = key.rpartition(".")[2]
        is_bias = name == "bias" and value.dim() == 1  # others mask the scores of an attention, by -inf
        if (name == "weight" or is_bias) and value.is_floating_point():
            finite = (value.float() if value.element_size() == 1 else value).isfinite()  # of float8 it is not defined
            if not (finite | ~mask_of[key].to(finite.device) if key in mask_of else finite).all():
                raise ValueError(f"{key!r} has values that are not finite")


def of_dense_model(masks: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict without buffers `weight_mask`: a sparse model has them, but a dense one cannot load them.

    Raises:
        ValueError: if one of them is not the mask in `masks`.
    """
    of_key = {parameter_of(name, "weight_mask"): mask for name, mask in masks.items()}
    dense = {}
    for key, value in state_dict.items():
        if key.rpartition(".")[2] != "weight_mask" or value.dtype != torch.bool:
            dense[key] = value
        elif key not in of_key or not of_key[key].cpu().equal(value.cpu()):
            raise ValueError(f"state_dict has another mask {key!r} than masks: give the one that the model has")
    return dense


def independent_copies(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, each into its own memory: safetensors cannot write tensors that share memory."""
    return {key: value.detach().cpu().contiguous().clone() for key, value in state_dict.items()}


def _default_provenance(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        **asdict(software()),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "density": density(masks) if any(mask.numel() for mask in masks.values()) else None,
        "blocks": {name: largest_block(mask) for name, mask in masks.items()},
    }


def _unpack(packed: Tensor, shape: object) -> Tensor:
    # The shapes are not part of the checksum: a wrong, huge shape would be allocated.
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"a mask's shape must be a list of sizes, got {shape!r:.80}")
    if packed.dtype != torch.uint8 or packed.numel() != -(-math.prod(shape) // 8):
        raise ValueError(f"a mask of shape {shape!r:.80} does not have {packed.numel()} bytes")
    bits = np.unpackbits(packed.numpy(), count=math.prod(shape))
    return torch.from_numpy(bits.astype(np.bool_)).reshape(shape)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
