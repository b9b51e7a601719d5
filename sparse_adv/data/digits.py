"""Scikit-learn's bundled handwritten digits: 1797 real images of 1 x 8 x 8 pixels, no download."""

from __future__ import annotations

import torch

from sparse_adv.data.dataset import Split, hold_out
from sparse_adv.data.source import Source

TEST = 300


def read_digits() -> Source:
    """All digits but 300, and 300 for the test, which are the same whatever the seed of a run.

    Pixels of 0 to 16 become 0 to 255. At eps 8/255 even natural training is robust here; eps 0.2 makes a task of it.

    Raises:
        ModuleNotFoundError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the digits come with scikit-learn: pip install "sparse_adv[demo]"') from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).mul(255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    train, test = hold_out(Split(images, torch.from_numpy(classes).long()), TEST)
    return Source(train, test, 10, "digits")
