"""What both masked layers do alike: states that are loaded and read, new masks, averages, computed weights."""

import copy

import pytest
import torch
from helpers.masked_layers import is_zero_where_pruned
from helpers.tolerances import assert_close
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from sparse_adv import masks
from sparse_adv.nn import MaskedLinear, densify, sparsify

X = torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))
LAYERS = {"0": lambda: nn.Conv2d(2, 4, 3), "4": lambda: nn.Linear(64, 3)}
"""The two kinds of layers, and their names in a network."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def sparse() -> nn.Sequential:
    model = network()
    return sparsify(model, masks.prune(model, 0.4, linear=True))


def test_a_dense_state_is_missing_the_masks_of_a_model_on_meta():
    with torch.device("meta"):
        model = network()
    kept = masks.prune(network(), 0.4, linear=True)
    sparsify(model, {name: mask.to("meta") for name, mask in kept.items()})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight_mask"'):
        model.load_state_dict(network().state_dict(), assign=True)
    state = sparsify(network(), kept).state_dict()
    model.load_state_dict(state, assign=True)
    x = torch.rand(2, 2, 6, 6)
    torch.testing.assert_close(model(x), sparsify(network(), kept)(x))


@pytest.mark.parametrize("make", LAYERS.values(), ids=["conv", "linear"])
def test_weights_are_revived_from_0_after_a_write_by_hand(make):
    model = nn.Sequential(make())
    kept = torch.rand(model[0].weight.shape) < 0.5
    sparsify(model, {"0": kept})
    nn.init.ones_(model[0].weight)
    model[0].set_mask(torch.ones_like(kept))
    assert model[0].weight.equal(kept.float())


@pytest.mark.parametrize("make", LAYERS.values(), ids=["conv", "linear"])
def test_a_parametrized_layer_gets_no_other_mask(make):
    model = nn.Sequential(make())
    kept = torch.rand(model[0].weight.shape) < 0.5
    sparsify(model, {"0": kept})
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match="weight is computed from something else"):
        model[0].set_mask(~kept)
    assert model[0].weight_mask.equal(kept)


def test_the_refusal_of_spectral_norm_leaves_the_layer_whole():
    layer = sparse()[0]
    weight = layer.weight
    with pytest.raises(TypeError, match="spectral_norm cannot change a masked layer"):
        nn.utils.spectral_norm(layer)
    assert layer.weight is weight and layer(torch.rand(1, 2, 6, 6)).isfinite().all()


def test_a_state_that_is_read_between_two_backward_passes_changes_no_second_derivative():
    model, x = sparse(), torch.rand(2, 2, 6, 6)
    dense, mask = densify(copy.deepcopy(model)), model[0].weight_mask
    for each in (model, dense):
        each(x).square().sum().backward(create_graph=True)
        penalty = each[0].weight.grad.mul(mask).square().sum()
        each.state_dict()
        penalty.backward()
    for (name, parameter), twin in zip(model.named_parameters(), dense.parameters(), strict=True):
        kept = dict(model.named_buffers()).get(f"{name}_mask", torch.tensor(True))
        torch.testing.assert_close(parameter.grad, twin.grad * kept)


@pytest.mark.parametrize("assign", [setattr, MaskedLinear.register_buffer])
def test_a_buffer_in_place_of_the_mask_is_a_new_mask(assign):
    kept = torch.rand(4, 6) < 0.3
    layer = MaskedLinear(6, 4, mask=kept)
    assign(layer, "weight_mask", torch.ones_like(kept))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.rand(3, 6)).sum().backward()
    optimizer.step()
    assert layer.weight[~kept].all()
    with pytest.raises(ValueError, match="shape"):
        assign(layer, "weight_mask", kept[1:])
    assert layer.weight_mask.all()


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 4, 3), lambda: nn.Linear(5, 4)])
def test_a_forward_pass_and_a_state_dict_evaluate_a_parametrization_as_often_as_a_dense_layer(make):
    calls = []

    class Scale(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return 2 * weight

    def evaluations(layer):
        nn.utils.parametrize.register_parametrization(layer, "weight", Scale())
        calls.clear()
        layer(torch.rand(1, 2, 5, 5))
        forward = len(calls)
        layer.state_dict()
        return forward, len(calls) - forward

    dense = make()
    kept = torch.ones_like(dense.weight, dtype=torch.bool)
    sparse_layer = sparsify(nn.Sequential(copy.deepcopy(dense)), {"0": kept})[0]
    assert evaluations(sparse_layer) == evaluations(dense) == (1, 0)


@pytest.mark.parametrize("name", LAYERS)
def test_averaging_follows_the_mask(name):
    model = sparse()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    layer, average = model.get_submodule(name), averaged.module.get_submodule(name)
    layer.set_mask(masks.prune(model, 0.1, linear=True)[name])
    averaged.update_parameters(model)
    averaged(X)
    assert torch.equal(average.weight_mask, layer.weight_mask)
    assert is_zero_where_pruned(average)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_state_dict_is_loaded_under_the_mask(name):
    layer, dense = sparse().get_submodule(name), LAYERS[name]()
    mask = layer.weight_mask.clone()
    assert str(layer.load_state_dict(dense.state_dict())) == "<All keys matched successfully>"
    assert torch.equal(layer.weight, dense.weight * mask)
    assert torch.equal(layer.weight_mask, mask)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_state_dict_of_prune_sets_weight_and_mask(name, assign):
    layer, dense = sparse().get_submodule(name), LAYERS[name]()
    torch_prune.random_unstructured(dense, "weight", 0.7)
    torch_prune.random_unstructured(dense, "bias", 0.5)
    layer.load_state_dict(dense.state_dict(), assign=assign)
    assert torch.equal(layer.weight_mask, dense.weight_mask != 0)
    x = X if name == "0" else torch.rand(2, 64)
    assert_close(layer(x), dense(x))
    assert is_zero_where_pruned(layer)
