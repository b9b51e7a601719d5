"""Density, distance and multiply-add density of masks."""

import pytest
import torch
from torch import nn

from sparse_adv.masks import density, distance, multiply_add_density


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


def test_multiply_adds_of_a_convolution_count_once_per_output_pixel():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1))
    masks = {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool), "1": torch.zeros(8, 8, 3, 3, dtype=torch.bool)}
    masks["0"][:2] = True
    masks["1"][:1] = True
    kept = 64 * 2 * 27 + 16 * 72 + 16 * 32
    dense = 64 * 8 * 27 + 16 * 8 * 72 + 16 * 32
    assert multiply_add_density(model, masks, (1, 3, 8, 8)) == kept / dense
    assert multiply_add_density(model, masks, (3, 3, 8, 8)) == kept / dense


def test_multiply_adds_of_a_linear_layer_count_once_per_row_of_its_input():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Flatten(), nn.Linear(256, 2))  # rows: 64, then 1
    masks = {"1": torch.zeros(4, 8, dtype=torch.bool), "3": torch.zeros(2, 256, dtype=torch.bool)}
    masks["1"][:1] = masks["3"][:1] = True
    kept = 64 * 24 + 64 * 8 + 256
    dense = 64 * 24 + 64 * 32 + 512
    assert multiply_add_density(model, masks, (1, 3, 8, 8)) == kept / dense
    with pytest.raises(ValueError, match="model runs no convolution and no linear layer"):
        multiply_add_density(nn.ReLU(), {}, (1, 3, 8, 8))


def test_multiply_add_density_raises_for_an_unknown_layer_or_an_invalid_shape():
    with pytest.raises(ValueError, match="model has no module '9'"):
        multiply_add_density(nn.Conv2d(3, 4, 3), {"9": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, (1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"shape must be 4 positive integers .*got \(3, 8\)"):
        multiply_add_density(nn.Conv2d(3, 4, 3), {}, (3, 8))
