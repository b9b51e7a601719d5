"""Masked layers under `torch.func` and forward-mode AD: the values of a dense layer with zeros."""

import copy

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from sparse_adv import ops
from sparse_adv.masks import prune
from sparse_adv.nn import densify, frozen_weights, sparsify


def network() -> nn.Module:
    """Smooth, so that second derivatives are not 0; double, so that they agree to many digits."""
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="reflect")
    dense = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)).double()
    return sparsify(dense, prune(dense, 0.4, linear=True))


def twins() -> tuple[nn.Module, nn.Module]:
    model = network()
    return model, densify(copy.deepcopy(model))


def images(batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, 2, 6, 6, dtype=torch.float64)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_tangent_of_the_input(compiled):
    sparse, dense = twins()
    x, v = images(), images()

    def tangent(model):
        return lambda x, v: jvp(model, (x,), (v,))[1]

    f = torch.compile(tangent(sparse), backend="aot_eager") if compiled else tangent(sparse)
    assert tangent(dense)(x, v).any()
    assert_close(f(x, v), tangent(dense)(x, v))


def test_the_tangent_of_the_weights():
    """Tangents outside the mask have no effect, as pruned weights have none."""
    model, x = network(), images()
    parameters = dict(model.named_parameters())
    tangents = {name: torch.rand_like(p) for name, p in parameters.items()}
    masked = {name: t * model.get_buffer(f"{name}_mask") if "weight" in name else t for name, t in tangents.items()}
    dense = densify(copy.deepcopy(model))
    y = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (tangents,))[1]
    assert_close(y, jvp(lambda p: functional_call(dense, p, (x,)), (parameters,), (masked,))[1])


def test_dual_numbers_of_forward_mode():
    sparse, dense = twins()
    x, v = images(), images()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        assert_close(forward_ad.unpack_dual(sparse(dual)).tangent, forward_ad.unpack_dual(dense(dual)).tangent)


@pytest.mark.parametrize("transform", [jacfwd, jacrev, hessian, vmap])
def test_each_transform_of_the_input(transform):
    sparse, dense = twins()
    x = images()
    of = (lambda m: lambda x: m(x[None])) if transform is vmap else (lambda m: m)
    assert_close(transform(of(sparse))(x), transform(of(dense))(x))


def test_the_pullback():
    sparse, dense = twins()
    x, v = images(), torch.rand(3, 3, dtype=torch.float64)
    assert_close(vjp(sparse, x)[1](v)[0], vjp(dense, x)[1](v)[0])


def test_gradients_of_each_sample():
    model, x = network(), images()
    labels = torch.tensor([0, 1, 2])
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters, x, label):
        logits = functional_call(model, (parameters, buffers), (x[None],))
        return nn.functional.cross_entropy(logits, label[None])

    each = vmap(grad(loss), (None, 0, 0))(parameters, x, labels)
    for i in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            assert_close(each[name][i], parameter.grad)


def test_an_ensemble_whose_masks_differ():
    models, x = [network(), network()], images()
    parameters, buffers = stack_module_state(models)
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    assert_close(y, torch.stack([model(x) for model in models]))


def test_frozen_weights_have_no_tangent():
    model, x = network(), images()
    with frozen_weights(model):
        y = jvp(model, (x,), (x,))[1]
    assert_close(y, jvp(densify(copy.deepcopy(model)), (x,), (x,))[1])


def test_the_epilogue_of_the_op():
    mask, weight = torch.rand(4, 2, 3, 3) < 0.5, torch.rand(4, 2, 3, 3, dtype=torch.float64)
    x, residual = images(), torch.rand(3, 4, 4, 4, dtype=torch.float64)
    scale, bias = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    pattern = ops.compile_pattern(mask)
    primals = (x, weight, scale, bias, residual)

    def sparse(x, weight, scale, bias, residual):
        return ops.masked_conv2d(x, weight, pattern, bias, scale=scale, residual=residual, relu=True)

    def dense(x, weight, scale, bias, residual):
        y = nn.functional.conv2d(x, weight * mask) * scale[:, None, None] + bias[:, None, None]
        return (y + residual).relu()

    tangents = tuple(map(torch.rand_like, primals))
    for ours, theirs in zip(jvp(sparse, primals, tangents), jvp(dense, primals, tangents), strict=True):
        assert_close(ours, theirs)


def test_batch_norm_with_its_epilogue():
    x, v = images(), images()

    def dense(x):
        return (nn.functional.batch_norm(x, None, None, training=True) + x).relu()

    assert_close(jvp(lambda x: ops.batch_norm_act(x, residual=x, relu=True), (x,), (v,))[1], jvp(dense, (x,), (v,))[1])


def test_an_op_that_writes_into_its_output_is_refused():
    x = images()
    with pytest.raises(ValueError, match=r"pointwise_out writes into out: it cannot run under torch\.func or forward"):
        jvp(lambda x: ops.pointwise_out(x, out=torch.empty_like(x)), (x,), (x,))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pruned_weights_that_are_not_finite_count_nowhere(value):
    mask = torch.rand(4, 2, 3, 3) < 0.5
    pattern, x, v = ops.compile_pattern(mask), images(), images()
    weight = torch.rand(4, 2, 3, 3, dtype=torch.float64)
    spoilt, zeroed = weight.where(mask, value), weight.where(mask, 0)

    def f(weight):
        return lambda x: ops.masked_conv2d(x, weight, pattern)

    for actual, expected in zip(jvp(f(spoilt), (x,), (v,)), jvp(f(zeroed), (x,), (v,)), strict=True):
        assert_close(actual, expected)
    assert_close(vmap(f(spoilt))(x[:, None]), vmap(f(zeroed))(x[:, None]))
    for gradient in (grad, jacrev):
        wanted = gradient(lambda w: f(w)(x).square().sum())(zeroed)
        assert_close(gradient(lambda w: f(w)(x).square().sum())(spoilt), wanted)
