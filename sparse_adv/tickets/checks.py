"""Invariants of tickets, verified in every search and recorded in the ticket.

Published implementations have violated each of them unnoticed: weights were not reset, later masks kept pruned weights
again, densities differed from the requested ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.config import PruneConfig


class TicketInvariantError(RuntimeError):
    """An invariant of tickets does not hold: a defect of this library, or of the user's score function or layer."""


def check_reset(model: nn.Module, start: Mapping[str, Tensor]) -> None:
    """Check that the model's state, BatchNorm included, is bit for bit the state to begin with.

    Raises:
        TicketInvariantError: if it is not, naming up to three tensors.

    Examples:
        >>> check_reset(model := nn.Linear(2, 2), model.state_dict())
    """
    state = model.state_dict()
    moved = [key for key in {**state, **start} if key not in state or not state[key].cpu().equal(start[key].cpu())]
    _require(not moved, f"the reset missed {moved[:3]}")


@checks_types
def check_pruned_weights(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Check that the weights outside the masks are zero.

    Args:
        model: dense or sparse.
        masks: bool masks keyed by module name.

    Raises:
        TicketInvariantError: if they are not, naming the layer.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> check_pruned_weights(model, {"0": torch.tensor([[True, True], [True, False]])})
        Traceback (most recent call last):
        ...
        sparse_adv.tickets.checks.TicketInvariantError: 1 pruned weights of '0' are not zero
    """
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        outside = int(weight.detach()[~mask.to(weight.device)].count_nonzero())
        _require(not outside, f"{outside} pruned weights of {name!r} are not zero")


def check_nested(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Check that a later round keeps no weight that an earlier one pruned.

    Raises:
        TicketInvariantError: if it does, naming the layer.

    Examples:
        >>> check_nested({"0": torch.tensor([[True, False]])}, {"0": torch.tensor([[True, True]])})
    """
    for name, mask in old.items():
        grown = int((new[name] & ~mask.to(new[name].device)).count_nonzero())
        _require(not grown, f"{grown} weights of {name!r} were pruned before, but a later round keeps them")


def check_density(masks: Mapping[str, Tensor], config: PruneConfig, number: int) -> tuple[int, int, int]:
    """Check that the masks of a round keep as many weights as configured, within one block for each ranking.

    Args:
        masks: bool masks by module name, one for each weight, see `of_distinct_weights`.
        config: of the pruning.
        number: of the round, counted from 1.

    Returns:
        The numbers of weights, of kept weights, and of weights that the configuration asks for.

    Raises:
        TicketInvariantError: if the number of kept weights differs, with both numbers.

    Examples:
        >>> check_density({"0": torch.arange(10).view(2, 5) < 5}, PruneConfig(density=0.5), number=1)
        (10, 5, 5)
    """
    weights = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.count_nonzero()) for mask in masks.values())
    requested = config.density_of_round(number) * weights
    slack = torch.Size(config.block).numel() * (1 if config.scope == "global" else len(masks))
    _require(abs(kept - requested) <= slack, f"{kept} of {weights} weights are kept, {requested:.0f} were requested")
    return weights, kept, round(requested)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise TicketInvariantError(otherwise)
