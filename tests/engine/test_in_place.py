"""Operations that overwrite a tensor: the graph without them computes the same, wherever the engine accepts it."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from helpers.other_networks import OfLayers
from torch import fx, nn

from sparse_adv import engine
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.engine.tracing import graph_of
from sparse_adv.engine.training import graph_for_training

X = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layers(*between):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


def ended(*end):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.AdaptiveAvgPool2d(1), *end)


def added(m, x):
    y = F.silu(m.a(x))
    y += m.b(x)
    return m.norm(y)


def weighted(m, x):
    y = m.norm(m.a(x))
    weight = y.mean((2, 3), keepdim=True).sigmoid()
    return F.relu(y, inplace=True) * weight


def sized(m, x):
    y = m.norm(m.a(x))
    count, size = y.size(0), y.shape
    return y.relu_().view(count, size[1], -1)


CONV, NORM, BOTH = "convolution", "BatchNorm + ReLU", "convolution + BatchNorm + ReLU"
ACCEPTED = {
    "an identity": (layers(nn.BatchNorm2d(4), nn.Identity(), nn.ReLU(True)), [BOTH, BOTH], [NORM, NORM]),
    "dropout": (layers(nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(True)), [BOTH, BOTH], ["BatchNorm", NORM]),
    "instance norm": (layers(nn.InstanceNorm2d(4), nn.ReLU(True)), [CONV, "autograd", "ReLU", BOTH], [NORM]),
    "dropout of a view": (
        ended(nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(4, 5)),
        [BOTH, "autograd", "linear"],
        [NORM],
    ),
    "a function": (OfLayers(added), [CONV, "SiLU", CONV + " + residual", "BatchNorm"], ["BatchNorm"]),
    "sizes read before": (OfLayers(sized), [BOTH, "autograd"], ["BatchNorm"]),
    "a function of it read later": (
        OfLayers(weighted),
        [CONV + " + BatchNorm", "autograd", "ReLU", "autograd"],
        ["BatchNorm"],
    ),
    "a function of eval mode": (
        OfLayers(lambda m, x: F.relu(F.dropout(m.norm(m.a(x)), 0.5, m.training), inplace=True)),
        [BOTH],
        ["BatchNorm"],
    ),
    "a part": (OfLayers(lambda m, x: m.norm(m.a(x))[:, 1:].relu_()), [CONV + " + BatchNorm", "autograd", "ReLU"], None),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_tensor_is_overwritten_that_nothing_reads_later_under_another_name(name):
    model, steps, _ = copy.deepcopy(ACCEPTED[name])
    model = model.double().eval()
    lines = [line.partition(": ")[2].removesuffix(" [dense]") for line in engine.explain(model, X)]
    assert [line if "autograd" not in line else "autograd" for line in lines] == steps
    results = []
    for use_engine in (True, False):
        with engine.input_gradients(model, X, use_engine) as gradients:
            results.append((gradients.logits(X), gradients.gradient(X, torch.sum)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", [name for name, (_, _, fused) in ACCEPTED.items() if fused])
def test_it_is_fused_for_training(name):
    model, _, expected = copy.deepcopy(ACCEPTED[name])
    models = [model.double().train(), copy.deepcopy(model)]
    graph = graph_for_training(models[0], X)
    assert [line.partition(": ")[2] for line in graph.fused] == expected
    results = []
    for each, run in zip(models, (graph, models[1]), strict=True):
        torch.manual_seed(0)
        logits = run(X)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in each.parameters()), *each.buffers()])
    torch.testing.assert_close(*results)


def overwritten_parameter(m, x):
    m.norm.bias.data.add_(1)
    return m.norm(m.a(x))


REFUSED = {
    "a view that is read later": lambda m, x: ((y := m.a(x)).flatten(1), y.relu_())[0],
    "a part of what is read later": lambda m, x: ((y := m.a(x))[:, 1:].relu_(), y)[1],
    "the images": lambda m, x: m.a(F.relu(x, inplace=True)),
    "a view of the images": lambda m, x: m.a(x.flatten(1).relu_().view(x.shape)),
    "a parameter": overwritten_parameter,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_read_under_another_name_is_not_overwritten(name):
    with pytest.raises(NotTraceable, match="overwrites"):
        graph_of(OfLayers(REFUSED[name]).eval())


@pytest.mark.parametrize("kind", ["hook", "own module"])
def test_what_other_code_returns_is_not_overwritten(kind):
    """It may be a tensor that the code keeps."""

    class Kept(nn.Module):
        def forward(self, x):
            return self.kept if x.sum() > 1e9 else x

    part = nn.Identity() if kind == "hook" else Kept()
    if kind == "hook":
        part.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(NotTraceable, match=r"module '2' overwrites .* that code outside of the graph may read"):
        graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), part, nn.ReLU(inplace=True)).eval())


class RandomProgram(nn.Module):
    """Views, new tensors and overwritten ones in random order; what it returns depends on several of them."""

    def __init__(self, seed):
        super().__init__()
        self.conv, self.act, self.seed = nn.Conv2d(3, 4, 3), nn.ReLU6(inplace=True), seed

    def forward(self, x):
        choice = random.Random(self.seed)
        tensors = [self.conv(x)]
        for _ in range(choice.randrange(3, 9)):
            one, other = choice.choice(tensors), choice.choice(tensors)
            kind = choice.randrange(8)
            if kind == 0:
                tensors.append(one.flatten(1).view(len(X), 4, 6, 6))
            elif kind == 1:
                tensors.append(one.transpose(2, 3))
            elif kind == 2:
                tensors.append(torch.cat(one.chunk(2, 1)[::-1], 1))
            elif kind == 3:
                one[:, choice.randrange(4) :].mul_(0.5)
            elif kind == 4:
                tensors.append(one.sigmoid())
            elif kind == 5:
                tensors.append(one.add_(other * 0.5))
            elif kind == 6:
                tensors.append(F.relu(one - 0.3, inplace=True))
            else:
                tensors.append(self.act(one))
        chosen = choice.sample(tensors, min(len(tensors), 2))
        return torch.cat(chosen, 1)


def test_random_programs():
    accepted = 0
    for seed in range(300):
        model = RandomProgram(seed).double()
        try:
            graph = graph_of(model)
        except NotTraceable:
            continue
        accepted += 1
        actual = fx.Interpreter(model, graph=graph).run(X)
        with torch.no_grad():
            expected = model(X)
        torch.testing.assert_close(actual, expected, msg=lambda text, seed=seed: f"seed {seed}: {text}")
    assert accepted > 40
