"""Ticket search, the checks that make a ticket one, and its controls."""

from sparse_adv.config import PruneConfig
from sparse_adv.tickets.checks import BrokenTicket, pruned_weights_are_zero
from sparse_adv.tickets.controls import restore, shuffle
from sparse_adv.tickets.early_stop import MaskWatch
from sparse_adv.tickets.search import search

__all__ = ["BrokenTicket", "MaskWatch", "PruneConfig", "pruned_weights_are_zero", "restore", "search", "shuffle"]
