"""Code that decides gradients itself: it is left to autograd where a trace would not show what it decides."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from helpers.own_network import X, assert_as_autograd, new
from torch import nn

from sparse_adv import engine


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


clip = Clipped.apply


def stopped(self, x):
    with torch.no_grad():
        factor = torch.tanh(3 * x)
    return x + x * factor * 1e-9


def tolerant(self, x):
    try:
        return Clipped.apply(x)
    except Exception:
        return F.gelu(x)


_results = []


def with_another_thread(self, x):
    with ThreadPoolExecutor(1) as pool:
        _results.append(pool.submit(lambda: clip(nn.ReLU()(X.clone().requires_grad_()))).result())
    return F.gelu(x)


def in_bfloat16(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return F.gelu(x @ x)


HIDDEN = {
    "autograd function": (lambda self, x: Clipped.apply(x), "Clipped, an autograd function"),
    "its method": (lambda self, x: clip(x), "Clipped, an autograd function"),
    "its method as an attribute": (lambda self, x: self.held(x), "Clipped, an autograd function"),
    "in code that catches errors": (tolerant, "Clipped, an autograd function"),
    "no_grad": (stopped, "stops gradients"),
    "autocast": (in_bfloat16, "stops gradients or changes autocast"),
    "inference": (lambda self, x: x + torch.inference_mode()(torch.tanh)(x) * 1e-9, "stops gradients"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_code_that_decides_gradients_is_refused_however_small_its_part(name):
    code, said = HIDDEN[name]
    (line,) = engine.explain(new(clip, act=code), X)
    assert line.startswith("autograd: ") and said in line


@pytest.mark.parametrize("use_grad", [True, False])
@pytest.mark.parametrize(
    "code", [lambda self, x: x * x.detach().sigmoid(), lambda self, x: x * x.data.sigmoid()], ids=["detach", "data"]
)
def test_what_a_graph_shows_of_stopped_gradients_is_right(code, use_grad):
    model = new(act=code)
    with torch.set_grad_enabled(use_grad):
        assert not engine.explain(model, X)[0].startswith("autograd")
        assert_as_autograd(model)


def test_other_threads_use_autograd_functions_and_modules_while_a_model_is_traced():
    assert not engine.explain(new(act=with_another_thread), X)[0].startswith("autograd")
    assert all(isinstance(y, torch.Tensor) and y.requires_grad for y in _results)
    assert len(_results) >= 2
    assert "__getattribute__" not in vars(nn.Module)
