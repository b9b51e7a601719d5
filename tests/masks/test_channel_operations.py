"""Kinds of operations: which of them keep channels apart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv.masks.dependency_graph import build_dependency_graph


class Operation(nn.Module):
    """A convolution with 8 output channels of 6 x 6 pixels, followed by an operation."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.first, self.operation = nn.Conv2d(3, 8, 3), operation

    def forward(self, x):
        return self.operation(self.first(x))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (nn.Conv2d(8, 5, 3), "convolution"),
        (nn.Linear(6, 2), "unknown"),  # on pixels
        (nn.BatchNorm2d(8), "norm"),
        (nn.ReLU(), "elementwise"),
        (F.gelu, "elementwise"),
        (lambda x: x * 2, "elementwise"),
        (lambda x: x.relu_(), "elementwise"),
        (nn.MaxPool2d(2), "spatial"),
        (nn.Dropout2d(), "spatial"),
        (lambda x: x.mean((2, 3)), "spatial"),
        (lambda x: x.mean(dim=-1), "spatial"),
        (lambda x: x.mean(1), "unknown"),
        (lambda x: x.mean(), "unknown"),
        (lambda x: x[:, :, ::2], "spatial"),
        (lambda x: x[:, :4], "unknown"),
        (lambda x: x[0], "unknown"),
        (nn.Flatten(), "flatten"),
        (lambda x: x.flatten(1), "flatten"),
        (lambda x: x.view(x.size(0), -1), "flatten"),
        (lambda x: x.view(x.size(0), 288), "unknown"),  # a number of features that would not follow the channels
        (nn.Softmax(1), "unknown"),
        (nn.PixelShuffle(2), "unknown"),
        (lambda x: x.size(0), "not an activation"),
    ],
)
def test_kind_of_an_operation(operation, expected):
    graph = build_dependency_graph(Operation(operation), (2, 3, 8, 8))
    last = list(graph.graph.nodes)[-2]  # the last node is the output
    assert graph.kinds[last] == expected


def test_a_linear_layer_on_flattened_channels_is_supported():
    graph = build_dependency_graph(nn.Sequential(nn.Conv2d(3, 8, 8), nn.Flatten(), nn.Linear(8, 2)), (2, 3, 8, 8))
    assert list(graph.kinds.values()) == ["input", "convolution", "flatten", "linear", "unknown"]


def test_parameters_used_directly_are_no_activations():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.first = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return self.first(x) * self.scale

    graph = build_dependency_graph(Scaled(), (2, 3, 8, 8))
    assert {node.op: kind for node, kind in graph.kinds.items()}["get_attr"] == "not an activation"
