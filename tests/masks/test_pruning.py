import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_adv import masks
from sparse_adv import nn as masked
from sparse_adv.masks import SUPPORTED_BLOCKS, density, distance, largest_block, multiply_add_density, prune
from sparse_adv.models import build
from sparse_adv.ops.masked_conv2d_mask import obeys

SCOPES = ("global", "uniform", "erk")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(16, 18, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(18, 4),
    )


def counts(found):
    return {name: int(mask.sum()) for name, mask in found.items()}


def test_every_convolution_and_nothing_else_gets_a_mask():
    model = network()
    found = prune(model, 0.5)
    assert list(found) == ["0", "3", "4"]
    assert all(mask.dtype == torch.bool and mask.shape == model[int(n)].weight.shape for n, mask in found.items())


def test_linear_layers_are_candidates_when_asked():
    model = network()
    found = prune(model, 0.5, linear=True)
    assert list(found) == ["0", "3", "4", "7"]
    assert found["7"].dtype == torch.bool and found["7"].shape == (4, 18)
    assert list(prune(model, 0.5, linear=True, exclude=["7"])) == ["0", "3", "4"]
    # One ranking of all.
    kept = torch.cat([model[int(n)].weight[mask].abs() for n, mask in found.items()])
    pruned = torch.cat([model[int(n)].weight[~mask].abs() for n, mask in found.items()])
    assert kept.min() > pruned.max() and len(kept) == round(0.5 * (len(kept) + len(pruned)))


def test_an_attentions_projection_is_no_candidate():
    assert list(prune(nn.TransformerEncoderLayer(8, 2, 16), 0.5, linear=True)) == ["linear1", "linear2"]


def test_excluded_layers_get_no_mask():
    assert list(prune(network(), 0.5, exclude=["0"])) == ["3", "4"]


@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 1 / 3, 0.97, 1.0])
def test_the_number_of_kept_weights_is_exact(share):
    shapes = {name: mask.numel() for name, mask in prune(network(), 1).items()}
    assert sum(counts(prune(network(), share, scope="global")).values()) == round(share * sum(shapes.values()))
    assert counts(prune(network(), share, scope="uniform")) == {n: round(share * size) for n, size in shapes.items()}
    assert abs(sum(counts(prune(network(), share, scope="erk")).values()) - share * sum(shapes.values())) <= len(shapes)


def test_magnitude_keeps_the_largest_weights_of_all_layers():
    model = network()
    found = prune(model, 0.2)
    kept = torch.cat([model[int(n)].weight[mask].abs() for n, mask in found.items()])
    pruned = torch.cat([model[int(n)].weight[~mask].abs() for n, mask in found.items()])
    assert kept.min() > pruned.max()


def test_relative_magnitude_does_not_see_the_scale_of_a_layer():
    model = network()
    before = prune(model, 0.3, score="relative_magnitude")
    with torch.no_grad():
        model[0].weight.mul_(1024)
    after = prune(model, 0.3, score="relative_magnitude")
    assert distance(before, after) == 0
    assert distance(prune(model, 0.3), before) > 0


def test_relative_magnitude_divides_by_the_layers_mean():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 10.0]).reshape(4, 1, 1, 1))  # over the mean 4: 2.5 at most
        model[1].weight.copy_(torch.tensor([0.1, 0.1, 0.1, 0.9]).reshape(1, 4, 1, 1))  # over the mean 0.3: 3
    found = prune(model, 1 / 8, score="relative_magnitude")
    assert counts(found) == {"0": 0, "1": 1}
    assert found["1"][0, 3]


def test_erdos_renyi_densities_follow_the_formula():
    found = prune(network(), 0.25, scope="erk")
    shapes = {n: mask.shape for n, mask in found.items()}
    scale = 0.25 * sum(shape.numel() for shape in shapes.values()) / sum(sum(shape) for shape in shapes.values())
    assert counts(found) == {n: round(scale * sum(shape)) for n, shape in shapes.items()}


def test_erdos_renyi_counts_a_linear_layer_without_filter_sizes():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(20, 30), nn.Linear(30, 40))
    scale = 0.2 * (288 + 600 + 1200) / (18 + 50 + 70)
    expected = {"0": round(scale * 18), "1": round(scale * 50), "2": round(scale * 70)}
    assert counts(prune(model, 0.2, scope="erk", linear=True)) == expected


def test_layers_that_erdos_renyi_would_overfill_are_whole_and_the_rest_is_redistributed():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3))  # 4, 1152, 9216 weights
    left = 0.1 * 10372 - 4
    assert counts(prune(model, 0.1, scope="erk")) == {"0": 4, "1": round(left * 42 / 112), "2": round(left * 70 / 112)}
    assert counts(prune(model, 0.4, scope="erk")) == {"0": 4, "1": 1152, "2": round(0.4 * 10372 - 4 - 1152)}


@settings(deadline=None, max_examples=60)
@given(
    scope=st.sampled_from(SCOPES),
    share=st.floats(0, 1),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
)
def test_masks_obey_their_block_and_come_as_near_the_density_as_blocks_allow(scope, share, block):
    found = prune(network(), share, block, scope, linear=True)
    assert all(obeys(mask, block) for mask in found.values())
    groups = [found] if scope == "global" else [{n: mask} for n, mask in found.items()]
    for group in groups if scope != "erk" else []:
        total = sum(mask.numel() for mask in group.values())
        assert abs(sum(counts(group).values()) - share * total) <= math.prod(block) / 2 + 0.5


def test_a_block_scores_the_mean_square_so_that_edge_blocks_are_not_at_a_disadvantage():
    conv = nn.Conv2d(1, 5, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, 1.0, 3.0, 0.0, 2.2]).reshape(5, 1, 1, 1))  # blocks of 2: 1, 4.5, 4.84
    mask = prune(conv, 0.2, (2, 1))[""]
    assert mask.flatten().tolist() == [False, False, False, False, True]


def test_equal_scores_keep_the_first():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    found = prune(model, 5 / 8)
    assert [found[n].flatten().tolist() for n in "01"] == [[True] * 4, [True, False, False, False]]


def test_a_function_scores_by_name_and_weight():
    seen = {}

    def score(name, weight):
        seen[name] = weight
        return torch.arange(weight.numel()).reshape(weight.shape)

    model = network()
    mask = prune(model, 0.5, scope="uniform", score=score)["4"]
    assert mask.flatten().tolist() == [False] * 144 + [True] * 144
    assert list(seen) == ["0", "3", "4"] and not seen["0"].requires_grad


def test_pruning_a_sparse_model_keeps_a_subset():
    model = network()
    first = prune(model, 0.4)
    masked.sparsify(model, first)
    second = prune(model, 0.2)
    assert density(second) == pytest.approx(0.2, abs=1e-3)
    assert all((first[n] | ~second[n]).all() for n in first)


def test_a_tied_weight_counts_once_and_gets_one_mask():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    found = prune(model, 0.5)
    assert torch.equal(found["0"], found["2"])
    assert int(found["0"].sum() + found["1"].sum()) == 144


def test_a_layer_left_without_weights_is_reported(caplog):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    prune(model, 0.1)
    assert "keeps no weight of '0'" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"density": float("nan")}, r"density must be a number in \[0, 1\], got nan"),
        ({"density": "half"}, r"density must be a number in \[0, 1\], got 'half'"),
        ({"scope": "local"}, "scope must be one of global, uniform, erk, got 'local'"),
        ({"score": "size"}, "score must be a function or one of magnitude, relative_magnitude, got 'size'"),
        ({"block": (0, 1)}, r"block must be .* got \(0, 1\)"),
        ({"exclude": ["00"]}, "exclude: model has no module '00'; did you mean '0'?"),
        ({"score": lambda name, w: w.new_full(w.shape, float("nan"))}, "score of '0' is NaN in 324 places"),
        ({"score": lambda name, w: -w.abs() - 1}, "score of '0' must not be negative, got -1"),
        ({"score": lambda name, w: w.sum()}, r"score of '0' must be a tensor of the weight's shape .*got shape \(\)"),
        ({"score": lambda name, w: 3}, "score of '0' must be a tensor .* got int"),
    ],
)
def test_bad_arguments_are_refused_with_their_value(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        prune(network(), **arguments)


def test_density_and_distance():
    a = {"x": torch.tensor([True, False, False, False]), "y": torch.tensor([True])}
    b = {"x": torch.tensor([False, True, False, False]), "y": torch.tensor([True])}
    assert density(a) == 2 / 5
    assert distance(a, b) == 2 / 5
    assert distance(a, a) == 0
    with pytest.raises(ValueError, match="masks of 'y' differ in shape"):
        distance(a, b | {"y": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"only one of them has \['y'\]"):
        distance(a, {"x": b["x"]})
    with pytest.raises(ValueError, match="at least one element"):
        density({})


def test_multiply_adds_weigh_each_layer_by_its_pixels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1))
    found = {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool), "1": torch.zeros(8, 8, 3, 3, dtype=torch.bool)}
    found["0"][:2] = True
    found["1"][:1] = True
    kept = 64 * 2 * 27 + 16 * 72 + 16 * 32
    dense = 64 * 8 * 27 + 16 * 8 * 72 + 16 * 32
    assert multiply_add_density(model, found, (1, 3, 8, 8)) == kept / dense
    assert multiply_add_density(model, found, (3, 3, 8, 8)) == kept / dense


def test_multiply_adds_of_a_linear_layer_count_once_per_row_of_its_input():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Flatten(), nn.Linear(256, 2))  # rows: 64, then 1
    found = {"1": torch.zeros(4, 8, dtype=torch.bool), "3": torch.zeros(2, 256, dtype=torch.bool)}
    found["1"][:1] = found["3"][:1] = True
    kept = 64 * 24 + 64 * 8 + 256
    dense = 64 * 24 + 64 * 32 + 512
    assert multiply_add_density(model, found, (1, 3, 8, 8)) == kept / dense
    with pytest.raises(ValueError, match="model runs no convolution and no linear layer"):
        multiply_add_density(nn.ReLU(), {}, (1, 3, 8, 8))


def test_counting_multiply_adds_leaves_model_and_random_numbers_alone():
    model = network().train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    multiply_add_density(model, prune(model, 0.5), (2, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model] == [True, False] + [True] * 6
    assert not any(m._forward_hooks for m in model)


def test_multiply_adds_of_an_unknown_layer_or_shape_are_refused():
    with pytest.raises(ValueError, match="model has no module '9'"):
        multiply_add_density(network(), {"9": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, (1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"shape must be 4 positive integers .*got \(3, 8\)"):
        multiply_add_density(network(), {}, (3, 8))


@pytest.mark.parametrize("block", [b for b in SUPPORTED_BLOCKS if "S" not in b])
def test_the_largest_block_of_a_mask_is_found(block):
    mask = prune(nn.Conv2d(128, 128, 3), 0.5, block)[""]
    assert largest_block(mask) == (*block, 1, 1)


def test_kernel_and_row_blocks_take_their_size_from_the_filter():
    assert largest_block(prune(nn.Conv2d(9, 8, 3), 0.5, (1, 1, 3, 3))[""]) == (1, 1, 3, 3)
    assert largest_block(prune(nn.Conv2d(9, 8, 5), 0.5, (1, 1, 1, 5))[""]) == (1, 1, 1, 5)
    assert largest_block(prune(nn.Conv2d(16, 16, 3), 0.5)[""], candidates=[(4, 4)]) == (1, 1, 1, 1)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (8, 8)])
def test_a_linear_layers_mask_has_a_largest_block_too(block):
    assert largest_block(prune(nn.Linear(40, 48), 0.5, block, linear=True)[""]) == (*block, 1, 1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("block", "dim"), [("filter", 0), ("channel", 1)])
def test_whole_filters_and_channels_share_their_fate(block, dim, scope):
    for name, mask in prune(network(), 0.5, block, scope).items():
        channels = mask.transpose(0, dim).flatten(1)
        assert torch.equal(channels.any(1), channels.all(1)), name


def test_the_filters_with_the_largest_mean_square_are_kept():
    conv = nn.Conv2d(3, 8, 3)
    mask = prune(conv, 0.5, "filter")[""]
    expected = conv.weight.detach().square().mean((1, 2, 3)).topk(4).indices
    assert mask[expected].all() and int(mask.sum()) == 4 * 27


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18", width=8)


@pytest.mark.parametrize("scope", SCOPES)
def test_filters_that_meet_in_a_residual_sum_share_their_fate_if_coupled(scope):
    model, shape = residual_network(), (1, 3, 32, 32)
    found = prune(model, 0.5, "filter", scope, couple=shape)
    rows = {name: mask.flatten(1).any(1) for name, mask in found.items()}
    assert rows["conv1"].equal(rows["layer1.0.conv2"]) and rows["conv1"].equal(rows["layer1.1.conv2"])
    alone = prune(model, 0.5, "filter", scope)
    assert not alone["conv1"].equal(alone["layer1.0.conv2"])
    kept = sum(int(mask.sum()) for mask in found.values()) / sum(mask.numel() for mask in found.values())
    assert abs(kept - 0.5) < 0.02


def test_where_nothing_is_summed_coupling_changes_nothing():
    model = network()
    apart, coupled = prune(model, 0.5, "filter"), prune(model, 0.5, "filter", couple=(1, 3, 8, 8))
    assert all(apart[name].equal(coupled[name]) for name in apart)


def test_unknown_structures_and_coupled_blocks_are_refused():
    with pytest.raises(ValueError, match="block must be a block shape or one of filter, channel, got 'row'"):
        prune(network(), 0.5, "row")
    with pytest.raises(ValueError, match=r'couple needs block="filter", got block=\(1, 1, 1, 1\)'):
        prune(network(), 0.5, couple=(1, 3, 8, 8))


def test_masks_are_exported():
    assert masks.prune is prune
