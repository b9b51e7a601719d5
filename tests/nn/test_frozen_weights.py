"""`frozen_weights`: a context in which weights do not change and get no gradients."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.tolerances import assert_close
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedLinear, densify, frozen_weights, sparsify


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    convolutions = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(36, 2))


@pytest.fixture
def x():
    return torch.rand(2, 4, 5, 5)


def test_frozen_weights_get_no_gradient(model, x):
    sparsify(model, prune(model, 0.4))
    expected = model.eval()(x)
    x.requires_grad_()
    with frozen_weights(model):
        y = model(x)
        y.sum().backward()
    assert_close(y, expected)
    assert x.grad.any()
    assert model[2].weight.grad is None and model[2].bias.grad is None and model[4].weight.grad is not None
    model(x).sum().backward()
    assert model[2].weight.grad is not None


def test_input_gradients_are_the_same_while_weights_are_frozen(model, x):
    sparsify(model, prune(model, 0.4))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with frozen_weights(model):
        (actual,) = torch.autograd.grad(model(x).square().sum(), x)
    assert_close(actual, expected)


@pytest.mark.parametrize("index", [2, 4])
@pytest.mark.parametrize("inner", [None, torch.float16, torch.bfloat16])
def test_frozen_weights_have_the_dtype_of_each_region_of_autocast(model, index, inner):
    """None stands for a region without autocast."""
    layer = sparsify(model, prune(model, 0.4, linear=True))[index]
    x = torch.rand((2, 8, 5, 5) if index == 2 else (2, 36))
    for outer in (torch.bfloat16, None):
        with torch.autocast("cpu", outer, enabled=outer is not None):
            with torch.autocast("cpu", inner, enabled=inner is not None):
                expected = layer(x)
            with frozen_weights(model), torch.autocast("cpu", inner, enabled=inner is not None):
                with torch.inference_mode():
                    layer(x)
                actual = layer(x.clone().requires_grad_())
        assert actual.dtype == (inner or torch.float32)
        assert torch.equal(actual, expected)
        actual.sum().backward()


def test_weights_are_frozen_until_the_outermost_context_ends_even_by_an_exception(model, x):
    sparsify(model, prune(model, 0.4))
    with pytest.raises(RuntimeError, match="stop"), frozen_weights(model):
        with frozen_weights(model):
            pass
        assert not model[2](torch.rand(1, 8, 5, 5)).requires_grad
        raise RuntimeError("stop")
    with torch.no_grad():
        model[2].weight.zero_()
    y = model[2](torch.rand(1, 8, 3, 3))
    assert y.requires_grad
    assert_close(y.flatten(), model[2].bias)


def test_checkpointed_layers_are_frozen_only_where_their_thread_runs_the_backward_pass(model, x):
    sparsify(model, prune(model, 0.4))
    with frozen_weights(model):
        model.eval()
        checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
        assert x.grad.any() and model[2].weight.grad is None
        y = checkpoint(model, x, use_reentrant=False).sum()
        with ThreadPoolExecutor() as pool, pytest.raises(CheckpointError):
            pool.submit(y.backward).result()


def test_pruned_entries_written_by_hand_do_not_count_while_weights_are_frozen(model):
    layer = sparsify(model, prune(model, 0.4))[2]
    x = torch.rand(1, 8, 5, 5)
    expected = layer(x)
    with torch.no_grad():
        layer.weight.add_(~layer.weight_mask)
    assert_close(layer(x), expected)
    with frozen_weights(model):
        assert_close(layer(x), expected)


def test_an_interrupt_while_weights_are_frozen_freezes_none(model, x, monkeypatch):
    sparsify(model, prune(model, 0.4, linear=True))

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskedLinear, "freeze", interrupt)
    with pytest.raises(KeyboardInterrupt), frozen_weights(model):
        pass
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_weights_frozen_in_inference_mode_give_the_gradients_of_the_input_outside_of_it(model, x):
    sparsify(model, prune(model, 0.4, linear=True))
    (expected,) = torch.autograd.grad(densify(copy.deepcopy(model))(x.requires_grad_()).square().sum(), x)
    with torch.inference_mode(), frozen_weights(model), torch.inference_mode(False):
        (actual,) = torch.autograd.grad(model(x).square().sum(), x)
    assert_close(actual, expected)
