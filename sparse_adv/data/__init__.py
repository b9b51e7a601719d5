"""Data sets as uint8 tensors in memory, divided into train, validation and test, and their batches.

Using this package is optional: `training.train` takes any iterable of batches (float images in [0, 1], int64 labels),
for example a DataLoader, and evaluations also take a `Split` of your own tensors.
"""

from sparse_adv.data.batches import Batches, crop_and_flip, to_unit
from sparse_adv.data.dataset import Dataset, Split, hold_out, stratified
from sparse_adv.data.loading import load

__all__ = ["Batches", "Dataset", "Split", "crop_and_flip", "hold_out", "load", "stratified", "to_unit"]
