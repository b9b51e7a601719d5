"""Narrow networks of the library, with BatchNorm statistics as if they had been trained."""

import torch
from torch import nn

from sparse_adv.models import build

NETWORKS = {"resnet18": 8, "preact_resnet18": 8, "vgg16": 8, "digits_cnn": None, "wrn-10-1": None}


def network(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network in eval mode, with random BatchNorm statistics and parameters, and the shape of its input."""
    torch.manual_seed(0)
    width = NETWORKS[name]
    model = build(name, width=width) if width else build(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
    return model.eval(), (2, 1, 8, 8) if name == "digits_cnn" else (2, 3, 32, 32)
