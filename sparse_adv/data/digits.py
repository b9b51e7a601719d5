"""The handwritten digits included in scikit-learn: 1797 grey images of 8 x 8 pixels, no download."""

from __future__ import annotations

import torch

from sparse_adv.data.dataset import RawDataset, Split, hold_out

_TEST_IMAGES = 300


def read_digits() -> RawDataset:
    """Read the digits: 1497 training images and 300 test images; the test images are the same in every run.

    Pixel values 0 to 16 become 0 to 255. With the usual eps of 8/255 even a network trained without attack is robust
    on these images; eps 0.2 makes robustness a real task.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the digits are part of scikit-learn: pip install "sparse_adv[demo]"') from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    train, test = hold_out(Split(images, torch.from_numpy(labels).long()), _TEST_IMAGES)
    return RawDataset(train, test, 10, "digits")
