"""What must hold of every ticket: checked while a search runs, and kept with the ticket.

Published tickets have broken each of these unnoticed: networks that were never reset, masks that grew back, densities
that were not what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv.config import PruneConfig


class BrokenTicket(RuntimeError):
    """An invariant of tickets does not hold: a defect of this library, or of a score or layer that was passed to it."""


def reset(model: nn.Module, start: Mapping[str, Tensor]) -> dict[str, Any]:
    """All weights, BatchNorm included, are bit for bit those to begin with."""
    state = model.state_dict()
    moved = [key for key in {**state, **start} if key not in state or not state[key].cpu().equal(start[key].cpu())]
    _require(not moved, f"the reset missed {moved[:3]}")
    return {"reset": True}


def pruned_weights_are_zero(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """No weight outside its mask has come back."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        outside = int(weight.detach()[~mask.to(weight.device)].count_nonzero())
        _require(not outside, f"{outside} pruned weights of {name!r} are no longer zero")
    return {"pruned_weights_zero": True}


def nested(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Any]:
    """A later round keeps nothing that an earlier one has pruned."""
    for name, mask in old.items():
        grown = int((new[name] & ~mask.to(new[name].device)).count_nonzero())
        _require(not grown, f"{grown} weights of {name!r} came back in a later round")
    return {"nested": True}


def density(masks: Mapping[str, Tensor], config: PruneConfig, number: int) -> dict[str, Any]:
    """As many weights are kept as were asked for, to within one block for each group that is ranked together."""
    counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    sizes = {name: mask.numel() for name, mask in masks.items()}
    asked = config.density_of_round(number) * sum(sizes.values())
    kept = sum(counts.values())
    slack = torch.Size(config.block).numel() * (1 if config.scope == "global" else len(masks))
    _require(abs(kept - asked) <= slack, f"{kept} of {sum(sizes.values())} weights are kept, asked was {asked:.0f}")
    return {"kept": kept, "asked": round(asked), "weights": sum(sizes.values())}


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenTicket(f"the ticket is broken: {what}")
