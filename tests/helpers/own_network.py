"""A network with code of its own, which the engine traces, and its input gradient with the engine and without."""

import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv import engine

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A network whose activation reads its attribute `held`."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 10)

    def act(self, x):
        return F.gelu(x) * self.held

    def forward(self, x):
        return self.linear(self.act(self.conv(x)).mean((2, 3)))


def new(held=1.0, **methods):
    """A model of a class of its own, which a test may change."""
    torch.manual_seed(0)
    model = type("Own", (Net,), {"k": 1.0} | methods)().eval()
    model.held = held
    return model


def gradient(model, use_engine=True):
    with engine.input_gradients(model, X, use_engine) as gradients:
        return gradients.gradient(X, lambda logits: logits.square().sum(1))


def assert_as_autograd(model):
    torch.testing.assert_close(gradient(model), gradient(model, use_engine=False), rtol=1e-4, atol=1e-7)
