"""Changes of channels keep the function of any model, or are refused: on random graphs, and where tracing is blind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.random_models import CHANNELS, MIXING_KINDS, SIZE, random_models
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import nn

from sparse_adv.masks import permute_channels, same_function
from sparse_adv.nn import densify, shrink

TOLERANCE = 1e-9
SHAPE = (2, 3, 8, 8)


@pytest.fixture
def without_proof(monkeypatch):
    """The graphs must be right by themselves: the comparison after each change is off."""
    monkeypatch.setattr("sparse_adv.nn.shrinking.check_same_function", lambda *args: None)
    monkeypatch.setattr("sparse_adv.masks.channel_permutation.check_same_function", lambda *args: None)


def assert_same(actual, expected):
    scale = 1 + float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * scale)


def masks_of(model, whole):
    """Random filters of every layer, with holes unless `whole`."""
    masks = {}
    for name, layer in model.named_modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            kept = (torch.rand(len(layer.weight)) < 0.5).view(-1, *[1] * (layer.weight.dim() - 1))
            masks[name] = kept & (torch.rand(layer.weight.shape) < (1 if whole else 0.7))
    return masks


def test_random_models_keep_their_function(without_proof):
    removed, permuted, tried = [], [], []

    @given(random_models(MIXING_KINDS), st.integers(0, 10**6))
    @settings(max_examples=80)
    @torch.no_grad()
    def each(model, seed):
        torch.manual_seed(seed)
        model = densify(model)
        for layer in model.layers if seed % 2 else ():
            for parameter in layer.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()  # then pruned filters give channels that are 0
        x = torch.rand(3, CHANNELS, SIZE, SIZE, dtype=torch.float64)
        masks = masks_of(model, whole=seed % 3 == 0)
        masked = copy.deepcopy(model)
        for name, mask in masks.items():
            masked.get_submodule(name).weight.masked_fill_(~mask, 0)
        try:
            expected, whole = masked(x.clone()), model(x.clone())
        except RuntimeError:
            reject()  # a write in place that PyTorch refuses
        if not (expected.isfinite().all() and whole.isfinite().all()):
            reject()
        tried.append(model)
        try:
            shrunk = shrink(model, masks, x.clone())
            permutation = permute_channels(model, 0.5, (2, 2), x.clone(), linear=True)
        except ValueError as error:
            assert "torch.fx cannot trace" in str(error)
            return
        assert_same(shrunk.model(x.clone()), expected)
        removed.append(any(after < before for before, after in shrunk.widths.values()))
        for group in permutation.channels:  # any order will do
            permutation.channels[group] = torch.randperm(group.width)
        permutation.apply(model)
        assert_same(model(x.clone()), whole)
        permuted.append(any(group.width > 1 for group in permutation.channels))

    each()
    assert len(removed) > 0.5 * len(tried)
    assert sum(removed) > 0.05 * len(tried) and sum(permuted) > 0.05 * len(tried)


class Blind(nn.Module):
    """Layers whose use the subclass decides."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


class ReadsAttribute(Blind):
    def forward(self, x):
        return super().forward(x) * self.second.out_channels


class ReadsSize(Blind):
    def forward(self, x):
        x = F.relu(self.first(x))
        _, channels, _, _ = x.size()
        return self.last(F.relu(self.second(x)) / channels)


class SizesByWidth(Blind):
    def forward(self, x):
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.last(F.interpolate(x, size=x.shape[1])).mean((2, 3))


class Fails(Blind):
    def __init__(self):
        super().__init__()
        self.last.register_forward_pre_hook(lambda module, args: args[0].unflatten(1, (2, 4)).flatten(1, 2))


class Hooked(Blind):
    def __init__(self):
        super().__init__()
        self.second.register_forward_hook(lambda module, args, output: output.cumsum(1))


class HookedBefore(Blind):
    def __init__(self):
        super().__init__()
        self.second.register_forward_pre_hook(lambda module, args: (args[0].flip(1),))


class HookedNorm(Blind):
    def __init__(self):
        super().__init__()
        self.second = nn.Sequential(self.second, nn.BatchNorm2d(8))
        self.second[1].register_forward_hook(lambda module, args, output: output * torch.arange(8).view(1, -1, 1, 1))


class Random(Blind):
    def forward(self, x):
        return self.last(F.dropout(self.second(F.relu(self.first(x))), training=True))


def half_of_the_filters(model):
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.bias.zero_()
    return {
        name: (torch.arange(8) % 2 == 0).view(-1, 1, 1, 1).expand_as(layer.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and name != "last"
    }


@pytest.mark.parametrize(
    "kind", [ReadsAttribute, ReadsSize, SizesByWidth, Fails, Hooked, HookedBefore, HookedNorm, Random]
)
def test_what_tracing_does_not_show_is_refused(kind):
    model = kind()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"removing channels (changes what|breaks) this model.* tracing does not show"):
        shrink(model, half_of_the_filters(model), SHAPE)
    if kind in (Hooked, HookedBefore, HookedNorm, Random):  # the others do not depend on the order of channels
        with pytest.raises(ValueError, match="permuting channels changes what this model computes"):
            permute_channels(model, 0.5, (2, 2), SHAPE)
    assert model.training and all(value.shape == before[key].shape for key, value in model.state_dict().items())


def test_the_same_layers_without_such_reads_are_changed():
    model = Blind()
    assert shrink(model, half_of_the_filters(model), SHAPE).widths == {
        "first": (8, 4),
        "second": (8, 4),
        "last": (4, 4),
    }


class ByKeyword(Blind):
    def forward(self, x):
        return self.last(input=torch.add(input=F.relu(self.second(input=F.relu(input=self.first(input=x)))), other=1))


def test_arguments_by_keyword_are_followed():
    model = ByKeyword()
    masks = half_of_the_filters(model)
    assert shrink(model, masks, SHAPE).widths["first"] == (8, 4)


def test_a_model_without_parameters_stays_as_it_is():
    assert shrink(nn.Sequential(nn.ReLU()), {}, SHAPE).widths == {}


@pytest.mark.parametrize("other", [nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Flatten(), nn.Softmax(1)])
def test_models_are_compared_by_shape_and_value(other):
    x = torch.randn(SHAPE)
    same_function.check_same_function(other, copy.deepcopy(other), x, "nothing")
    kept = x.clone()
    with pytest.raises(ValueError, match="nothing changes what this model computes"):
        same_function.check_same_function(nn.Identity(), other, x, "nothing")
    assert x.equal(kept)


def test_a_result_that_is_not_finite_is_not_the_same_as_a_finite_one():
    nan = nn.Threshold(2.0, float("nan"))
    with pytest.raises(ValueError, match="changes what"):
        same_function.check_same_function(nn.Identity(), nan, SHAPE, "nothing")
    same_function.check_same_function(nan, copy.deepcopy(nan), SHAPE, "nothing")


class RuledOut(Blind):
    """With a logit that no image gets."""

    def forward(self, x):
        return F.pad(super().forward(x).mean((2, 3)), (0, 1), value=-torch.inf)


def test_an_infinite_output_hides_no_change_of_the_others():
    model, other = RuledOut(), RuledOut()
    same_function.check_same_function(model, copy.deepcopy(model), SHAPE, "nothing")
    with pytest.raises(ValueError, match="changes what"):
        same_function.check_same_function(model, other, SHAPE, "nothing")
    assert shrink(model, half_of_the_filters(model), SHAPE).widths["first"] == (8, 4)
