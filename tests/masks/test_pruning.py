"""`prune`: which weights each scope, score and block shape keeps."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_adv.masks import density, distance, prune
from sparse_adv.models import build
from sparse_adv.nn import sparsify
from sparse_adv.ops.masked_conv2d_mask import obeys

SCOPES = ("global", "uniform", "erk", "igq")


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


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_all_convolutions_and_no_other_layers_get_a_mask():
    model = network()
    masks = prune(model, 0.5)
    assert list(masks) == ["0", "3", "4"]
    assert all(mask.dtype == torch.bool and mask.shape == model[int(n)].weight.shape for n, mask in masks.items())


def test_with_linear_true_linear_layers_are_ranked_with_the_convolutions():
    model = network()
    masks = prune(model, 0.5, linear=True)
    assert list(masks) == ["0", "3", "4", "7"]
    assert masks["7"].dtype == torch.bool and masks["7"].shape == (4, 18)
    assert list(prune(model, 0.5, linear=True, exclude=["7"])) == ["0", "3", "4"]
    kept = torch.cat([model[int(n)].weight[mask].abs() for n, mask in masks.items()])
    pruned = torch.cat([model[int(n)].weight[~mask].abs() for n, mask in masks.items()])
    assert kept.min() > pruned.max() and len(kept) == round(0.5 * (len(kept) + len(pruned)))


def test_the_output_projection_of_an_attention_is_not_pruned():
    assert list(prune(nn.TransformerEncoderLayer(8, 2, 16), 0.5, linear=True)) == ["linear1", "linear2"]


def test_excluded_layers_get_no_mask():
    assert list(prune(network(), 0.5, exclude=["0"])) == ["3", "4"]


def test_linear_layers_can_be_excluded_whether_or_not_they_would_be_pruned():
    model = network()
    assert list(prune(model, 0.5, exclude=["0", "7"])) == ["3", "4"]
    assert list(prune(model, 0.5, exclude=["0", "7"], linear=True)) == ["3", "4"]


def test_a_layer_is_excluded_under_each_of_its_names():
    conv = nn.Conv2d(2, 2, 1)
    model = nn.ModuleDict({"first": conv, "second": conv, "other": nn.Conv2d(2, 2, 1)})
    assert all(list(prune(model, 0.5, exclude=[name])) == ["other"] for name in ("first", "second"))


@pytest.mark.parametrize("share", [0.0, 0.003, 0.1, 1 / 3, 0.97, 1.0])
def test_the_number_of_weights_kept_is_exact(share):
    shapes = {name: mask.numel() for name, mask in prune(network(), 1).items()}
    assert sum(counts(prune(network(), share, scope="global")).values()) == round(share * sum(shapes.values()))
    assert counts(prune(network(), share, scope="uniform")) == {n: round(share * size) for n, size in shapes.items()}
    assert abs(sum(counts(prune(network(), share, scope="erk")).values()) - share * sum(shapes.values())) <= len(shapes)


def test_magnitude_keeps_the_largest_weights_of_all_layers():
    model = network()
    masks = prune(model, 0.2)
    kept = torch.cat([model[int(n)].weight[mask].abs() for n, mask in masks.items()])
    pruned = torch.cat([model[int(n)].weight[~mask].abs() for n, mask in masks.items()])
    assert kept.min() > pruned.max()


def test_relative_magnitude_does_not_depend_on_the_scale_of_a_layer():
    model = network()
    before = prune(model, 0.3, score="relative_magnitude")
    with torch.no_grad():
        model[0].weight.mul_(1024)
    after = prune(model, 0.3, score="relative_magnitude")
    assert distance(before, after) == 0
    assert distance(prune(model, 0.3), before) > 0


def test_relative_magnitude_divides_by_the_mean_magnitude_of_the_layer():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 10.0]).reshape(4, 1, 1, 1))  # mean 4: at most 2.5
        model[1].weight.copy_(torch.tensor([0.1, 0.1, 0.1, 0.9]).reshape(1, 4, 1, 1))  # mean 0.3: at most 3
    masks = prune(model, 1 / 8, score="relative_magnitude")
    assert counts(masks) == {"0": 0, "1": 1}
    assert masks["1"][0, 3]


def test_erk_densities_follow_the_formula():
    masks = prune(network(), 0.25, scope="erk")
    shapes = {n: mask.shape for n, mask in masks.items()}
    scale = 0.25 * sum(shape.numel() for shape in shapes.values()) / sum(sum(shape) for shape in shapes.values())
    assert counts(masks) == {n: round(scale * sum(shape)) for n, shape in shapes.items()}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("scope", SCOPES)
def test_a_layer_without_weights_keeps_none(scope):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(0, 5))
    assert counts(prune(model, 0.5, scope=scope, linear=True)) == {"0": 18, "2": 0}


def test_erk_uses_the_formula_without_filter_size_for_linear_layers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(20, 30), nn.Linear(30, 40))
    scale = 0.2 * (288 + 600 + 1200) / (18 + 50 + 70)
    expected = {"0": round(scale * 18), "1": round(scale * 50), "2": round(scale * 70)}
    assert counts(prune(model, 0.2, scope="erk", linear=True)) == expected


def test_erk_keeps_layers_whole_whose_density_would_exceed_1_and_redistributes_the_rest():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 32, 3), nn.Conv2d(32, 32, 3))  # 4, 1152, 9216 weights
    left = 0.1 * 10372 - 4
    assert counts(prune(model, 0.1, scope="erk")) == {"0": 4, "1": round(left * 42 / 112), "2": round(left * 70 / 112)}
    assert counts(prune(model, 0.4, scope="erk")) == {"0": 4, "1": 1152, "2": round(0.4 * 10372 - 4 - 1152)}


@settings(deadline=None, max_examples=60)
@given(share=st.floats(0, 1))
def test_igq_gives_all_layers_one_force_and_keeps_the_total_density(share):
    masks = prune(network(), share, scope="igq", linear=True)
    kept, sizes = counts(masks), {n: mask.numel() for n, mask in masks.items()}
    assert sum(kept.values()) == pytest.approx(share * sum(sizes.values()), abs=len(kept))
    # Kept n / (1 + f n) of n weights, so that 1 / kept - 1 / n is the same f, up to rounding, in all layers.
    lowest, highest = (
        [1 / (kept[n] + half) - 1 / sizes[n] for n in kept if kept[n] + half > 0] for half in (0.5001, -0.5001)
    )
    assert max(lowest) <= min(highest, default=float("inf"))


@settings(deadline=None, max_examples=60)
@given(
    scope=st.sampled_from(SCOPES),
    share=st.floats(0, 1),
    block=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4)),
)
def test_masks_obey_their_block_and_are_as_near_the_density_as_blocks_allow(scope, share, block):
    masks = prune(network(), share, block, scope=scope, linear=True)
    assert all(obeys(mask, block) for mask in masks.values())
    groups = [masks] if scope == "global" else [{n: mask} for n, mask in masks.items()]
    for group in groups if scope in ("global", "uniform") else []:
        total = sum(mask.numel() for mask in group.values())
        assert abs(sum(counts(group).values()) - share * total) <= math.prod(block) / 2 + 0.5


def test_blocks_are_ranked_by_mean_square_so_that_small_edge_blocks_have_no_disadvantage():
    conv = nn.Conv2d(1, 5, 1)
    with torch.no_grad():
        conv.weight.copy_(
            torch.tensor([1.0, 1.0, 3.0, 0.0, 2.2]).reshape(5, 1, 1, 1)
        )  # mean squares of blocks of 2: 1, 4.5, 4.84
    mask = prune(conv, 0.2, (2, 1))[""]
    assert mask.flatten().tolist() == [False, False, False, False, True]


def test_of_equal_scores_the_first_is_kept():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        for layer in model:
            layer.weight.fill_(0.5)
    masks = prune(model, 5 / 8)
    assert [masks[n].flatten().tolist() for n in "01"] == [[True] * 4, [True, False, False, False]]


def test_a_score_function_gets_module_name_and_weight():
    seen = {}

    def score(name, weight):
        seen[name] = weight
        return torch.arange(weight.numel()).reshape(weight.shape)

    model = network()
    mask = prune(model, 0.5, scope="uniform", score=score)["4"]
    assert mask.flatten().tolist() == [False] * 144 + [True] * 144
    assert list(seen) == ["0", "3", "4"] and not seen["0"].requires_grad


def test_pruning_a_sparse_model_keeps_a_subset_of_its_weights():
    model = network()
    first = prune(model, 0.4)
    sparsify(model, first)
    second = prune(model, 0.2)
    assert density(second) == pytest.approx(0.2, abs=1e-3)
    assert all((first[n] | ~second[n]).all() for n in first)


def test_a_shared_weight_counts_once_and_all_its_layers_get_the_same_mask():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[2].weight = model[0].weight
    masks = prune(model, 0.5)
    assert torch.equal(masks["0"], masks["2"])
    assert int(masks["0"].sum() + masks["1"].sum()) == 144


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"density": float("nan")}, r"density must be a number in \[0, 1\], got nan"),
        ({"density": "half"}, r"density must be a number in \[0, 1\], got 'half'"),
        ({"scope": "local"}, "scope must be one of global, uniform, erk, igq, got 'local'"),
        ({"score": "size"}, "score must be a function or one of magnitude, relative_magnitude, got 'size'"),
        ({"block": (0, 1)}, r"block must be .* got \(0, 1\)"),
        ({"exclude": ["00"]}, "exclude: model has no module '00'; did you mean '0'?"),
        ({"exclude": ["1"]}, "exclude must name convolutions and linear layers, got '1', a BatchNorm2d"),
        (
            {"score": lambda name, w: w.new_full(w.shape, float("nan"))},
            "score of '0' must not be NaN, got 324 NaN values",
        ),
        ({"score": lambda name, w: -w.abs() - 1}, "score of '0' must not be negative, got -1"),
        ({"score": lambda name, w: w.to(torch.complex64)}, "score of '0' must be real, got torch.complex64"),
        ({"score": lambda name, w: w.sum()}, r"score of '0' must be a tensor of the weight's shape .*got shape \(\)"),
        ({"score": lambda name, w: 3}, "score of '0' must be a tensor .* got int"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(network(), **arguments)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("block", "dim"), [("filter", 1), ("channel", 2)])
def test_filters_and_channels_are_kept_or_pruned_as_a_whole(block, dim, scope):
    model = network()
    for name, mask in prune(model, 0.5, block, scope=scope).items():
        by_group = mask.unflatten(0, (getattr(model.get_submodule(name), "groups", 1), -1))
        channels = by_group.transpose(1, dim).flatten(2)
        assert torch.equal(channels.any(2), channels.all(2)), name


@pytest.mark.parametrize(("channels", "filters", "groups"), [(16, 16, 16), (8, 16, 8), (8, 12, 2), (6, 4, 1)])
def test_the_channels_kept_have_the_largest_mean_square_in_the_filters_that_read_them(channels, filters, groups):
    conv = nn.Conv2d(channels, filters, 3, groups=groups)

    def by_channel(values):
        return values.unflatten(0, (groups, -1)).transpose(1, 2).reshape(channels, -1)

    kept = by_channel(prune(conv, 0.5, "channel")[""]).all(1)
    best = by_channel(conv.weight.detach().square()).mean(1).topk(channels // 2).indices
    assert kept.nonzero().flatten().equal(best.sort().values)


def test_the_filters_with_the_largest_mean_square_are_kept():
    conv = nn.Conv2d(3, 8, 3)
    mask = prune(conv, 0.5, "filter")[""]
    expected = conv.weight.detach().square().mean((1, 2, 3)).topk(4).indices
    assert mask[expected].all() and int(mask.sum()) == 4 * 27


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet18", width=8)


@pytest.mark.parametrize("scope", SCOPES)
def test_with_example_input_filters_joined_by_a_residual_sum_are_pruned_together(scope):
    model, shape = residual_network(), (1, 3, 32, 32)
    masks = prune(model, 0.5, "filter", scope=scope, example_input=shape)
    rows = {name: mask.flatten(1).any(1) for name, mask in masks.items()}
    assert rows["conv1"].equal(rows["layer1.0.conv2"]) and rows["conv1"].equal(rows["layer1.1.conv2"])
    alone = prune(model, 0.5, "filter", scope=scope)
    assert not alone["conv1"].equal(alone["layer1.0.conv2"])
    kept = sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert abs(kept - 0.5) < 0.02


def test_filters_of_groups_and_of_single_layers_are_ranked_by_the_mean_square_of_all_their_weights():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.narrow, self.last = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(3, 24, 1), nn.Conv2d(24, 9, 1)

        def forward(self, x):
            return self.last((self.wide(x) + self.narrow(x)).relu())

    torch.manual_seed(0)
    model = Sum()
    with torch.no_grad():
        model.wide.weight.mul_(0.5 + torch.rand(24, 1, 1, 1))
        model.narrow.weight.mul_(torch.rand(24, 1, 1, 1))
        model.last.weight.mul_(0.5 + 2 * torch.rand(9, 1, 1, 1))
    masks = prune(model, 0.5, "filter", example_input=(1, 3, 6, 6))
    joint, narrow, last = (masks[name].flatten(1).any(1) for name in ("wide", "narrow", "last"))
    weights = torch.cat([model.wide.weight.detach().flatten(1), model.narrow.weight.detach().flatten(1)], 1)
    squares = torch.cat([weights.square().mean(1), model.last.weight.detach().square().mean((1, 2, 3))])
    kept = torch.cat([joint, last])
    assert joint.equal(narrow) and 0 < joint.sum() < 24 and 0 < last.sum() < 9
    assert squares[kept].min() > squares[~kept].max()
    wide, narrow = (layer.weight.square().mean((1, 2, 3)) for layer in (model.wide, model.narrow))
    fourth = 27 * wide**2 + 3 * narrow**2  # another ranking
    assert fourth[joint].min() < fourth[~joint].max()


def test_example_input_changes_nothing_in_a_model_without_residual_sums():
    model = network()
    alone, joint = prune(model, 0.5, "filter"), prune(model, 0.5, "filter", example_input=(1, 3, 8, 8))
    assert all(alone[name].equal(joint[name]) for name in alone)


def test_an_unknown_structure_or_example_input_without_filters_raises():
    with pytest.raises(ValueError, match="block must be a block shape or one of filter, channel, got 'row'"):
        prune(network(), 0.5, "row")
    with pytest.raises(ValueError, match=r'example_input needs block="filter", got block=\(1, 1, 1, 1\)'):
        prune(network(), 0.5, example_input=(1, 3, 8, 8))


def test_a_model_without_values_is_refused():
    with pytest.raises(ValueError, match="weight of '0' is on the meta device and has no values to rank"):
        prune(network().to("meta"), 0.5)


def test_a_lazy_layer_without_weight_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="module '1' has no weight yet: run a forward pass first, got LazyLinear"):
        prune(model, 0.5, linear=True)
    with pytest.raises(ValueError, match="module '1' has no weight yet"):
        sparsify(model, {"1": torch.ones(3, 2, dtype=torch.bool)})
    model(torch.zeros(1, 2))
    assert sparsify(model, prune(model, 0.5, linear=True))[1].density < 1
