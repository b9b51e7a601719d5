"""What becomes one step, and what is left to autograd while the engine still computes the rest."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.other_networks import OfLayers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import engine
from sparse_adv.engine.folding import fold_norms
from sparse_adv.nn import sparsify

CONV, NORM, BOTH = "convolution", "BatchNorm + ReLU", "convolution + BatchNorm"


def after_convolution(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), layer)


def before_norm(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.BatchNorm2d(4), nn.ReLU())


STEPS = {
    "zero padding": (before_norm(nn.Conv2d(3, 4, 3, padding=1)), [BOTH + " + ReLU"]),
    "reflection": (before_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), ["autograd", NORM]),
    "padding by name": (before_norm(nn.Conv2d(3, 4, 3, padding="same")), [BOTH + " + ReLU"]),
    "no padding by name": (before_norm(nn.Conv2d(3, 4, (2, 1), padding="valid")), [BOTH + " + ReLU"]),
    "uneven padding": (before_norm(nn.Conv2d(3, 4, 2, padding="same")), ["autograd", NORM]),
    "two norms": (after_convolution(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))), [BOTH, "BatchNorm"]),
    "norm of a ReLU": (after_convolution(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))), [CONV + " + ReLU", "BatchNorm"]),
    "two ReLUs": (after_convolution(nn.Sequential(nn.ReLU(), nn.ReLU())), [CONV + " + ReLU", "ReLU"]),
    "pooling": (after_convolution(nn.MaxPool2d(2)), [CONV, "max pooling"]),
    "pooling function": (OfLayers(lambda m, x: F.max_pool2d(m.a(x).relu(), (2, 1))), [CONV + " + ReLU", "max pooling"]),
    "overlapping function": (OfLayers(lambda m, x: F.max_pool2d(m.a(x), 3, stride=2)), [CONV, "autograd"]),
    "computed size": (OfLayers(lambda m, x: F.max_pool2d(y := m.a(x), y.size(2))), [CONV, "autograd"]),
    "overlapping": (after_convolution(nn.MaxPool2d(3, 2)), [CONV, "autograd"]),
    "with gaps": (after_convolution(nn.MaxPool2d(2, 3)), [CONV, "autograd"]),
    "padded": (after_convolution(nn.MaxPool2d(2, padding=1)), [CONV, "autograd"]),
    "dilated": (after_convolution(nn.MaxPool2d(2, dilation=2)), [CONV, "autograd"]),
    "to the last pixel": (after_convolution(nn.MaxPool2d(2, ceil_mode=True)), [CONV, "autograd"]),
    "dropout": (after_convolution(nn.Sequential(nn.Dropout2d(), nn.ReLU())), [CONV + " + ReLU"]),
    "sum": (OfLayers(lambda m, x: F.relu(m.a(x) + m.b(x))), [CONV, CONV + " + residual + ReLU"]),
    "sum of ReLUs": (OfLayers(lambda m, x: m.a(x).relu() + m.b(x).relu()), [CONV + " + ReLU"] * 2 + ["residual"]),
    "sum with a ReLU": (OfLayers(lambda m, x: m.a(x).relu() + m.b(x)), [CONV + " + ReLU", CONV + " + residual"]),
    "sum with itself": (OfLayers(lambda m, x: (y := m.a(x)) + y), [CONV, "residual"]),
    "norm of a sum": (
        OfLayers(lambda m, x: m.norm(m.a(x) + m.b(x))),
        [CONV, CONV + " + residual", "BatchNorm"],
    ),
    "read twice": (
        OfLayers(lambda m, x: m.norm(y := m.a(x)) + y.sigmoid()),
        [CONV, "sigmoid", "BatchNorm + residual"],
    ),
    "ReLU in place": (OfLayers(lambda m, x: F.relu(m.norm(m.a(x)), inplace=True)), [BOTH + " + ReLU"]),
    "ReLU by name": (OfLayers(lambda m, x: F.relu(inplace=True, input=m.a(x))), [CONV + " + ReLU"]),
    "dropout in place": (after_convolution(nn.Sequential(nn.Dropout(inplace=True), nn.ReLU())), [CONV + " + ReLU"]),
    "swish": (OfLayers(lambda m, x: m.norm((y := m.a(x)) * y.sigmoid())), [CONV, "sigmoid", "autograd", "BatchNorm"]),
    "gated sum": (OfLayers(lambda m, x: F.silu(y := m.a(x).relu()) + y), [CONV + " + ReLU", "SiLU", "residual"]),
    "function of a mean": (OfLayers(lambda m, x: m.a(x).mean((2, 3)).tanh()), [CONV, "autograd"]),
    "broadcast": (OfLayers(lambda m, x: m.a(x) + m.b(x).mean((2, 3), keepdim=True)), [CONV, CONV, "autograd"]),
    "times a parameter": (
        OfLayers(lambda m, x: m.norm.weight.relu()[:, None, None] * m.a(x) + m.b(x)),
        [CONV, "autograd", CONV + " + residual"],
    ),
    "split, indexed later": (
        OfLayers(lambda m, x: torch.cat([(parts := m.a(x).split(2, 1))[0] * m.b(x)[:, :2], parts[1]], 1)),
        [CONV, "autograd", CONV, "autograd"],
    ),
    "scaled sum": (OfLayers(lambda m, x: torch.add(m.a(x), m.b(x), alpha=2)), [CONV, CONV, "autograd"]),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_norm_is_folded_in_float32_at_least(dtype):
    """In float16 this eps and this variance are zero, and the reciprocal of their root infinite."""
    norm = nn.BatchNorm2d(8, eps=1e-9).to(dtype)
    norm.running_mean.normal_()
    norm.running_var.uniform_().data[0] = 0
    norm.weight.data.uniform_(0.5, 1.5)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    (folded,), (expected,) = (fold_norms([each], dtype) for each in (norm, copy.deepcopy(norm).double()))
    assert folded.bias.dtype == dtype and torch.equal(folded.bias, folded.shift.to(dtype))
    folded, expected = (torch.stack([each.scale, each.shift]) for each in (folded, expected))
    assert folded.dtype == wanted
    torch.testing.assert_close(folded.double(), expected, rtol=1e-6, atol=1e-12)


def test_norms_are_folded_together_as_they_are_one_by_one():
    layers = [nn.BatchNorm2d(5), nn.BatchNorm1d(7, affine=False), nn.BatchNorm2d(3, eps=0.1), nn.BatchNorm2d(5)]
    for norm in layers:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        for parameter in norm.parameters():
            parameter.data.normal_()
    layers[3].bias = None
    for norm, folded in zip(layers, fold_norms(layers, torch.float32), strict=True):
        scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
        shift = -norm.running_mean * scale + (0 if norm.bias is None else norm.bias)
        assert torch.equal(folded.scale, scale) and torch.equal(folded.shift, shift)
        assert folded.bias is folded.shift and not folded.scale.requires_grad
    assert fold_norms([], torch.float32) == []


class Ops(TorchDispatchMode):
    """Counts the ops that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "empty" in func.name() or "promote_types" in func.name()):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 3])
def test_only_folding_a_weight_takes_an_op_for_each_layer(layers):
    parts = [nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(layers)]
    program = engine.Program(nn.Sequential(*parts).eval(), torch.rand(2, 3, 4, 4))
    program.fold()
    with Ops() as ops:
        program.fold()
    assert ops.counts.pop("aten.mul.out") == layers
    assert ops.counts.total() == 6 and all("_foreach_" in name for name in ops.counts)


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_the_longest_that_compute_the_same(name):
    model, expected = STEPS[name]
    model = model.double().eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.data.normal_()
            norm.bias.data.normal_()
    x = torch.rand(3, 3, 7, 7, dtype=torch.float64)
    lines = [line.partition(": ")[2].removesuffix(" [dense]") for line in engine.explain(model, x)]
    assert ["autograd" if "autograd" in line else line for line in lines] == expected

    def loss(logits: Tensor) -> Tensor:
        return logits.flatten(1).sin().sum(1)

    autograd = engine.Autograd(model)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        first = gradients.logits(x)
        torch.testing.assert_close(gradients.gradient(x, loss), autograd.gradient(x, loss))
        torch.testing.assert_close(gradients.logits(x / 2), autograd.logits(x / 2))
        torch.testing.assert_close(first, autograd.logits(x))  # a later pass does not change what was returned


ACTIVATIONS = {
    "SiLU": [nn.SiLU(), F.silu, lambda x: F.silu(x, inplace=True)],
    "GELU": [nn.GELU(), nn.GELU("tanh"), F.gelu, lambda x: F.gelu(x, approximate="tanh")],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()],
    "tanh": [nn.Tanh(), torch.tanh, lambda x: x.tanh()],
    "hardtanh": [nn.Hardtanh(-0.1, 0.2), F.hardtanh, lambda x: F.hardtanh(x, -0.2, max_val=0.1)],
    "ReLU6": [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6, lambda x: F.relu6(x, True)],
    "leaky ReLU": [nn.LeakyReLU(), nn.LeakyReLU(0.2, inplace=True), F.leaky_relu, lambda x: F.leaky_relu(x, 0.3)],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "softplus": [nn.Softplus(), nn.Softplus(3, 0.2), F.softplus, lambda x: F.softplus(x, beta=2, threshold=0.1)],
}


@pytest.mark.parametrize(
    ("name", "function"), [(name, function) for name, functions in ACTIVATIONS.items() for function in functions]
)
@pytest.mark.parametrize("read_twice", [False, True])
def test_an_elementwise_function_is_a_step_of_its_own(name, function, read_twice):
    """Its gradient is PyTorch's, also where that of its input is a sum."""

    def layers(m: nn.Module, x: Tensor) -> Tensor:
        act = getattr(m, "act", function)
        return m.norm(act(y := m.a(x)) + y if read_twice else act(m.a(x)))

    model = OfLayers(layers)
    if isinstance(function, nn.Module):
        model.act = function
    model, x = model.double().eval(), 40 * torch.rand(3, 3, 7, 7, dtype=torch.float64) - 20
    assert sum(line.removesuffix(" [dense]").endswith(f": {name}") for line in engine.explain(model, x)) == 1

    def loss(logits: Tensor) -> Tensor:
        return logits.flatten(1).sin().sum(1)

    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        torch.testing.assert_close(gradients.logits(x), engine.Autograd(model).logits(x))
        torch.testing.assert_close(gradients.gradient(x, loss), engine.Autograd(model).gradient(x, loss))


@pytest.mark.parametrize("count", [1, 3])
def test_a_parameter_of_the_size_of_all_images_is_added(count):
    model, x = OfLayers(lambda m, x: m.a(x) + m.positions).eval(), torch.rand(count, 3, 7, 7)
    model.positions = nn.Parameter(torch.rand(1, 4, 5, 5))
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        actual = gradients.gradient(x, lambda logits: logits.square().flatten(1).sum(1))
    expected = engine.Autograd(model).gradient(x, lambda logits: logits.square().flatten(1).sum(1))
    torch.testing.assert_close(actual, expected)


def test_a_pruned_weight_of_a_linear_layer_counts_as_zero_whatever_was_written_to_it():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), torch.rand(3, 3, 2, 2)
    sparsify(model, {"1": torch.rand(4, 12) < 0.5})
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        torch.testing.assert_close(gradients.logits(x), model(x).detach())
        expected = engine.Autograd(model).gradient(x, lambda logits: logits[:, 0])
        torch.testing.assert_close(gradients.gradient(x, lambda logits: logits[:, 0]), expected)


class Rearranged(nn.Module):
    """Two numbers whose difference float32 does not show."""

    def __init__(self, parts: dict[str, nn.Module], function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.first, self.second = nn.Linear(16, 10), nn.Linear(16, 10)
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


OTHER_PRECISION = {
    "sum": lambda m, x: ((m.first(x).double() + 1e8) + (m.second(x).double() - 1e8)).float(),
    "ReLU": lambda m, x: (F.relu(m.first(x).double() + 1e7) - 1e7).float(),
    "linear": lambda m, x: (m.head(m.first(x).double() + 1e7) - m.head(torch.full((10,), 1e7).double())).float(),
    "BatchNorm": lambda m, x: (m.norm(m.first(x).double() + 1e7) - 1e7).float(),
}


@pytest.mark.parametrize("function", OTHER_PRECISION.values(), ids=OTHER_PRECISION)
def test_a_part_in_float64_is_computed_in_float64(function):
    parts = {"head": nn.Linear(10, 4).double(), "norm": nn.BatchNorm1d(10).double()}
    model, x = Rearranged(parts, function).eval(), torch.rand(4, 16)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        torch.testing.assert_close(gradients.logits(x), engine.Autograd(model).logits(x))
        expected = engine.Autograd(model).gradient(x, torch.sum)
        torch.testing.assert_close(gradients.gradient(x, torch.sum), expected)


UNUSUAL_SHAPES = {
    "a number for each image": lambda m, x: m.a(x) * F.relu(m.a(x).mean((1, 2, 3)) - 0.1)[:, None, None, None],
    "nothing": lambda m, x: torch.cat([m.a(x).flatten(1), F.relu(x[:, :0]).flatten(1)], 1),
    "an image without a batch": lambda m, x: torch.stack([m.a(x[i]) for i in range(3)]),
}


@pytest.mark.parametrize("layers", UNUSUAL_SHAPES.values(), ids=UNUSUAL_SHAPES)
def test_layers_of_unusual_shapes_are_left_to_autograd(layers):
    model, x = OfLayers(layers).double().eval(), torch.rand(3, 3, 7, 7, dtype=torch.float64)
    with engine.input_gradients(model, x) as gradients:
        torch.testing.assert_close(gradients.logits(x), engine.Autograd(model).logits(x))
        expected = engine.Autograd(model).gradient(x, torch.sum)
        torch.testing.assert_close(gradients.gradient(x, torch.sum), expected)
    assert all("a step of it fails" not in line for line in engine.explain(model, x))
