"""Masks and weights as other tools write them: read from any of their files, written so that they can read them.

`formats.py` is the list of formats; each is recognised by its keys.
"""

from sparse_adv.masks.interchange.formats import FORMATS
from sparse_adv.masks.interchange.reading import from_state_dict, load_pruned
from sparse_adv.masks.interchange.writing import save_pruned

__all__ = ["FORMATS", "from_state_dict", "load_pruned", "save_pruned"]
