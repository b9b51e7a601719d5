"""The record of a search in the provenance of its ticket: configurations, epochs, cost and verified invariants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sparse_adv import json_files, masks
from sparse_adv.argument_types import checks_types
from sparse_adv.config import PruneConfig, TrainConfig
from sparse_adv.masks.blocks import check_structure
from sparse_adv.runs import Cost, EpochRecord, TicketChecks


@dataclass(frozen=True)
class SearchRecord:
    """The record that a search writes into the provenance of its ticket."""

    train: TrainConfig
    prune: PruneConfig
    epochs: list[EpochRecord]
    """Epochs of all rounds."""
    cost: Cost
    """Cost of attacks, updates and pruning."""
    checks: TicketChecks


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError, before a search, unless its ticket can hold these metadata and its record.

    Examples:
        >>> check_metadata({"epochs": 3})
        Traceback (most recent call last):
        ...
        ValueError: metadata must not have the key 'epochs', under which the search records its own
    """
    for field in fields(SearchRecord):
        if field.name in metadata:
            raise ValueError(f"metadata must not have the key {field.name!r}, under which the search records its own")
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"metadata must be JSON data: {error}") from error


@checks_types
def record_of(ticket: masks.Ticket, source: Path | str = "the ticket") -> SearchRecord:
    """Return what `search` recorded in the provenance of a ticket.

    Args:
        ticket: a ticket that `search` returned, or one read from its file.
        source: where the ticket comes from, for the error message.

    Returns:
        The configurations, epochs, cost and verified invariants of the search.

    Raises:
        ValueError: if the provenance has no such record, naming the key that is missing.

    Examples:
        >>> record_of(masks.Ticket({}, {}, {"format": "prune"}), source="model.pt")
        Traceback (most recent call last):
        ...
        ValueError: the provenance of model.pt lacks the key 'train'
    """
    names = [field.name for field in fields(SearchRecord)]
    content = {name: ticket.provenance[name] for name in names if name in ticket.provenance}
    return json_files.from_json(SearchRecord, content, f"the provenance of {source}")


@checks_types
def training_of(ticket: masks.Ticket, source: Path | str = "the ticket") -> TrainConfig | None:
    """Return the settings of the training in the search that found a ticket; None if its provenance has none.

    Args:
        ticket: any ticket, also one that was read from a file of another tool.
        source: where the ticket comes from, for the error message.

    Raises:
        ValueError: if the settings in the provenance are invalid.

    Examples:
        >>> training_of(masks.Ticket({}, {}, {"train": {"eps": 0.1}})).eps, training_of(masks.Ticket({}, {}))
        (0.1, None)
    """
    recorded = ticket.provenance.get("train")
    return None if recorded is None else json_files.from_json(TrainConfig, recorded, f"the provenance of {source}")


@checks_types
def cost_of(ticket: masks.Ticket) -> Cost:
    """Return the cost of the search that found a ticket; zero if its provenance does not contain a cost.

    Args:
        ticket: any ticket, also one that was read from a file of another tool.

    Returns:
        Seconds and MACs of attacks, updates and pruning.

    Raises:
        ValueError: if the cost in the provenance is invalid.

    Examples:
        >>> cost_of(masks.Ticket({}, {}, {"cost": {"seconds": 2.5, "macs": 1000}}))
        Cost(seconds=2.5, macs=1000)
    """
    return json_files.from_json(Cost, ticket.provenance.get("cost", {}), "the ticket's provenance")


@checks_types
def block_of(ticket: masks.Ticket) -> tuple[int, ...] | str | None:
    """Return the block of a search's pruning or of a run's masks; None if the provenance contains none.

    Args:
        ticket: any ticket, also one that was read from a file of another tool.

    Returns:
        The block (bo, bi, br, bs), or "filter" or "channel".

    Raises:
        ValueError: if the block in the provenance is invalid.

    Examples:
        >>> block_of(masks.Ticket({}, {}, {"prune": {"block": [16, 16]}})), block_of(masks.Ticket({}, {}))
        ((16, 16, 1, 1), None)
    """
    pruning = ticket.provenance.get("prune")
    recorded = (pruning if isinstance(pruning, dict) else ticket.provenance).get("block")
    return None if recorded is None else check_structure(recorded)
