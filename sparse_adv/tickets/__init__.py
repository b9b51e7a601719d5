"""Ticket search, the invariants that it verifies, and the controls that a ticket is compared with."""

from sparse_adv.config import PruneConfig
from sparse_adv.tickets.checks import TicketInvariantError, check_pruned_weights
from sparse_adv.tickets.controls import restore, shuffle
from sparse_adv.tickets.early_stopping import EarlyStopping
from sparse_adv.tickets.preconditions import check_fits
from sparse_adv.tickets.provenance import SearchRecord, block_of, cost_of, record_of, training_of
from sparse_adv.tickets.search import search

__all__ = [
    "EarlyStopping",
    "PruneConfig",
    "SearchRecord",
    "TicketInvariantError",
    "block_of",
    "check_fits",
    "check_pruned_weights",
    "cost_of",
    "record_of",
    "restore",
    "search",
    "shuffle",
    "training_of",
]
