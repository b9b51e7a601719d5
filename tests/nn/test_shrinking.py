"""`nn.shrink`: a smaller model that computes the same."""

import copy

import pytest
import torch
from helpers.networks import NETWORKS, network
from helpers.tolerances import assert_close
from torch import Tensor, nn

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, shrink, sparsify, zero_dead_channels


def filters(model: nn.Module, density: float = 0.5) -> dict[str, Tensor]:
    """Random whole filters of each convolution."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            kept = torch.rand(len(module.weight)) < density
            kept[0] = True
            masks[name] = kept.view(-1, 1, 1, 1).expand_as(module.weight).clone()
    return masks


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("multiple", [1, 4])
def test_the_function_is_unchanged(name, zeroed, multiple):
    model, shape = network(name)
    masks = filters(model)
    if zeroed:
        zero_dead_channels(model, masks, shape)
    x = torch.rand(shape)
    expected = sparsify(copy.deepcopy(model), masks)(x)
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, masks, shape, multiple).model
    assert_close(small(x), expected)
    assert parameters(small) < parameters(model)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_half_of_every_width_is_removed_if_residual_branches_prune_the_same_channels():
    model, shape = network("resnet18")
    masks = prune(model, 0.5, "filter", scope="uniform", example_input=shape)
    zero_dead_channels(model, masks, shape)
    shrunk = shrink(model, masks, shape)
    assert {after / before for name, (before, after) in shrunk.widths.items() if name in masks} == {0.5}
    assert not shrunk.retained.keys() & masks.keys()
    assert not any(isinstance(module, MaskedConv2d) for module in shrunk.model.modules())
    x = torch.rand(shape)
    assert_close(shrunk.model(x), sparsify(copy.deepcopy(model), masks)(x))


@pytest.mark.parametrize("zeroed", [False, True])
def test_many_pruned_channels_that_stay_are_told_with_the_remedy(zeroed, caplog):
    """As in a trained network, whose BatchNorm has biases other than 0."""
    model, shape = network("resnet18")
    masks = prune(model, 0.5, "filter", scope="uniform", example_input=shape)
    if zeroed:
        zero_dead_channels(model, masks, shape)
    shrink(model, masks, shape)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (not zeroed)
    assert zeroed or "call nn.zero_dead_channels(model, masks, example_input) first" in told[0]


@pytest.mark.parametrize(("padding", "biased", "told"), [(1, 2, 1), (1, 1, 0), (0, 8, 0)])
def test_constants_that_stay_are_told_if_they_are_more_than_a_tenth_of_the_pruned_filters(
    padding, biased, told, caplog
):
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.Conv2d(16, 2, 3, padding=padding))
    mask = torch.ones(16, 1, 3, 3, dtype=torch.bool)
    mask[:10] = False
    with torch.no_grad():
        model[0].bias[biased:10] = 0
    widths = shrink(model, {"0": mask}, (1, 1, 8, 8)).widths
    assert widths["0"] == (16, 6 + biased if padding else 6)
    assert len(caplog.records) == told
    assert not told or "shrink keeps 2 channels (the masks prune 10 filters)" in caplog.text


def test_without_coupling_only_inner_channels_are_removed():
    model, shape = network("resnet18")
    masks = prune(model, 0.5, "filter", scope="uniform")
    zero_dead_channels(model, masks, shape)
    widths = shrink(model, masks, shape).widths
    halved = [name for name, (before, after) in widths.items() if after == before / 2]
    assert len(halved) >= 8


def test_partly_pruned_filters_stay_masked():
    model, shape = network("vgg16")
    masks = filters(model)
    masks = {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in masks.items()}
    zero_dead_channels(model, masks, shape)
    x = torch.rand(shape)
    expected = sparsify(copy.deepcopy(model), masks)(x)
    small = shrink(model, masks, shape).model
    assert_close(small(x), expected)
    layers = [module for module in small.modules() if isinstance(module, MaskedConv2d)]
    assert layers and all(0 < layer.density < 1 for layer in layers)
    again = shrink(sparsify(model, masks), None, shape).model
    assert again.state_dict().keys() == small.state_dict().keys()
    assert_close(again(x), expected)


def test_channels_that_no_layer_reads_are_removed_with_their_filters():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    masks = {"4": torch.ones(4, 6, 1, 1, dtype=torch.bool), "2": torch.ones(6, 8, 3, 3, dtype=torch.bool)}
    masks["4"][:, 2:] = False
    masks["2"][:2, 5:] = False  # the inputs of the two filters that are read
    shrunk = shrink(model, masks, (1, 3, 9, 9))
    assert shrunk.widths == {"0": (8, 5), "2": (6, 2), "4": (4, 4)}
    x = torch.rand(2, 3, 9, 9)
    assert_close(shrunk.model(x), sparsify(model, masks)(x))


@pytest.mark.parametrize(("padding", "width"), [(0, 1), (1, 8)])
def test_a_constant_is_added_to_the_bias_unless_there_is_padding(padding, width):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=padding, bias=False))
    masks = {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool)}
    masks["0"][0] = True
    shrunk = shrink(model, masks, (1, 3, 9, 9))
    assert shrunk.widths["0"] == (8, width)
    assert (shrunk.retained.get("0", 0) > 0) is (padding > 0)
    x = torch.rand(2, 3, 9, 9)
    assert_close(shrunk.model(x), sparsify(model, masks)(x))


@pytest.mark.parametrize(("bias", "width"), [(False, 1), (True, 8)])
def test_padding_of_a_pooling_layer_ends_a_constant_unless_it_is_0(bias, width):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.AvgPool2d(3, 1, padding=1), nn.Conv2d(8, 4, 3))
    masks = {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool)}
    masks["0"][0] = True
    shrunk = shrink(model, masks, (1, 3, 9, 9))
    assert shrunk.widths["0"] == (8, width)
    x = torch.rand(2, 3, 9, 9)
    assert_close(shrunk.model(x), sparsify(model, masks)(x))


def test_a_layer_without_kept_weights_keeps_one_channel():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    shrunk = shrink(model, {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool)}, (1, 3, 9, 9))
    assert shrunk.widths["0"] == (8, 1)
    assert_close(shrunk.model(torch.rand(1, 3, 9, 9)), model[2].bias.view(1, 4, 1, 1).expand(1, 4, 5, 5))


class TwoBranches(nn.Module):
    """One head is called with the channels of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        nn.init.ones_(self.a.bias)
        nn.init.ones_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).relu()) + self.head(self.b(x).relu())


@pytest.mark.parametrize("pruned", ["a", "b", "ab"])
@pytest.mark.parametrize("other_bias", [1, 2])
def test_a_layer_that_is_called_twice_loses_the_channels_that_are_the_same_constant_in_both_calls(pruned, other_bias):
    model = TwoBranches()
    nn.init.constant_(model.b.bias, other_bias)
    kept = (torch.arange(8) < 4)[:, None, None, None].expand(8, 3, 1, 1)
    masks = dict.fromkeys(pruned, kept)
    shrunk = shrink(model, masks, (1, 3, 4, 4))
    width = 4 if pruned == "ab" and other_bias == 1 else 8
    assert shrunk.widths == {"a": (8, width), "b": (8, width), "head": (4, 4)}
    x = torch.rand(2, 3, 4, 4)
    assert_close(shrunk.model(x), sparsify(model, masks)(x))


class OverWidth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.shape[1]


def test_a_model_that_computes_with_its_width_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), OverWidth(), nn.Conv2d(8, 4, 3))
    masks = filters(model[:1])
    shrunk = shrink(model, masks, (1, 3, 9, 9))
    assert shrunk.widths["0"] == (8, 8)
    x = torch.rand(2, 3, 9, 9)
    assert_close(shrunk.model(x), sparsify(model, masks)(x))


def test_channels_with_kept_weights_of_zero_are_not_removed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    nn.init.zeros_(model[0].weight[:4])
    nn.init.zeros_(model[1].weight)
    assert shrink(model, {}, (1, 3, 9, 9)).widths["0"] == (8, 8)


def test_parameters_keep_dtype_layout_and_whether_they_are_trained():
    model, shape = network("resnet18")
    model = model.double().to(memory_format=torch.channels_last)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    small = dict(shrink(model, prune(model, 0.5, "filter", example_input=shape), shape).model.named_parameters())
    assert small.keys() == dict(model.named_parameters()).keys()
    assert sum(map(Tensor.numel, small.values())) < 0.6 * parameters(model)
    for name, parameter in model.named_parameters():
        assert (small[name].requires_grad, small[name].dtype) == (parameter.requires_grad, torch.float64), name
        assert small[name].dim() != 4 or small[name].is_contiguous(memory_format=torch.channels_last), name


def test_the_small_model_can_be_trained_copied_loaded_and_compiled():
    model, shape = network("wrn-10-1")
    masks = prune(model, 0.5, "filter", example_input=shape)
    zero_dead_channels(model, masks, shape)
    small = shrink(model, masks, shape, multiple=2).model.train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    x, y = torch.rand(4, 3, 32, 32), torch.arange(4)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    compiled = torch.compile(small.eval(), backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), twin.eval()(x))


@pytest.mark.parametrize(
    ("masks", "multiple", "message"),
    [
        ({"conv9": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, 1, "model has no module 'conv9'"),
        ({"0": torch.ones(8, 3, 1, 1, dtype=torch.bool)}, 1, r"module '0': mask has shape \(8, 3, 1, 1\)"),
        ({}, 0, "multiple must be an integer of at least 1, got 0"),
    ],
)
def test_bad_input_is_reported(masks, multiple, message):
    with pytest.raises(ValueError, match=message):
        shrink(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), masks, (1, 3, 9, 9), multiple)


@pytest.mark.parametrize("multiple", [2, 3, 64])
def test_widths_are_the_next_multiples_as_far_as_there_are_channels(multiple):
    model, shape = network("resnet18")
    masks = filters(model)
    zero_dead_channels(model, masks, shape)
    exact, rounded = (shrink(model, masks, shape, each).widths for each in (1, multiple))
    assert any(after % multiple for _, after in exact.values())
    for name, (before, after) in rounded.items():
        assert after == min(before, -(-exact[name][1] // multiple) * multiple)


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_channel_is_needed_by_the_linear_layer_that_reads_any_of_its_pixels(kept):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    mask = torch.zeros(5, 36, dtype=torch.bool)
    mask[:, [kept, 9 + kept]] = True  # a pixel of the first two channels
    x = torch.rand(2, 1, 5, 5)
    expected = sparsify(copy.deepcopy(model), {"3": mask})(x)
    shrunk = shrink(model, {"3": mask}, x)
    assert shrunk.widths["0"] == (4, 2) and shrunk.model[3].in_features == 18
    assert_close(shrunk.model(x), expected)


class Renamed(nn.Module):
    """A network whose convolution `own` is called by the name `other`, too."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.own = self.other = nn.Conv2d(4, 6, 1, bias=False)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.last(self.other(self.first(x)))


@pytest.mark.parametrize("names", [("own",), ("other",), ("own", "other")])
def test_a_mask_may_have_any_name_of_its_layer(names):
    model, x, mask = Renamed(), torch.rand(2, 1, 6, 6), torch.ones(6, 4, 1, 1, dtype=torch.bool)
    mask[2:] = False
    masks = dict.fromkeys(names, mask)
    expected = sparsify(copy.deepcopy(model), masks)(x)
    shrunk = shrink(model, masks, x)
    assert shrunk.widths["own"] == (6, 2)
    assert_close(shrunk.model(x), expected)
    with pytest.raises(ValueError, match="'other' has another name with another mask"):
        shrink(model, {"own": mask, "other": ~mask}, x)
