"""Parts of a model that torch.fx cannot trace: they run as they are, and the engine still computes the rest."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import Tensor, nn

from sparse_adv import engine

X = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class SwishFunction(torch.autograd.Function):
    """As in several public EfficientNets and robust WideResNets, to keep less memory."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))))


class Swish(nn.Module):
    def forward(self, x):
        return SwishFunction.apply(x)


class SamePadding(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow does."""

    def forward(self, x):
        rows = math.ceil(x.shape[2] / self.stride[0]) * self.stride[0] - x.shape[2]
        return F.conv2d(F.pad(x, [0, 1, 0, rows]) if rows > 0 else x, self.weight, self.bias, self.stride)


class Signed(nn.Module):
    """Its result depends on a value of the input, and on one that it is given."""

    def __init__(self):
        super().__init__()
        self.threshold = 0.0

    def forward(self, x):
        return x if x.detach().flatten(1).amax(1).min() > self.threshold else -2 * x


class Detached(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            scale = x.mean((2, 3), keepdim=True)
        return x * scale


class Folded(nn.Module):
    """An untraced part within a part that can be traced."""

    def __init__(self):
        super().__init__()
        self.swish = Swish()

    def forward(self, x):
        return self.swish(x).add(x)


PARTS = {"autograd function": Swish, "control flow": Signed, "no_grad": Detached, "nested": Folded}


def network(part):
    """Convolutions before and after the part, which is there twice."""
    first = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), part()
    model = nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.ReLU(), part(), nn.Conv2d(4, 2, 3), nn.Flatten())
    model[1].running_mean.normal_()
    return model.eval()


def loss(logits: Tensor) -> Tensor:
    return logits.sin().sum(1)


def assert_as_autograd(model, x=X):
    with engine.input_gradients(model, x) as gradients:
        for actual, expected in (
            (gradients.logits(x), engine.Autograd(model).logits(x)),
            (gradients.gradient(x, loss), engine.Autograd(model).gradient(x, loss)),
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PARTS)
def test_the_rest_is_fused(name):
    lines = engine.explain(model := network(PARTS[name]), X)
    assert [line.partition(": ")[2].removesuffix(" [dense]") for line in lines if "convolution" in line] == [
        "convolution + BatchNorm",
        "convolution + ReLU",
        "convolution",
    ]
    assert_as_autograd(model)


def test_a_convolution_of_ones_own_runs_between_steps():
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), SamePadding(4, 4, 2, 2), nn.ReLU(), nn.Conv2d(4, 2, 3)
    model = nn.Sequential(*layers, nn.Flatten()).eval()
    lines = engine.explain(model, X)
    assert [line.split(": ")[1].removesuffix(" [dense]") for line in lines] == [
        "convolution + ReLU",
        "PyTorch and autograd",
        "ReLU",
        "convolution",
        "PyTorch and autograd",
    ]
    assert_as_autograd(model)


def test_its_code_runs_in_each_pass():
    model = network(Signed)
    assert_as_autograd(model)
    assert_as_autograd(model, -X)
    model[2].threshold = 1e9
    assert_as_autograd(model)


@pytest.mark.parametrize("part", [Swish, Detached])
def test_training_is_fused_around_it(part):
    model = network(part).train()
    assert engine.explain(model, X)[1:] == ["_1: BatchNorm"]
    copied = network(part).train()
    copied.load_state_dict(model.state_dict())
    for run, module in ((engine.fuse_for_training(model, X), model), (copied, copied)):
        run(X).square().mean().backward()
        module.gradients = [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(model.gradients, copied.gradients)
    torch.testing.assert_close(model[1].running_mean, copied[1].running_mean)


class Counting(Swish):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Noisy(nn.Module):
    def forward(self, x):
        return SwishFunction.apply(x + torch.randn_like(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (Counting, "changes attributes of modules"),
        (Noisy, "would differ from autograd's"),
        (Branching, "torch.fx cannot trace module '2' (Branching)"),
        (lambda: torch.jit.script(nn.Conv2d(4, 4, 1)), "module '2' was compiled by torch.jit"),
    ],
)
def test_a_part_that_must_not_run_in_trials_or_has_layers_leaves_the_model(part, said):
    model = network(part)
    (line,) = engine.explain(model, X)
    assert line.startswith("autograd: ") and said in line
    assert getattr(model[2], "calls", 0) == 0


class Scaled(nn.Module):
    """Can be traced in eval mode only, where it reads a number."""

    def __init__(self):
        super().__init__()
        self.factor = 2.0

    def forward(self, x):
        scaled = self.factor * x
        return x if self.training and x.sum() > 0 else scaled


def test_what_a_trace_has_read_counts_although_another_trace_takes_the_part_as_a_whole():
    model = network(Scaled)
    assert_as_autograd(model)
    assert engine.explain(model.train(), X)[1:] == ["_1: BatchNorm"]
    model.eval()[2].factor = 3.0
    assert_as_autograd(model)


def test_logits_without_a_row_for_each_image_are_autograds():
    """`squeeze` also drops the dimension of images where there is one of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), Squeeze()).eval()
    for count in (1, 2, 1):
        x = torch.rand(count, 3, 6, 6)
        with engine.input_gradients(model, x) as gradients:
            found = gradients.gradient(x, lambda logits: logits.logsumexp(-1))
        x.requires_grad_()
        (expected,) = torch.autograd.grad(model(x).logsumexp(-1).sum(), x)
        assert_close(found, expected)
    assert "its output of 1 images has shape [5]" in engine.explain(model, x)[-1]


class Squeeze(nn.Module):
    def forward(self, x):
        return x.squeeze()


@pytest.mark.parametrize("then", [F.relu, torch.square], ids=["fused", "not fused"])
def test_a_part_that_returns_another_size_than_in_the_trace_leaves_the_model(then, caplog):
    class Resize(nn.Module):
        size = 8

        def forward(self, x):
            return F.interpolate(x, size=(self.size, self.size)) if x.shape[-1] != self.size else x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.resize, self.linear = Resize(), nn.Linear(3, 10)

        def forward(self, x):
            y = then(self.resize(x))
            return self.linear(y.sum((2, 3)) / (y.shape[2] * y.shape[3]))

    model, x = Net().double().eval(), X.double()
    caplog.set_level("INFO")
    for size, count in ((8, 0), (16, 1), (16, 1)):
        model.resize.size = size
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            torch.testing.assert_close(gradients.logits(x), model(x).detach())
            expected = engine.Autograd(model).gradient(x, torch.sum)
            torch.testing.assert_close(gradients.gradient(x, torch.sum), expected)
        assert caplog.text.count("module 'resize' returns [4, 3, 16, 16], in the trace [4, 3, 8, 8]") == count
