"""Density and distance of masks."""

import pytest
import torch
from torch import nn

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


def test_masks_of_another_model_are_refused():
    model = nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"module '0': mask has shape \(2, 3\), weight has shape \(2, 4\)"):
        density({"0": torch.ones(2, 3, dtype=torch.bool)}, model)
    with pytest.raises(ValueError, match="model has no module '00'"):
        density({"00": torch.ones(2, 4, dtype=torch.bool)}, model)
