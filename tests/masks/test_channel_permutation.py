"""`masks.permute_channels`: the model's function does not change, and whole blocks contain more of the scores."""

import copy

import pytest
import torch
from helpers.networks import NETWORKS, network
from helpers.tolerances import assert_close
from torch import Tensor, nn

from sparse_adv.masks import ChannelPermutation, permute_channels, prune
from sparse_adv.masks.blocks import grid_shape
from sparse_adv.masks.channel_permutation import assign
from sparse_adv.masks.dependency_graph import dependency_groups
from sparse_adv.models import build
from sparse_adv.nn import MaskedConv2d, sparsify
from sparse_adv.ops.masked_conv2d_mask import expand_blocks

SHAPE = (2, 3, 8, 8)


def mixed() -> nn.Module:
    """A model with odd widths, a depthwise and a grouped convolution, and a linear layer on flattened pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 3, groups=12, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1),
        nn.Conv2d(10, 10, 3, groups=2, padding=1),
        nn.Conv2d(10, 9, 3, padding=1, bias=False),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.BatchNorm1d(36),
        nn.Linear(36, 11),
        nn.ReLU(),
        nn.Linear(11, 5),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def case(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    return (mixed(), SHAPE) if name == "mixed" else network(name)


def random_permutation(model: nn.Module, shape: tuple[int, ...]) -> ChannelPermutation:
    """A random permutation of all channels that are not fixed."""
    groups = [group for group in dependency_groups(model, shape) if not group.fixed]
    return ChannelPermutation({group: torch.randperm(group.width) for group in groups}, (0.0, 0.0))


def retained(model: nn.Module, masks: dict[str, Tensor], score: str = "magnitude") -> float:
    """Fraction of the squared scores that masks keep."""
    squares = {name: model.get_submodule(name).weight.detach().double().abs() for name in masks}
    if score == "relative_magnitude":
        squares = {name: size / size.mean() for name, size in squares.items()}
    squares = {name: size.square() for name, size in squares.items()}
    return float(sum(s[masks[name]].sum() for name, s in squares.items()) / sum(s.sum() for s in squares.values()))


def with_block_structure(model: nn.Module, block: tuple[int, int], density: float = 0.2) -> nn.Module:
    """Draw the weights of convolutions anew: large ones in a fifth of the blocks, a tenth of the size elsewhere."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            shape, block4 = module.weight.shape, (*block, 1, 1)
            scale = torch.where(torch.rand(grid_shape(shape, block4)) < density, 1.0, 0.1)
            nn.init.normal_(module.weight).data.mul_(expand_blocks(scale, block4, shape))
    return model


@pytest.mark.parametrize("name", [*NETWORKS, "mixed"])
def test_any_permutation_keeps_the_function_and_its_inverse_restores_the_weights(name):
    model, shape = case(name)
    model = model.double()
    x = torch.rand(shape, dtype=torch.float64)
    expected, start, parameters = model(x), copy.deepcopy(model.state_dict()), list(model.parameters())
    permutation = random_permutation(model, shape)
    assert len(permutation.channels) > 1
    permutation.apply(model)
    assert_close(model(x), expected)
    moved = [key for key, value in model.state_dict().items() if not value.equal(start[key])]
    assert len(moved) > len(permutation.channels)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    permutation.inverse().apply(model)
    assert all(value.equal(start[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("resnet18", (8, 8)),
        ("resnet18", (8, 4)),
        ("mixed", (4, 8)),
        ("mixed", (5, 3, 3, 3)),
        ("mixed", (4, 1)),
        ("resnet18", (1, 8)),
    ],
)
@pytest.mark.parametrize(
    ("scope", "score"), [("global", "magnitude"), ("global", "relative_magnitude"), ("uniform", "magnitude")]
)
def test_pruning_retains_more_score_and_as_much_as_reported(name, block, scope, score):
    model, shape = case(name)
    x = torch.rand(shape)
    expected = model(x)
    options = {"density": 0.3, "block": block, "scope": scope, "score": score, "linear": True}
    permutation = permute_channels(model, example_input=shape, **options)
    assert permutation.retained[0] == pytest.approx(retained(model, prune(model, **options), score))
    permutation.apply(model)
    assert permutation.retained[1] == pytest.approx(retained(model, prune(model, **options), score))
    assert permutation.retained[1] > permutation.retained[0]
    assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("name", "block", "scope"),
    [
        ("resnet18", (16, 16), "global"),
        ("preact_resnet18", (16, 16), "uniform"),
        ("vgg16", (16, 16), "uniform"),
        ("vgg16", (1, 16), "global"),
    ],
)
def test_block_structure_hidden_by_a_random_permutation_is_recovered(name, block, scope):
    model, shape = with_block_structure(build(name, width=16), block), (1, 3, 32, 32)
    options = {"density": 0.2, "block": block, "scope": scope}
    original = retained(model, prune(model, **options))
    random_permutation(model, shape).apply(model)
    shuffled = retained(model, prune(model, **options))
    permutation = permute_channels(model, example_input=shape, **options)
    assert permutation.retained[0] == pytest.approx(shuffled)
    assert permutation.retained[1] - shuffled > 0.85 * (original - shuffled) > 0.3


def test_another_model_and_a_state_dict_are_permuted_alike():
    model, shape = network("resnet18")
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.rand(shape)
    expected, start = twin(x), copy.deepcopy(twin.state_dict())
    permutation = permute_channels(model, 0.2, (4, 4), shape)
    permutation.apply(twin)
    assert_close(twin(x), expected)
    state = permutation.permute_state_dict(start)
    assert all(value.equal(state[key]) for key, value in twin.state_dict().items())
    first = next(iter(permutation.channels))
    for name in first.producers:
        weight = twin.get_submodule(name).weight
        assert weight.sum((1, 2, 3)).allclose(
            start[f"{name}.weight"][permutation.channels[first]].sum((1, 2, 3)), atol=1e-5
        )


def test_masks_of_a_sparse_model_are_permuted_with_its_weights():
    model, shape = network("resnet18")
    masks = prune(model, 0.3, (4, 4), linear=True)
    sparsify(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.rand(shape)
    expected, density = model(x), model.get_submodule("layer1.0.conv1").density
    random_permutation(model, shape).apply(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedConv2d)}
    assert any(not layer.weight_mask.equal(masks[name]) for name, layer in layers.items())
    assert model.get_submodule("layer1.0.conv1").density == density
    assert_close(model(x), expected)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert not any(layer.weight[~layer.weight_mask].any() for layer in layers.values())
    # The random permutation has scattered the blocks kept; another one can only retain more.
    permutation = permute_channels(model, 0.3, (4, 4), shape)
    assert permutation.retained[1] >= permutation.retained[0]


def test_the_same_model_gives_the_same_permutation():
    permutations = [permute_channels(network("vgg16")[0], 0.2, (4, 4), (1, 3, 32, 32)) for _ in range(2)]
    assert permutations[0].retained == permutations[1].retained
    for group, channels in permutations[0].channels.items():
        assert channels.equal(permutations[1].channels[group])
        assert channels.sort().values.equal(torch.arange(group.width))


def test_fixed_channels_are_not_permuted():
    model = mixed()
    permutation = permute_channels(model, 0.3, (4, 4), SHAPE)
    moved = {name for group in permutation.channels for name in group.producers}
    assert moved == {"0", "6", "10"}  # not the ends of the grouped convolution, not the model's output


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_without_any_gain_all_channels_keep_their_positions(density, block):
    model, shape = network("digits_cnn")
    for parameter in model.parameters() if density else []:
        nn.init.zeros_(parameter)
    permutation = permute_channels(model, density, block, shape)
    assert permutation.retained[0] == permutation.retained[1]
    assert all(channels.equal(torch.arange(group.width)) for group, channels in permutation.channels.items())


@pytest.mark.parametrize(("items", "slot"), [(64, 16), (60, 16), (40, 2), (5, 8), (7, 1)])
def test_assign_is_near_the_optimum_and_no_exchange_gains(items, slot):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is installed with scikit-learn")
    position = torch.arange(items)
    gain = torch.rand(items, -(-items // slot), dtype=torch.float64) * torch.rand(items, 1, dtype=torch.float64)
    order = assign(gain, slot)
    assert order.sort().values.equal(position)
    by_position = gain.repeat_interleave(slot, 1)[:, :items]
    best = by_position.numpy()[optimize.linear_sum_assignment(by_position.numpy(), maximize=True)].sum()
    actual = by_position[order, position]
    assert 0.95 * best <= float(actual.sum()) <= best + 1e-9
    # Exchanging the items at positions p and q gains nothing.
    there = by_position[order]
    assert (there + there.T - actual.unsqueeze(0) - actual.unsqueeze(1)).max() <= 1e-9


def weight_norm(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.get_submodule("layer1.0.conv1"))
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: build("vgg16", width=8), "state_dict lacks 'layer1.0.conv1'"),
        (lambda: build("resnet18", width=4), r"state_dict must have '[a-z0-9.]+' with 8 channels, got 4"),
        (
            lambda: weight_norm(build("resnet18", width=8)),
            "state_dict has '.*parametriz.*', for which the order of channels is unknown",
        ),
    ],
)
def test_a_model_of_another_architecture_raises_and_is_unchanged(other, message):
    model, shape = network("resnet18")
    permutation, other = random_permutation(model, shape), other()
    start = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        permutation.apply(other)
    assert all(value.equal(start[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"block": (4,)}, r"block must be 2 or 4 positive integers .*got \(4,\)"),
        ({"block": "filter"}, "block must be of type Sequence, got 'filter'"),
        ({"example_input": (3, 8)}, r"example_input must be a tensor or 4 positive integers .*got \(3, 8\)"),
        ({"scope": "all"}, "scope must be one of global, uniform, erk, igq, got 'all'"),
        ({"score": "size"}, "score must be a function or one of .*got 'size'"),
        ({"score": lambda name, weight: weight.abs() / 0}, "score of '0' must have finite squares, got one of inf"),
        ({"exclude": ["conv9"]}, "exclude: model has no module 'conv9'"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        permute_channels(mixed(), **{"density": 0.5, "block": (4, 4), "example_input": SHAPE} | options)
