"""Masks: which weights of a model are kept. Scores become masks, masks are compared, read, saved.

A mask is a bool tensor of the weight's shape, `[K, C/groups, R, S]` of a convolution or `[K, C]` of a linear layer,
true = kept; the masks of a model are a dict keyed by module name.
"""

from sparse_adv.masks.algebra import SUPPORTED_BLOCKS, density, distance, largest_block, multiply_add_density
from sparse_adv.masks.channel_permutation import ChannelOrder, gather_channels
from sparse_adv.masks.interchange import from_state_dict, load_pruned, save_pruned
from sparse_adv.masks.pruning import Score, prune
from sparse_adv.masks.ticket import Ticket, load_ticket, save_ticket

__all__ = [
    "SUPPORTED_BLOCKS",
    "ChannelOrder",
    "Score",
    "Ticket",
    "density",
    "distance",
    "from_state_dict",
    "gather_channels",
    "largest_block",
    "load_pruned",
    "load_ticket",
    "multiply_add_density",
    "prune",
    "save_pruned",
    "save_ticket",
]
