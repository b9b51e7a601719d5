"""Models that return several tensors in training mode, such as the logits of auxiliary heads."""

import copy
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sparse_adv import engine
from sparse_adv.engine.training import TrainingGraph, graph_for_training

Pair = namedtuple("Pair", ["first", "second"])

CONTAINERS = {
    "tuple": (lambda x: (x, x * 2), True),
    "list in dict": (lambda x: {"logits": x, "others": [x * 2, None]}, True),
    "named tuple": (lambda x: Pair(x, x * 2), True),
    "dict of a class of its own": (lambda x: OrderedDict(logits=x), False),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_models_that_return_several_tensors(name):
    """The results have the model's own containers; torch.fx would return dicts and lists that refuse writes."""
    contained, fused = CONTAINERS[name]
    model, x = Returning(contained), torch.rand(4, 3, 5, 5)
    assert len(engine.explain(model, x)[1:]) == 1 and isinstance(graph_for_training(model, x), TrainingGraph) == fused
    (actual, structure), (expected, own) = (
        tree_flatten(run(x)) for run in (engine.fuse_for_training(model, x), copy.deepcopy(model))
    )
    assert structure == own
    torch.testing.assert_close(actual, expected)


class Returning(nn.Module):
    def __init__(self, contained):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.contained = contained

    def forward(self, x):
        return self.contained(self.block(x))
