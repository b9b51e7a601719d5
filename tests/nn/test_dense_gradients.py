"""Gradients of pruned weights equal those of a dense layer with the same weights; nothing else changes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from sparse_adv import engine
from sparse_adv.nn import MaskedConv2d, MaskedLinear, dense_gradients, densify, frozen_weights, sparsify


def random_mask(shape, density=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


def gradients_of(model, x):
    model.zero_grad()
    with dense_gradients(model) as gradients:
        (model(x) ** 2).sum().backward()
    return gradients


@settings(deadline=None, max_examples=40)
@given(
    channels=st.sampled_from([(1, 3, 1), (4, 6, 1), (4, 6, 2), (5, 5, 5), (8, 4, 1)]),
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same", "reflect"]),
    dilation=st.integers(1, 2),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_convolution(channels, kernel, stride, padding, dilation, density):
    inputs, outputs, groups = channels
    mode = "reflect" if padding == "reflect" else "zeros"
    options = {
        "stride": 1 if padding == "same" else stride,
        "padding": 1 if mode == "reflect" else padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
    }
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, **options)
    layer = MaskedConv2d.from_dense(conv, random_mask(conv.weight.shape, density), (1, 1))
    dense = densify(nn.Sequential(copy.deepcopy(layer)))
    x = torch.randn(2, inputs, 8, 7)
    gradients = gradients_of(nn.Sequential(layer), x)["0"]
    (dense(x) ** 2).sum().backward()
    assert_close(gradients, dense[0].weight.grad)
    assert_close(layer.weight.grad, torch.where(layer.weight_mask, dense[0].weight.grad, 0))
    assert_close(layer.bias.grad, dense[0].bias.grad)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_linear(shape):
    torch.manual_seed(0)
    layer = MaskedLinear(5, 4, mask=random_mask((4, 5)))
    dense = densify(nn.Sequential(copy.deepcopy(layer)))
    x = torch.randn(shape)
    gradients = gradients_of(nn.Sequential(layer), x)["0"]
    (dense(x) ** 2).sum().backward()
    assert_close(gradients, dense[0].weight.grad)
    assert_close(layer.weight.grad, torch.where(layer.weight_mask, dense[0].weight.grad, 0))


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return sparsify(model, {name: random_mask(model[int(name)].weight.shape) for name in ("0", "3")}, (1, 1))


def test_calls_add_up_and_frozen_and_gradless_ones_add_nothing():
    model, x = network(), torch.randn(2, 2, 6, 6)
    once = gradients_of(model, x)
    with dense_gradients(model) as twice:
        for _ in range(2):
            (model(x) ** 2).sum().backward()
        with torch.no_grad():
            model(x)
        with frozen_weights(model):
            (model(x.clone().requires_grad_()) ** 2).sum().backward()
    assert_close(twice["3"], 2 * once["3"])
    assert once.keys() == twice.keys() == {"0", "3"}


def test_the_calls_of_one_layer_in_a_pass_add_up():
    torch.manual_seed(0)
    layer = MaskedConv2d.from_dense(nn.Conv2d(3, 3, 3, padding=1), random_mask((3, 3, 3, 3)), (1, 1))
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 3, 6, 6)
    dense = densify(copy.deepcopy(model))
    gradients = gradients_of(model, x)["0"]
    (dense(x) ** 2).sum().backward()
    assert_close(gradients, dense[0].weight.grad)
    assert_close(layer.weight.grad, torch.where(layer.weight_mask, dense[0].weight.grad, 0))


def test_after_the_block_gradients_are_sparse_again_also_after_an_error():
    model, x = network(), torch.randn(2, 2, 6, 6)
    with pytest.raises(ZeroDivisionError), dense_gradients(model) as gradients:
        raise ZeroDivisionError
    (model(x) ** 2).sum().backward()
    assert gradients == {}
    pickled = copy.deepcopy(model)
    assert pickled[0].weight.equal(model[0].weight)


def test_outputs_and_input_gradients_are_those_of_the_sparse_layer():
    model, x = network(), torch.randn(2, 2, 6, 6, requires_grad=True)
    plain = model(x)
    (expected,) = torch.autograd.grad((plain**2).sum(), x)
    with dense_gradients(model):
        output = model(x)
        (gradient,) = torch.autograd.grad((output**2).sum(), x)
    assert output.equal(plain) and gradient.equal(expected)


def test_a_model_fused_for_training_is_not_traced_anew():
    model, x = network(), torch.randn(2, 2, 6, 6)
    fused = engine.fuse_for_training(model, x)
    with dense_gradients(model) as gradients:
        assert engine.fuse_for_training(model, x) is fused
        F.relu(fused(x)).sum().backward()
    assert gradients.keys() == {"0", "3"}


def test_under_autocast_they_have_the_dtype_of_the_weight():
    model, x = network(), torch.randn(2, 2, 6, 6)
    expected = gradients_of(model, x)["0"]
    with torch.autocast("cpu", torch.bfloat16):
        half = gradients_of(model, x)["0"]
    assert half.dtype == torch.float32
    assert (half - expected).norm() < 0.05 * expected.norm()


def gradients_of_parameters(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_second_derivatives_are_those_of_a_dense_layer():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).double()
    sparsify(model, {name: random_mask(model[int(name)].weight.shape) for name in ("0", "2", "5")}, (1, 1))
    dense = densify(copy.deepcopy(model))

    def penalise(network):
        x = torch.ones(2, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()

    with dense_gradients(model) as gradients:
        penalise(model)
    penalise(dense)
    for name, gradient in gradients.items():
        layer, expected = model[int(name)], dense[int(name)].weight.grad
        assert_close(gradient, expected)
        assert_close(layer.weight.grad, torch.where(layer.weight_mask, expected, 0))
        assert expected[~layer.weight_mask].any()
    assert gradients.keys() == {"0", "2", "5"}


def test_an_inner_block_takes_nothing_from_the_outer_one():
    model, x = network(), torch.randn(2, 2, 6, 6)
    with dense_gradients(model) as outer:
        inner = gradients_of(model, x)
        (model(x) ** 2).sum().backward()
    assert_close(outer["3"], 2 * inner["3"])


def test_blocks_of_two_threads_end_independently():
    model, x = network(), torch.randn(2, 2, 6, 6)
    once = gradients_of(model, x)
    with ThreadPoolExecutor(1) as other, dense_gradients(model) as gradients:
        block = dense_gradients(model)
        of_other = other.submit(block.__enter__).result()
        (model(x) ** 2).sum().backward()
        other.submit(block.__exit__, None, None, None).result()
        (model(x) ** 2).sum().backward()
    assert_close(of_other["3"], once["3"])
    assert_close(gradients["3"], 2 * once["3"])


def test_torch_func_computes_the_masked_gradients_and_adds_nothing():
    torch.manual_seed(0)
    layer = MaskedLinear(5, 4, mask=random_mask((4, 5)))
    with dense_gradients(layer) as gradients:
        weight = layer.weight.detach()
        gradient = torch.func.grad(lambda w: torch.func.functional_call(layer, {"weight": w}, torch.ones(5)).sum())
        assert_equal(gradient(weight), layer.weight_mask.float())
    assert gradients == {}


def test_a_layer_whose_weight_is_fixed_adds_nothing():
    model, x = network(), torch.randn(2, 2, 6, 6)
    model[3].weight.requires_grad_(False)
    assert gradients_of(model, x).keys() == {"0"}


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_models_form_them_too_and_stay_compiled(fullgraph):
    model, x = network(), torch.randn(2, 2, 6, 6)
    expected, kept = gradients_of(model, x), gradients_of_parameters(model)
    backend = CompileCounter()
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    compiled(x)
    model.zero_grad()
    with dense_gradients(model) as gradients:
        (compiled(x) ** 2).sum().backward()
    compiled(x)
    assert backend.frame_count == 1 and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name])
    for gradient, value in zip(gradients_of_parameters(model), kept, strict=True):
        assert_close(gradient, value)


def test_dense_gradients_in_bfloat16_are_right_at_strides():
    draw = torch.Generator().manual_seed(0)
    for stride, padding, pixels in ((2, 1, 1), (3, 1, 2), (2, 2, 3)):
        layer = nn.Conv2d(16, 16, 3, stride, padding)
        model = sparsify(nn.Sequential(layer), {"0": torch.rand(16, 16, 3, 3, generator=draw) < 0.5}).bfloat16()
        x = torch.randn(4, 16, pixels, pixels, generator=draw).bfloat16()
        out = copy.deepcopy(model)(x)
        grad = torch.randn(out.shape, generator=draw).bfloat16()
        weight = model[0].weight.detach().double().requires_grad_()
        F.conv2d(x.double(), weight, None, stride, padding).backward(grad.double())
        for _ in range(10):
            junk = [torch.full((size,), 7e33) for size in (64, 1024, 20_000)]
            del junk
            with dense_gradients(model) as gradients:
                model(x).backward(grad)
            (found,) = gradients.values()
            torch.testing.assert_close(found.double(), weight.grad, rtol=0.05, atol=0.2)
