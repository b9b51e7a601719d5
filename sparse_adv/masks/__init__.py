"""Masks say which weights of a model are kept: made from scores, read from and written to files.

A mask is a bool tensor of the weight's shape, `[K, C/groups, R, S]` for a convolution or `[K, C]` for a linear layer,
true = the weight is kept. The masks of a model are a dict keyed by module name.
"""

from sparse_adv.masks.algebra import density, distance
from sparse_adv.masks.blocks import SUPPORTED_BLOCKS, largest_block
from sparse_adv.masks.channel_permutation import ChannelPermutation, permute_channels
from sparse_adv.masks.dependency_graph import DependencyGroup, dependency_groups
from sparse_adv.masks.interchange import from_state_dict, load_pruned, save_pruned
from sparse_adv.masks.pruning import Score, prune
from sparse_adv.masks.ticket import Ticket, load_ticket, save_ticket

__all__ = [
    "SUPPORTED_BLOCKS",
    "ChannelPermutation",
    "DependencyGroup",
    "Score",
    "Ticket",
    "density",
    "dependency_groups",
    "distance",
    "from_state_dict",
    "largest_block",
    "load_pruned",
    "load_ticket",
    "permute_channels",
    "prune",
    "save_pruned",
    "save_ticket",
]
