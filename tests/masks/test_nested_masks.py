"""`prune(within=)`: no mask keeps what an earlier one pruned, whatever the scores, blocks and groups."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_adv.masks import prune
from sparse_adv.models import build
from sparse_adv.nn import sparsify


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=3),
    block=st.sampled_from([(1, 1), (2, 2), (4, 4), (4, 1, 3, 3)]),
    scope=st.sampled_from(["global", "uniform"]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_later_masks_keep_no_weight_that_earlier_ones_prune(shapes, block, scope, shares, zeros, seed):
    draw = torch.Generator().manual_seed(seed)
    model = nn.ModuleList(nn.Conv2d(c, k, r) for k, c, r in shapes)
    for layer in model:  # whose kept weights may be 0 as well
        nn.init.normal_(layer.weight, generator=draw)
        layer.weight.data[torch.rand(layer.weight.shape, generator=draw) < zeros] = 0
    first = prune(model, max(shares), block, scope=scope)
    second = prune(
        model, min(shares), block, scope=scope, within=first, score=lambda name, weight: weight.abs().flip(0)
    )
    assert all((first[name] | ~second[name]).all() for name in first)
    each = [second] if scope == "global" else [{name: mask} for name, mask in second.items()]
    for part in each:
        wanted = min(shares) * sum(mask.numel() for mask in part.values())
        available = sum(int(first[name].sum()) for name in part)
        kept = sum(int(mask.sum()) for mask in part.values())
        assert abs(kept - min(wanted, available)) <= torch.Size(block).numel() * (9 if len(block) == 2 else 1) / 2 + 1
        sparsify(nn.ModuleList(copy.deepcopy(list(model))), second, block=block if len(block) == 2 else None)


def test_filters_that_are_joined_stay_pruned_together():
    model = build("resnet18", width=4)
    first = prune(model, 0.5, "filter", example_input=(1, 3, 32, 32))
    second = prune(
        model,
        0.3,
        "filter",
        example_input=(1, 3, 32, 32),
        within=first,
        score=lambda name, weight: torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)),
    )
    assert all((first[name] | ~second[name]).all() for name in first)
    assert second["conv1"].flatten(1).any(1).equal(second["layer1.0.conv2"].flatten(1).any(1))


def test_earlier_masks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"within: the mask of '0' must have shape \(4, 1, 3, 3\), got \(4, 3\)"):
        prune(nn.Sequential(nn.Conv2d(1, 4, 3)), within={"0": torch.ones(4, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        prune(nn.Sequential(nn.Conv2d(1, 4, 3)), within={"0": torch.ones(4, 1, 3, 3)})


def test_names_of_earlier_masks_are_those_of_modules():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    earlier = {"0": torch.ones(4, 1, 3, 3, dtype=torch.bool), "2": torch.ones(2, 16, dtype=torch.bool)}
    assert list(prune(model, within=earlier)) == ["0"]  # "2" is no candidate
    with pytest.raises(ValueError, match="within: model has no module '00'"):
        prune(model, within={"00": earlier["0"]})
