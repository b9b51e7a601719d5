"""Stride, padding and dilation that code sets on a layer after it was made, as on those of a network to adapt."""

import copy

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn

from sparse_adv import attacks
from sparse_adv.engine import fuse_for_training
from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, sparsify

CHANGES = [
    {"padding": (1, 2)},
    {"padding": 1},
    {"padding": "same"},
    {"dilation": (2, 2), "padding": (2, 2)},
    {"dilation": 2},
    {"stride": 2, "padding": (1, 1)},
]


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_counts_as_on_a_dense_layer(changes, when):
    conv = nn.Conv2d(8, 12, 3)
    mask = prune(conv, 0.4)[""]
    for name, value in changes.items() if when == "before" else ():
        setattr(conv, name, value)
    layer = MaskedConv2d.from_dense(copy.deepcopy(conv), mask)
    for name, value in changes.items() if when == "after" else ():
        setattr(conv, name, value)
        setattr(layer, name, value)
    with torch.no_grad():
        conv.weight.masked_fill_(~mask, 0)
    x = torch.rand(2, 8, 9, 11)
    assert_close(layer(x), conv(x))
    assert layer.plan(x).forward.macs > 0


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("density", [1.0, 0.3])
def test_attacks_and_training_compute_with_it(changes, density):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)).eval()
    for name, value in changes.items():
        setattr(model[3], name, value)
    dense = copy.deepcopy(model)
    if density < 1:
        kept = prune(model, density)
        sparsify(model, kept)
        with torch.no_grad():
            for name, mask in kept.items():
                dense.get_submodule(name).weight.masked_fill_(~mask, 0)
    x, y = torch.rand(64, 3, 16, 16), torch.randint(5, (64,))
    options = {"eps": 0.1, "steps": 1, "alpha": 0.1, "random_start": False}
    found = [attacks.pgd(each, x, y, **options, engine=each is model) for each in (model, dense)]
    assert (found[0] != found[1]).float().mean() < 1e-3  # signs of gradients near 0
    logits = [fuse_for_training(model.train(), x)(x), dense.train()(x)]
    assert_close(*logits)
