"""Parameters in the steps that autograd computes: no gradient of them is formed in an attack."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import attacks, engine, masks, sparsify


class Calls(TorchDispatchMode):
    """Collects the names of the ops that are called, and which gradients convolutions form."""

    def __init__(self):
        super().__init__()
        self.names, self.weight_gradients = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        if func is torch.ops.aten.convolution_backward.default:
            self.weight_gradients += args[-1][1]
        return func(*args, **(kwargs or {}))


class SharedParameter(nn.Module):
    """Each of four layers reads the same parameter, alone or after a computation."""

    def __init__(self, shape, function):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(shape))
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])
        self.function = function

    def forward(self, x):
        x, shared = self.stem(x), self.shared.exp()
        for conv in self.convs:
            x = conv(self.function(x, shared)) + self.function(x, self.shared)
        return x.mean((2, 3))


READ = {
    "a number": ((), torch.mul),
    "a number in a vector": ((1,), torch.add),
    "a number per channel": ((4, 1, 1), torch.mul),
    "a weight": ((4, 4, 3, 3), lambda x, weight: F.conv2d(x, weight, padding=1)),
    "as large as an image": ((1, 4, 5, 5), torch.add),
}


@pytest.mark.parametrize("name", READ)
def test_a_parameter_that_many_steps_read_gets_no_gradient(name):
    torch.manual_seed(0)
    model, x = SharedParameter(*READ[name]).double().eval(), torch.rand(6, 3, 7, 7).double()

    def loss(logits):
        return logits.square().sum(1)

    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        with Calls() as calls:
            actual = gradients.gradient(x, loss)
    assert calls.weight_gradients == 0
    torch.testing.assert_close(actual, engine.Autograd(model).gradient(x, loss))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_masked_layers_that_are_left_to_autograd_form_no_gradient_of_the_weight(mode):
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Flatten()]
    model, x = nn.Sequential(*layers).eval(), torch.rand(4, 3, 6, 6)
    sparsify(model, masks.prune(model, density=0.2, block=(4, 1)))
    attacks.pgd(model, x, torch.arange(4), steps=1)  # makes the program
    with Calls() as calls:
        attacks.pgd(model, x, torch.arange(4), steps=2)
    assert "sparse_adv::masked_conv2d_grad_input" in calls.names
    assert "sparse_adv::masked_conv2d_grad_weight" not in calls.names
    assert model(x).requires_grad
