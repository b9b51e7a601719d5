"""A network whose channels no block divides, and its sparse training: what the tests of methods share."""

from dataclasses import replace

import torch
from torch import nn

from helpers.small_runs import QUICK, TRAIN, Batches
from sparse_adv import training

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=4)
"""12 updates; the engine would have to trace each of the many models."""


def odd_network() -> nn.Module:
    """Channels that no block divides, and two linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1, bias=False),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 7, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(63, 6),
            nn.ReLU(),
            nn.Linear(6, 2),
        )


def run(hook, model=None, config=CONFIG, **options):
    model = model or odd_network()
    return model, training.train(model, Batches(TRAIN, 32), config, hook=hook, **options)
