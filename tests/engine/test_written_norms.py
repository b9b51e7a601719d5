"""BatchNorms that subclasses write out, with more in one forward: they are fused as `nn.BatchNorm2d` is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv import engine
from sparse_adv.engine.training import graph_for_training

X = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class BatchNormAct(nn.BatchNorm2d):
    """As in timm."""

    def __init__(self, channels, act=None, **options):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), act or nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.count()
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            *self.affine_weights(),
            self.training or (self.running_mean is None and self.running_var is None),
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))

    def count(self):
        self.num_batches_tracked.add_(1)

    def affine_weights(self):
        return self.weight, self.bias


class Shifted(BatchNormAct):
    def affine_weights(self):
        return self.weight + 1, self.bias


class Twofold(BatchNormAct):
    def count(self):
        self.num_batches_tracked.add_(2)


class Counted(BatchNormAct):
    def forward(self, x):
        return super().forward(x) * (1 + self.num_batches_tracked)


def network(norm):
    """A layer before the norm and a plain block behind it; the statistics are those of some batches."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = model.double()
    for _ in range(2):
        model(torch.rand_like(X))
    return model


def learnt(model, x, fused):
    """What two updates leave: weights, statistics, and the logits of the last one."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model[1].momentum = 0.1 + 0.2 * step
        optimizer.zero_grad()
        logits = (engine.fuse_for_training(model, x) if fused else model)(x)
        logits.square().mean().backward()
        optimizer.step()
    return {"logits": logits.detach(), **model.state_dict()}


def assert_as_autograd(model):
    results = []
    for use_engine in (True, False):
        with engine.input_gradients(model, X, use_engine) as gradients:
            results.append((gradients.logits(X), gradients.gradient(X, lambda logits: logits.square().sum(1))))
    torch.testing.assert_close(*results)


NORMS = {
    "ReLU": BatchNormAct(4),
    "SiLU": BatchNormAct(4, nn.SiLU(inplace=True)),
    "no weights": BatchNormAct(4, affine=False),
    "large eps": BatchNormAct(4, eps=0.5, momentum=0.9),
}
OTHERS = {
    "another weight": Shifted(4),
    "another count": Twofold(4),
    "its count is read": Counted(4),
    "no statistics": BatchNormAct(4, track_running_stats=False),
}


@pytest.mark.parametrize("name", NORMS)
def test_it_is_part_of_the_convolution_in_eval_mode(name):
    model = network(copy.deepcopy(NORMS[name])).eval()
    first = engine.explain(model, X)[0]
    assert first.endswith("convolution + BatchNorm" + (" + ReLU" if name != "SiLU" else "") + " [dense]")
    assert_as_autograd(model)
    with torch.no_grad():
        model[1].running_mean.add_(1)
    model[1].running_var = torch.rand(4, dtype=torch.float64) + 0.5
    model[1].eps = 0.3
    assert_as_autograd(model)


@pytest.mark.parametrize("name", NORMS)
def test_it_is_one_op_with_its_activation_in_training(name):
    model = network(copy.deepcopy(NORMS[name])).train()
    fused = [line.partition(": ")[2] for line in graph_for_training(model, X).fused]
    assert fused == ["BatchNorm" + (" + ReLU" if name != "SiLU" else ""), "BatchNorm + ReLU"]
    torch.testing.assert_close(learnt(model, X, True), learnt(model, X, False))


@pytest.mark.parametrize("name", OTHERS)
def test_another_function_stays_as_it_is(name):
    model = network(copy.deepcopy(OTHERS[name]))
    torch.testing.assert_close(learnt(model, X, True), learnt(model, X, False))
    assert_as_autograd(model.eval())


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_called_twice(training):
    norm = BatchNormAct(4)
    layers = nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 3), norm, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    model = nn.Sequential(*layers, nn.Flatten()).double().train(training)
    if training:
        torch.testing.assert_close(learnt(model, X, True), learnt(model, X, False))
    else:
        assert sum("BatchNorm" in line for line in engine.explain(model, X)) == 3
        assert_as_autograd(model)
