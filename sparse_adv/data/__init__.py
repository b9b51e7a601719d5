"""Data sets as tensors: uint8 images on the device, split into train, validation and test.

Own data need none of this: `training.train` takes any batches of (float images in [0, 1], int64 labels) that can be
gone through once an epoch, and evaluations take a `Split` of uint8 or float images.
"""

from sparse_adv.data.augmentation import crop_and_flip
from sparse_adv.data.batches import Batches, to_unit
from sparse_adv.data.dataset import Dataset, Split, hold_out
from sparse_adv.data.loading import load

__all__ = ["Batches", "Dataset", "Split", "crop_and_flip", "hold_out", "load", "to_unit"]
