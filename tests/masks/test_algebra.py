"""Density and distance of masks."""

import pytest
import torch

from sparse_adv.masks import density, distance


def test_density_and_distance():
    a = {"x": torch.tensor([True, False, False, False]), "y": torch.tensor([True])}
    b = {"x": torch.tensor([False, True, False, False]), "y": torch.tensor([True])}
    assert density(a) == 2 / 5
    assert distance(a, b) == 2 / 5
    assert distance(a, a) == 0
    with pytest.raises(ValueError, match="the masks of 'y' must have the same shape"):
        distance(a, b | {"y": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"only one of them has \['y'\]"):
        distance(a, {"x": b["x"]})
    with pytest.raises(ValueError, match="at least one element"):
        density({})
