"""Reads masks and weights from the files of other tools, and writes them in two of their formats.

`formats.py` lists the formats; each is recognised by the keys of its state dict.
"""

from sparse_adv.masks.interchange.formats import FORMATS
from sparse_adv.masks.interchange.reading import from_state_dict, load_pruned
from sparse_adv.masks.interchange.writing import save_pruned

__all__ = ["FORMATS", "from_state_dict", "load_pruned", "save_pruned"]
