"""Whole models: dense to sparse and back."""

import copy
import sys

import pytest
import torch
from helpers.copies import Copies
from helpers.tolerances import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparse_adv.masks import SUPPORTED_BLOCKS, from_state_dict, prune
from sparse_adv.nn import MaskedConv2d, MaskedLinear, densify, explain, shrink, sparsify
from sparse_adv.ops.masked_conv2d_mask import check_block, check_mask, obeys


class Block(nn.Module):
    """A residual block whose shortcut is reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 8, 1, bias=False)
        self.paths = nn.ModuleList([self.conv1, self.shortcut])
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv1(x)) + self.paths[1](x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(36, 2))


@pytest.fixture
def x():
    return torch.rand(2, 4, 5, 5)


def test_sparsify_masks_in_place_and_keeps_parameters(model, x):
    masks = prune(model, 0.4)
    expected = copy.deepcopy(model)
    for name, mask in masks.items():
        expected.get_submodule(name).weight.data.mul_(mask)
    parameters = dict(model.named_parameters())
    assert sparsify(model, masks) is model
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert_close(model(x), expected(x))
    assert all(isinstance(model.get_submodule(name), MaskedConv2d) for name in masks)


def test_a_module_with_two_names_becomes_one_layer(model):
    sparsify(model, prune(model, 0.4))
    assert model[0].paths[1] is model[0].shortcut and isinstance(model[0].shortcut, MaskedConv2d)
    again = copy.deepcopy(model)
    masks = {"0.shortcut": again[0].shortcut.weight_mask.clone()}
    with pytest.raises(ValueError, match=r"module '0.paths.1' has another name with another mask"):
        sparsify(again, masks | {"0.paths.1": ~masks["0.shortcut"]})
    sparsify(again, masks | {"0.paths.1": masks["0.shortcut"]})


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (4, 4), (1, 1, 3, 3)])
def test_without_a_block_the_largest_one_is_taken(block):
    model = nn.Sequential(nn.Conv2d(32, 32, 3))
    sparsify(model, prune(model, 0.4, block))
    assert model[0].block == (*block, 1, 1)[:4]


def test_a_stated_block_must_be_obeyed(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"module '0.conv1': mask does not obey block \(4, 4, 1, 1\)"):
        sparsify(model, prune(model, 0.4), block=(4, 4))
    assert before.keys() == model.state_dict().keys()
    sparsify(model, prune(model, 0.4, (4, 2)), block=(2, 2))
    assert model[2].block == (2, 2, 1, 1)


def bad_masks(masks):
    yield masks | {"0.conv2": masks["2"]}, ValueError, "model has no module '0.conv2'; did you mean '0.conv1'?"
    yield masks | {"3": masks["2"]}, TypeError, "module '3': only Conv2d and Linear layers can be masked, got Flatten"
    yield (
        masks | {"4": masks["2"]},
        ValueError,
        r"module '4': mask has shape \(4, 8, 3, 3\), weight has",
    )
    yield masks | {"2": masks["2"][:2]}, ValueError, r"module '2': mask has shape \(2, 8, 3, 3\), weight has"
    yield masks | {"2": masks["2"].float()}, TypeError, "module '2': mask must be a bool tensor .* got torch.float32"


@pytest.mark.parametrize("case", range(5))
def test_if_anything_is_wrong_nothing_changes(model, case):
    masks, error, sentence = list(bad_masks(prune(model, 0.4)))[case]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=sentence):
        sparsify(model, masks)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in after)


def calls(work, *functions) -> dict[str, int]:
    """How often each of the functions is called, by any caller."""
    names = {function.__code__: function.__name__ for function in functions}
    counts = dict.fromkeys(names.values(), 0)

    def count(frame, event, _) -> None:
        if event == "call" and frame.f_code in names:
            counts[names[frame.f_code]] += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counts


@pytest.mark.parametrize(("block", "searches"), [((2, 2), 1), (None, len(SUPPORTED_BLOCKS))])
def test_a_mask_is_checked_once_and_copied_for_the_buffer_and_for_the_pattern(block, searches):
    conv = nn.Conv2d(8, 8, 3)
    mask = prune(conv, 0.4, (2, 2))[""]
    with Copies(mask.shape, torch.bool) as copies:
        counts = calls(lambda: sparsify(conv, {"": mask}, block), check_mask, check_block, obeys)
    assert counts["check_mask"] == 1 and counts["check_block"] <= searches
    assert 1 <= counts["obeys"] <= searches  # without a block, once for each block that is tried
    assert copies.count == 2


def test_a_linear_mask_is_checked_once():
    linear = nn.Linear(8, 8)
    mask = prune(linear, 0.4, (2, 2), linear=True)[""]
    counts = calls(lambda: sparsify(linear, {"": mask}, (2, 2)), check_mask, check_block, obeys)
    assert counts == {"check_mask": 1, "check_block": 1, "obeys": 1}


def test_a_shared_weight_needs_one_mask_everywhere():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
    model[1].weight = model[0].weight
    masks = prune(model, 0.5)
    for wrong in ({"0": masks["0"]}, masks | {"1": ~masks["1"]}):
        with pytest.raises(ValueError, match=r"module '.' shares its weight with a module that gets another mask"):
            sparsify(model, wrong)
    sparsify(model, masks)
    assert model[1].weight is model[0].weight
    x = torch.rand(1, 4, 6, 6)
    assert_close(model(x), densify(copy.deepcopy(model))(x))


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Linear(4, 4)], ids=["conv", "linear"]
)
def test_masks_on_the_meta_device(make):
    model = nn.Sequential(make(), make()).to("meta")
    model[1].weight = model[0].weight
    mask = torch.empty_like(model[0].weight, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"module '.' shares its weight with a module that gets another mask"):
        sparsify(model, {"0": mask, "1": torch.empty_like(mask)})
    with pytest.raises(ValueError, match=r"module '.' shares its weight with a module that gets another mask"):
        sparsify(model, {"0": torch.ones_like(mask, device="cpu"), "1": mask})
    sparsify(model, {"0": mask, "1": mask}, block=(2, 1))
    assert model(torch.empty(1, 4, 4, 4, device="meta")).shape == (1, 4, 4, 4) and model[1].weight_mask.is_meta
    with pytest.raises(ValueError, match="module '0': mask is on the meta device and has no values, weight is on cpu"):
        sparsify(nn.Sequential(make()), {"0": mask})


def test_a_sparse_model_takes_new_masks(model, x):
    sparsify(model, prune(model, 0.6, linear=True))
    layers = model[2], model[4]
    sparsify(model, prune(model, 0.3, linear=True))
    assert (model[2], model[4]) == layers
    assert explain(model).density == pytest.approx(0.3, abs=2e-3)


def test_linear_layers_are_converted_like_convolutions(model, x):
    keys, masks = list(model.state_dict()), prune(model, 0.4, linear=True)
    expected = copy.deepcopy(model)
    for name, mask in masks.items():
        expected.get_submodule(name).weight.data.mul_(mask)
    weight = model[4].weight
    sparsify(model, masks)
    assert isinstance(model[4], MaskedLinear) and model[4].weight is weight
    assert_close(model(x), expected(x))
    densify(model)
    assert type(model[4]) is nn.Linear and model[4].weight is weight
    assert vars(model[4]).keys() == vars(nn.Linear(2, 2)).keys()
    assert list(model.state_dict()) == keys
    assert_close(model(x), expected(x))


def test_a_stated_block_holds_for_linear_layers_too(model):
    masks = prune(model, 0.4, (2, 4), linear=True)
    with pytest.raises(ValueError, match=r"module '4': mask does not obey block \(2, 4, 1, 1\)"):
        sparsify(model, masks | {"4": prune(model, 0.4, linear=True)["4"]}, block=(2, 4))
    assert type(model[4]) is nn.Linear
    sparsify(model, masks, block=(2, 4))


def test_a_model_that_is_a_convolution_is_replaced():
    conv = nn.Conv2d(4, 4, 3)
    layer = sparsify(conv, prune(conv, 0.5))
    assert isinstance(layer, MaskedConv2d) and layer.weight is conv.weight
    assert type(densify(layer)) is nn.Conv2d


@pytest.mark.parametrize("written", ["weight", "weight_mask"])
def test_densify_has_zeros_where_weight_or_mask_were_written_by_hand(model, x, written):
    sparsify(model, prune(model, 0.4, linear=True))
    for layer in (model[2], model[4]):
        getattr(layer, written).data.fill_(1)
        layer.weight_mask[1] = False
    expected = copy.deepcopy(model)(x)
    assert_close(densify(model)(x), expected)
    assert not model[2].weight[1].any() and not model[4].weight[1].any()


def test_densify_returns_plain_layers_and_a_plain_state_dict(model, x):
    keys = list(model.state_dict())
    sparsify(model, prune(model, 0.4))
    expected = model(x)
    assert densify(model) is model
    assert list(model.state_dict()) == keys
    assert type(model[0].conv1) is type(model[2]) is nn.Conv2d
    assert model[0].paths[0] is model[0].conv1
    assert_close(model(x), expected)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    assert vars(model[2]).keys() == vars(nn.Conv2d(8, 4, 3)).keys()


def test_a_layer_that_was_compiled_calls_the_one_that_replaces_it(model):
    """`layer.compile()` stores what calls the layer on which it was called."""
    x, masks = torch.rand(1, 8, 5, 5), prune(model, 0.4)
    for replace in (lambda: sparsify(model, masks)[2], lambda: copy.deepcopy(model[2]), lambda: densify(model)[2]):
        model[2].compile(backend="eager")
        new = replace()
        new.weight = nn.Parameter(torch.zeros_like(new.weight))
        assert_close(new(x), new.bias[None, :, None, None].expand(1, 4, 3, 3))


@pytest.mark.parametrize("index", [2, 4])
def test_a_forward_set_on_a_layer_is_refused_and_nothing_changes(model, x, index):
    """As accelerate sets it: it calls the layer on which it was set, whichever has taken its place."""
    masks, expected, old = prune(model, 0.4, linear=True), model(x), model[index]
    sentence = rf"module '{index}': a forward that was set on this .* computes its output: remove that first"
    old.forward = old.forward
    with pytest.raises(TypeError, match=sentence):
        sparsify(model, masks)
    assert torch.equal(model(x), expected)
    del old.forward
    layer, expected = sparsify(model, masks)[index], model(x)
    layer.forward = layer.forward
    assert sparsify(model, masks)[index] is layer
    for refused in (densify, lambda model: model[index].to_dense()):
        with pytest.raises(TypeError, match="a forward that was set on this Masked"):
            refused(model)
    assert isinstance(model[2], MaskedConv2d) and torch.equal(model(x), expected)


@pytest.mark.parametrize("index", [2, 4])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parametrized_layer_is_refused_and_nothing_changes(model, x, index, name):
    masks = prune(model, 0.4, linear=True)
    parametrize.register_parametrization(model[index], name, nn.Softplus())
    keys, expected = list(model.state_dict()), model(x)
    sentence = rf"module '{index}': {name} is computed from something else .*: make that permanent"
    with pytest.raises(TypeError, match=sentence):
        sparsify(model, masks)
    assert list(model.state_dict()) == keys and torch.equal(model(x), expected)
    parametrize.remove_parametrizations(model[index], name)
    sparsify(model, masks)
    parametrize.register_parametrization(model[index], name, nn.Softplus())
    keys, expected = list(model.state_dict()), model(x)
    for refuse in (densify, lambda model: shrink(model, None, x.shape)):
        with pytest.raises(TypeError, match=sentence):
            refuse(model)
    assert list(model.state_dict()) == keys and torch.equal(model(x), expected)


def test_the_refusal_of_a_model_that_pytorch_pruned_names_the_way_to_sparsify_it(model, x):
    for layer in (model[2], model[4]):
        torch_prune.l1_unstructured(layer, "weight", 0.5)
    expected = model(x)
    masks, _ = from_state_dict(model.state_dict())
    with pytest.raises(TypeError, match=r"after taking its masks, .* masks\.from_state_dict\(model\.state_dict\(\)\)$"):
        sparsify(model, masks)
    for layer in (model[2], model[4]):
        torch_prune.remove(layer, "weight")
    sparsify(model, masks)
    assert model[2].density == model[4].density == 0.5
    assert_close(model(x), expected)


def test_names_that_a_user_excluded_from_ddp_stay_excluded(model, x):
    ignore = "_ddp_params_and_buffers_to_ignore"
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [f"{layer}.bias", "other"])
    sparse = sparsify(model, prune(model, 0.5))
    assert set(getattr(sparse, ignore)) >= {f"{layer}.bias", "other", f"{layer}.weight_mask"}
    assert set(getattr(densify(sparse), ignore)) == {f"{layer}.bias", "other"}


def test_a_masked_layer_inside_of_another_is_replaced_too():
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    model[0].child = nn.Conv2d(2, 2, 1)
    kept = {"0": torch.rand(2, 2, 3, 3) < 0.5, "0.child": torch.rand(2, 2, 1, 1) < 0.5}
    sparsify(model, kept)
    assert isinstance(model[0], MaskedConv2d) and isinstance(model[0].child, MaskedConv2d)
