"""`torch.func.functional_call` computes with the tensors that it is given, and leaves them and the layer alone."""

import copy

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn
from torch.func import functional_call

from sparse_adv import attacks, masks
from sparse_adv.nn import MaskedConv2d, MaskedLinear, frozen_weights, sparsify
from sparse_adv.ops import PASSES


def conv() -> MaskedConv2d:
    return MaskedConv2d(3, 8, 3, mask=torch.rand(8, 3, 3, 3) < 0.3)


def linear() -> MaskedLinear:
    return MaskedLinear(9, 5, mask=torch.rand(5, 9) < 0.4)


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("given", [("weight",), ("weight_mask",), ("weight", "weight_mask")])
@pytest.mark.parametrize("kind", [torch.Tensor, nn.Parameter])
def test_what_is_given_is_computed_with_and_not_written_to(make, given, kind):
    torch.manual_seed(0)
    layer, x = make(), torch.rand(2, 3, 9, 9)
    before, own = copy.deepcopy(layer.state_dict()), layer(x).detach()
    other = {"weight": torch.randn_like(layer.weight.detach()), "weight_mask": ~layer.weight_mask}
    other["weight"] = nn.Parameter(other["weight"]) if kind is nn.Parameter else other["weight"].requires_grad_()
    tensors = {name: other[name] for name in given}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    dense = nn.Conv2d(3, 8, 3) if isinstance(layer, nn.Conv2d) else nn.Linear(9, 5)
    values = before | copies
    reference = {"weight": values["weight"] * values["weight_mask"], "bias": before["bias"]}
    for _ in range(2):
        assert_close(functional_call(layer, tensors, (x,)), functional_call(dense, reference, (x,)))
    if "weight" in given:
        functional_call(layer, tensors, (x,)).sum().backward()
        assert not other["weight"].grad[~values["weight_mask"]].any()
    assert all(tensors[name].equal(value) for name, value in copies.items())
    assert_close(layer(x), own)
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("make", [conv, linear])
def test_an_optimiser_keeps_the_mask_of_the_layer_and_not_that_of_a_call(make):
    layer, x = make(), torch.rand(2, 3, 9, 9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    mask = layer.weight_mask.clone()
    for _ in range(2):
        functional_call(layer, {"weight_mask": ~mask, "weight": torch.randn_like(layer.weight)}, (x,))
        layer(x).sum().backward()
        optimizer.step()
        assert not layer.weight[~mask].any() and layer.weight[mask].all()
        assert layer.weight_mask.equal(mask)


@pytest.mark.parametrize("make", [conv, linear])
def test_an_assigned_mask_is_that_of_the_layer(make):
    layer, x = make(), torch.rand(2, 3, 9, 9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask = torch.rand(layer.weight.shape) < 0.5
    layer.weight_mask = mask
    assert not layer.weight[~mask].any()
    layer(x).square().sum().backward()
    optimizer.step()
    assert not layer.weight[~mask].any() and layer.weight[mask].all()
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .*, got torch\.float32"):
        layer.weight_mask = mask.float()
    with pytest.raises(ValueError, match="mask has shape"):
        layer.weight_mask = mask[:2]
    assert layer.weight_mask.equal(mask)


@pytest.mark.parametrize("make", [conv, linear])
def test_type_converts_a_layer_as_to_does(make):
    layer, x = make(), torch.rand(2, 3, 9, 9)
    expected = copy.deepcopy(layer).to(torch.float64)(x.double())
    converted = nn.Sequential(layer).type(torch.float64)
    assert converted[0].weight_mask.dtype == torch.bool and converted[0].weight.dtype == torch.float64
    assert_close(converted(x.double()), expected)


def test_the_layer_keeps_its_block_and_what_tune_chose():
    mask = (torch.rand(4, 4, 3, 3) < 0.3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    layer, x = MaskedConv2d(16, 16, 3, mask=mask, block=(4, 4)), torch.rand(2, 16, 8, 8)
    layer.choose_kernels({name: {"kernel": "dense"} for name in PASSES})
    before, pattern = layer.choices, layer.pattern
    functional_call(layer, {"weight_mask": torch.rand(mask.shape) < 0.5}, (x,))
    assert layer.block == (4, 4, 1, 1) and layer.choices == before
    layer(x)
    assert layer.pattern is pattern
    layer.weight_mask.copy_(torch.rand(mask.shape) < 0.5)  # its own mask: other kernels may be faster now
    layer(x)
    assert layer.block == (1, 1, 1, 1) and layer.choices is None


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


@pytest.mark.parametrize("engine", [True, False])
def test_attacks_differentiate_the_parameters_of_a_functional_call(engine):
    class Averaged(nn.Module):
        def __init__(self, net, other):
            super().__init__()
            self.net, self.other = net, other

        def forward(self, x):
            return torch.func.functional_call(self.net, self.other, x)

    net = sparsify(network(), masks.prune(network(), 0.4, linear=True))
    other = {name: torch.randn_like(value) for name, value in net.named_parameters()}
    for name, layer in net.named_modules():
        if hasattr(layer, "weight_mask"):
            other[f"{name}.weight"] = other[f"{name}.weight"] * layer.weight_mask
    model, x = Averaged(net, other).eval(), torch.rand(4, 2, 6, 6)
    dense = network()
    dense.load_state_dict(other, strict=False)
    with frozen_weights(model):
        torch.testing.assert_close(model(x), dense(x))
    options = {"eps": 0.1, "alpha": 0.05, "steps": 2, "random_start": False, "engine": engine}
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(attacks.pgd(model, x, labels, **options), attacks.pgd(dense, x, labels, **options))
