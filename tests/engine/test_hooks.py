"""Hooks of a model's parts see what they see without the engine, and a loss may read what they have kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv import attacks, engine
from sparse_adv.engine import input_gradients

X = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def network(*middle: nn.Module) -> nn.Sequential:
    """A network with these modules behind its first convolution."""
    ends = nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.SiLU(), nn.Flatten(), nn.Linear(20, 4)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), *middle, *ends).double().eval()


def keep_output(module: nn.Module) -> list[torch.Tensor]:
    """A list whose only element is what the module returned last."""
    kept: list[torch.Tensor] = []

    def hook(called, args, output):
        kept[:] = [output]

    module.register_forward_hook(hook)
    return kept


@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.ReLU6(inplace=True)], ids=repr)
def test_hooks_of_activations_in_place_run(activation):
    model = network(activation)
    kept = keep_output(activation)
    expected = model(X)
    features, kept[:] = kept[0].detach(), []
    with input_gradients(model, X) as gradients:
        assert isinstance(gradients, engine.Program)
        torch.testing.assert_close(gradients.logits(X), expected.detach())
    torch.testing.assert_close(kept[0], features)
    model.train()
    fused = engine.fuse_for_training(model, X)
    assert fused is not model
    fused(X)
    kept[0].sum().backward()
    assert model[0].weight.grad.abs().sum() > 0  # what the hook has kept belongs to the graph of the pass


@pytest.mark.parametrize("sees", ["output", "input"])
def test_a_hook_keeps_a_tensor_that_is_overwritten_later_as_without_the_engine(sees):
    """Both the result of a module with hooks, and what a module with hooks reads."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.linear = nn.Conv2d(3, 6, 3), nn.AvgPool2d(2), nn.Linear(6 * 9, 4)

        def forward(self, x):
            y = self.conv(x)
            pooled = self.pool(y)
            return self.linear((F.relu_(y).mean() * pooled).flatten(1))

    model, kept = Net().double().eval(), []
    if sees == "output":
        model.conv.register_forward_hook(lambda module, args, output: kept.append(output))
    else:
        model.pool.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    for use_engine in (True, False):
        with input_gradients(model, X, use_engine) as gradients:
            gradients.logits(X)
        assert kept[-1].min() == 0
    fused = engine.fuse_for_training(model.train(), X)
    fused(X)
    assert kept[-1].min() == 0


@pytest.mark.parametrize("reads_logits", [True, False])
def test_a_loss_reads_the_features_that_a_hook_keeps(reads_logits):
    model = network(nn.ReLU())
    kept = keep_output(model[5])
    assert model[5].__class__ is nn.BatchNorm2d

    def loss(logits):
        of_features = kept[0].square().flatten(1).sum(1)
        return of_features + logits[:, 0] if reads_logits else of_features

    with input_gradients(model, X) as gradients:
        assert isinstance(gradients, engine.Program)
        for form in ("first", "again"):
            actual = gradients.gradient(X, loss)
            torch.testing.assert_close(actual, engine.Autograd(model).gradient(X, loss), msg=form)
    with input_gradients(
        model, X
    ) as gradients:  # the steps are used again, of which a loss of the logits needs no more
        expected = engine.Autograd(model).gradient(X, torch.sum)
        torch.testing.assert_close(gradients.gradient(X, torch.sum), expected)
    start = loss(model(X)).sum()
    pgd = {"eps": 0.1, "alpha": 0.05, "steps": 3, "random_start": False, "loss": lambda logits, y: loss(logits)}
    found = [attacks.pgd(model, X, torch.zeros(4, dtype=torch.long), engine=use, **pgd) for use in (True, False)]
    torch.testing.assert_close(*found)
    assert loss(model(found[0])).sum() > start


def test_features_have_the_images_of_the_call_where_the_engine_computes_whole_batches():
    class OfBatch(nn.Module):
        """Its operations do not say what they return for other numbers of images."""

        def forward(self, x):
            return x + 0 * x.new_ones(x.shape[0] + 3).sum()

    model = network(nn.ReLU(), OfBatch())
    kept = keep_output(model[2])
    with input_gradients(model, X) as gradients:
        assert isinstance(gradients, engine.Program)
        for images in (4, 3, 1):
            gradients.gradient(X[:images], torch.sum)
            assert len(kept[0]) == images


def test_a_loss_may_ask_for_logits_and_gradients():
    model, others = network(nn.ReLU()), X.flip(0)
    with input_gradients(model, X) as gradients:

        def loss(logits):
            inner = gradients.gradient(others, torch.sum).sum()
            return F.mse_loss(logits, gradients.logits(others), reduction="none").sum(1) * inner

        actual = gradients.gradient(X, loss)
        assert isinstance(gradients, engine.Program)
        torch.testing.assert_close(actual, engine.Autograd(model).gradient(X, loss))
        with pytest.raises(ZeroDivisionError):
            gradients.gradient(X, lambda logits: 1 / 0)
        torch.testing.assert_close(gradients.logits(X), model(X).detach())


def test_no_images_have_an_empty_gradient():
    model = network(nn.ReLU())
    with input_gradients(model, X) as gradients:
        assert gradients.logits(X[:0]).shape == (0, 4)
        assert gradients.gradient(X[:0], torch.sum).shape == (0, 3, 8, 8)
