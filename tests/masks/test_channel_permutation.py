"""`masks.gather_channels`: an order of channels that leaves the function alone and gathers scores in whole blocks."""

import copy

import pytest
import torch
from helpers.networks import NETWORKS, network
from helpers.tolerances import assert_close
from torch import Tensor, nn

from sparse_adv.masks import ChannelOrder, gather_channels, prune
from sparse_adv.masks.channel_permutation import assign
from sparse_adv.masks.dependency_graph import channel_groups
from sparse_adv.models import build
from sparse_adv.nn import MaskedConv2d, sparsify

SHAPE = (2, 3, 8, 8)


def mixed() -> nn.Module:
    """Odd widths, a depthwise convolution, one with groups, and a linear layer that reads pixels as features."""
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


def shuffled(model: nn.Module, shape: tuple[int, ...]) -> ChannelOrder:
    """All free channels at random."""
    groups = [group for group in channel_groups(model, shape) if not group.fixed]
    return ChannelOrder({group: torch.randperm(group.width) for group in groups}, (0.0, 0.0))


def retained(model: nn.Module, masks: dict[str, Tensor], score: str = "magnitude") -> float:
    """Share of the squared scores that masks keep."""
    squares = {name: model.get_submodule(name).weight.detach().double().abs() for name in masks}
    if score == "relative_magnitude":
        squares = {name: size / size.mean() for name, size in squares.items()}
    squares = {name: size.square() for name, size in squares.items()}
    return float(sum(s[masks[name]].sum() for name, s in squares.items()) / sum(s.sum() for s in squares.values()))


def planted(model: nn.Module, block: tuple[int, int], density: float = 0.2) -> nn.Module:
    """Large weights in some blocks of each convolution, a tenth of their size in the others."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            rows, columns = module.weight.shape[:2]
            grid = [-(-size // step) for size, step in zip((rows, columns), block, strict=True)]
            scale = torch.where(torch.rand(*grid, *module.kernel_size) < density, 1.0, 0.1)
            scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            nn.init.normal_(module.weight).data.mul_(scale[:rows, :columns])
    return model


@pytest.mark.parametrize("name", [*NETWORKS, "mixed"])
def test_the_function_is_unchanged_in_any_order_and_leads_back(name):
    model, shape = case(name)
    model = model.double()
    x = torch.rand(shape, dtype=torch.float64)
    expected, start, parameters = model(x), copy.deepcopy(model.state_dict()), list(model.parameters())
    order = shuffled(model, shape)
    assert len(order.channels) > 1
    order.apply(model)
    assert_close(model(x), expected)
    moved = [key for key, value in model.state_dict().items() if not value.equal(start[key])]
    assert len(moved) > len(order.channels)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    order.inverse().apply(model)
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
def test_blocks_hold_more_and_prune_keeps_what_was_promised(name, block, scope, score):
    model, shape = case(name)
    x = torch.rand(shape)
    expected = model(x)
    options = {"density": 0.3, "block": block, "scope": scope, "score": score, "linear": True}
    order = gather_channels(model, shape=shape, **options)
    assert order.retained[0] == pytest.approx(retained(model, prune(model, **options), score))
    order.apply(model)
    assert order.retained[1] == pytest.approx(retained(model, prune(model, **options), score))
    assert order.retained[1] > order.retained[0]
    assert_close(model(x), expected)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize(
    ("name", "block"),
    [("resnet18", (16, 16)), ("preact_resnet18", (16, 16)), ("vgg16", (16, 16)), ("vgg16", (1, 16))],
)
def test_blocks_that_were_scattered_are_found_again(name, block, scope):
    model, shape = planted(build(name, width=16), block), (1, 3, 32, 32)
    options = {"density": 0.2, "block": block, "scope": scope}
    whole = retained(model, prune(model, **options))
    shuffled(model, shape).apply(model)
    scattered = retained(model, prune(model, **options))
    order = gather_channels(model, shape=shape, **options)
    assert order.retained[0] == pytest.approx(scattered)
    assert order.retained[1] - scattered > 0.85 * (whole - scattered) > 0.3


def test_a_twin_goes_the_same_way_and_so_does_a_state_dict():
    model, shape = network("resnet18")
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.rand(shape)
    expected, start = twin(x), copy.deepcopy(twin.state_dict())
    order = gather_channels(model, 0.2, (4, 4), shape)
    order.apply(twin)
    assert_close(twin(x), expected)
    state = order.reorder(start)
    assert all(value.equal(state[key]) for key, value in twin.state_dict().items())
    first = next(iter(order.channels))
    for name in first.producers:
        weight = twin.get_submodule(name).weight
        assert weight.sum((1, 2, 3)).allclose(start[f"{name}.weight"][order.channels[first]].sum((1, 2, 3)), atol=1e-5)


def test_a_sparse_model_takes_its_masks_along():
    model, shape = network("resnet18")
    masks = prune(model, 0.3, (4, 4), linear=True)
    sparsify(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.rand(shape)
    expected, density = model(x), model.get_submodule("layer1.0.conv1").density
    shuffled(model, shape).apply(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedConv2d)}
    assert any(not layer.weight_mask.equal(masks[name]) for name, layer in layers.items())
    assert model.get_submodule("layer1.0.conv1").density == density
    assert_close(model(x), expected)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert not any(layer.weight[~layer.weight_mask].any() for layer in layers.values())
    # What is whole blocks again loses nothing.
    order = gather_channels(model, 0.3, (4, 4), shape)
    assert order.retained[1] >= order.retained[0]


def test_the_same_model_gives_the_same_order():
    orders = [gather_channels(network("vgg16")[0], 0.2, (4, 4), (1, 3, 32, 32)) for _ in range(2)]
    assert orders[0].retained == orders[1].retained
    for group, channels in orders[0].channels.items():
        assert channels.equal(orders[1].channels[group])
        assert channels.sort().values.equal(torch.arange(group.width))


def test_channels_that_are_fixed_stay():
    model = mixed()
    order = gather_channels(model, 0.3, (4, 4), SHAPE)
    moved = {name for group in order.channels for name in group.producers}
    assert moved == {"0", "6", "10"}  # not the ends of the grouped convolution, not the model's output


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("block", [(4, 4), (1, 1)])
def test_where_nothing_is_gained_every_channel_stays(density, block):
    model, shape = network("digits_cnn")
    for parameter in model.parameters() if density else []:
        nn.init.zeros_(parameter)
    order = gather_channels(model, density, block, shape)
    assert order.retained[0] == order.retained[1]
    assert all(channels.equal(torch.arange(group.width)) for group, channels in order.channels.items())


@pytest.mark.parametrize(("items", "slot"), [(64, 16), (60, 16), (40, 2), (5, 8), (7, 1)])
def test_the_assignment_is_near_the_best_one(items, slot):
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy comes with scikit-learn")
    position = torch.arange(items)
    gain = torch.rand(items, -(-items // slot), dtype=torch.float64) * torch.rand(items, 1, dtype=torch.float64)
    order = assign(gain, slot)
    assert order.sort().values.equal(position)
    by_position = gain.repeat_interleave(slot, 1)[:, :items]
    best = by_position.numpy()[optimize.linear_sum_assignment(by_position.numpy(), maximize=True)].sum()
    found = by_position[order, position]
    assert 0.95 * best <= float(found.sum()) <= best + 1e-9
    # Item at p in the place of q, and the other way round: no exchange gains.
    there = by_position[order]
    assert (there + there.T - found.unsqueeze(0) - found.unsqueeze(1)).max() <= 1e-9


def weight_norm(model: nn.Module) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.get_submodule("layer1.0.conv1"))
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: build("vgg16", width=8), "state_dict lacks 'layer1.0.conv1'"),
        (lambda: build("resnet18", width=4), r"state_dict must hold '[a-z0-9.]+' with 8 channels, got 4"),
        (
            lambda: weight_norm(build("resnet18", width=8)),
            "state_dict holds '.*parametriz.*', which has no known order",
        ),
    ],
)
def test_another_architecture_is_told_and_left_alone(other, message):
    model, shape = network("resnet18")
    order, other = shuffled(model, shape), other()
    start = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=message):
        order.apply(other)
    assert all(value.equal(start[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"density must be a number in \[0, 1\], got 1.5"),
        ({"block": (4,)}, r"block must be 2 or 4 positive integers .*got \(4,\)"),
        ({"block": "filter"}, "block must be 2 or 4 positive integers .*got 'filter'"),
        ({"shape": (3, 8)}, r"shape must be 4 positive integers \[N, C, H, W\], got \(3, 8\)"),
        ({"scope": "all"}, "scope must be one of global, uniform, erk, got 'all'"),
        ({"score": "size"}, "score must be a function or one of .*got 'size'"),
        ({"score": lambda name, weight: weight.abs() / 0}, "score of '0' must have finite squares, got one of inf"),
        ({"exclude": ["conv9"]}, "exclude: model has no module 'conv9'"),
    ],
)
def test_bad_input_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        gather_channels(mixed(), **{"density": 0.5, "block": (4, 4), "shape": SHAPE} | options)
