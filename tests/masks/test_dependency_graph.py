"""Dependency groups of the library's networks, and operations that fix the channels."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import nn

from sparse_adv.masks import prune
from sparse_adv.masks.dependency_graph import DependencyGroup, dependency_groups
from sparse_adv.models import build
from sparse_adv.nn import shrink, sparsify

SHAPE = (2, 3, 32, 32)


def group_of(groups: list[DependencyGroup], producer: str) -> DependencyGroup:
    return next(group for group in groups if producer in group.producers)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "wrn-10-1", "vgg16"])
def test_every_convolution_produces_and_consumes_channels_of_groups_of_its_width(name):
    model = build(name, width=8) if name != "wrn-10-1" else build(name)
    groups = dependency_groups(model, SHAPE)
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name for group in groups for name in group.producers} >= convolutions
    assert {member.name for group in groups for member in group.consumers} >= convolutions
    for group in groups:
        for producer in group.producers:
            assert len(model.get_submodule(producer).weight) == group.width
        for consumer, features in group.consumers:
            assert model.get_submodule(consumer).weight.shape[1] == group.width * features


def test_a_residual_sum_joins_its_operands_but_not_the_inner_channels_of_blocks():
    groups = dependency_groups(build("resnet18", width=8), SHAPE)
    sums = [group for group in groups if len(group.producers) > 1]
    assert len(sums) == 4  # one for each stage
    inner = [group for group in groups if len(group.producers) == 1 and not group.fixed]
    assert len(inner) == 8  # the first convolution of each block
    assert all(len(group.consumers) == 1 for group in inner)


def test_channels_of_the_input_and_the_output_are_fixed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    groups = dependency_groups(model, SHAPE)
    assert group_of(groups, "0").fixed == ""
    assert group_of(groups, "2").fixed == "the model's output"
    assert groups[0].producers == () and groups[0].fixed == "the model's input"


def test_a_flattened_channel_has_as_many_features_as_pixels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 15 * 15, 10))
    assert group_of(dependency_groups(model, SHAPE), "0").consumers[0].features == 15 * 15


class Between(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    ("function", "free"),
    [
        (F.relu, True),
        (lambda x: x * 0.5 + x, True),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: x.flip(1), False),
        (lambda x: torch.cat([x[:, :4], x[:, 4:]], 1), False),
        (lambda x: x.softmax(1), False),
        (lambda x: x - x.mean(1, keepdim=True), False),
        (lambda x: x * torch.arange(8.0).view(-1, 1, 1), False),
        (lambda x: x / x.shape[1], False),
    ],
)
def test_functions_that_mix_channels_or_are_not_supported_fix_them(function, free):
    assert (group_of(dependency_groups(Between(function), SHAPE), "first").fixed == "") is free


def test_channels_of_grouped_convolutions_are_fixed_but_not_of_depthwise_ones():
    depthwise = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 3))
    group = group_of(dependency_groups(depthwise, SHAPE), "0")
    assert (group.fixed, group.depthwise) == ("", ("1",))
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 5, 3))
    assert group_of(dependency_groups(grouped, SHAPE), "0").fixed == "1 is a grouped convolution"


class Residual(nn.Module):
    """A sum with what has fixed channels, on either side."""

    def __init__(self, fixed, swapped: bool) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 3), (3, 3), (3, 5)))
        self.fixed, self.swapped = fixed, swapped

    def forward(self, x):
        kept, free = self.fixed(self, x), self.inner(self.first(x))
        return self.last(free + kept if self.swapped else kept + free)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("fixed", "shares"),
    [
        (lambda m, x: x, False),
        (lambda m, x: m.first(x).flip(1), True),
        (lambda m, x: F.conv2d(x, m.first.weight, padding=1), True),
    ],
    ids=["input", "mixed", "weight read by a function"],
)
def test_a_sum_with_fixed_channels_fixes_its_other_operand(fixed, shares, swapped):
    groups = dependency_groups(Residual(fixed, swapped), SHAPE)
    assert group_of(groups, "inner").fixed
    assert bool(group_of(groups, "first").fixed) is shares


def test_a_model_that_cannot_be_traced_raises_an_error_that_names_the_module():
    def branch(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the model"):
        dependency_groups(Between(branch), SHAPE)


class Flags(nn.Module):
    """Returns its features too if asked to; the arguments after the images have defaults of many types."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, bias=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x, features=False, mask=None, pool=(2, 2), *others, act="relu", **options):
        x = getattr(F, act)(self.first(x))
        x = self.second(x if mask is None else x * mask)
        x = F.avg_pool2d(x, pool)
        logits = self.head(x.mean((2, 3)))
        return (logits, x) if features else logits


def test_arguments_after_the_first_keep_their_defaults():
    model = Flags().eval()
    groups = dependency_groups(model, SHAPE)
    assert group_of(groups, "first").fixed == "" and group_of(groups, "second").fixed == ""
    masks = prune(model, 0.5, "filter", scope="uniform", example_input=SHAPE)
    shrunk = shrink(model, masks, SHAPE)
    assert shrunk.widths == {"first": (8, 4), "second": (8, 4), "head": (5, 5)}
    x = torch.rand(SHAPE)
    assert_close(shrunk.model(x), sparsify(copy.deepcopy(model), masks)(x))
    assert shrunk.model(x, features=True)[1].shape == (2, 4, 15, 15)


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x + y


class AnyInputs(nn.Module):
    def forward(self, *images):
        return images[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(TwoInputs, r".* missing 1 required positional argument: 'y'"), (AnyInputs, r"it takes .* inputs, \*images")],
)
def test_a_model_of_several_inputs_is_refused(model, reason):
    with pytest.raises(ValueError, match=f"torch.fx cannot trace the model: {reason}"):
        dependency_groups(model(), SHAPE)
