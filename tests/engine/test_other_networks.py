"""The engine on networks and code as in other people's repositories: fused, fused in part, or left to autograd."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from helpers.other_networks import NETWORKS, ResNet
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparse_adv import attacks, engine

FUSED, PARTLY, LEFT = "fused", "partly", "left"


def images(count=3, dtype=torch.float32):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def loss(logits):
    weights = torch.arange(1, logits[0].numel() + 1).to(logits).cos()
    return logits.flatten(1) @ weights + logits.square().flatten(1).sum(1)


def with_statistics(model):
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return model.eval()


def outcome(model, x):
    lines = engine.explain(model, x)
    if lines[0].startswith("autograd:"):
        return LEFT
    return PARTLY if any("autograd" in line for line in lines) else FUSED


def check(model, x, expected, tolerance=1e-4):
    """The engine does what is expected with the model, and its logits and gradients are those of autograd."""
    autograd = engine.Autograd(model)
    logits, gradient = autograd.logits(x), autograd.gradient(x, loss)
    assert outcome(model, x) == expected, engine.explain(model, x)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Autograd) == (expected == LEFT)
        for actual, wanted in ((gradients.logits(x), logits), (gradients.gradient(x, loss), gradient)):
            assert actual.dtype == wanted.dtype
            assert (actual - wanted).float().norm() <= tolerance * wanted.float().norm()


def head(features=4):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 5))


class Changed(nn.Module):
    """A convolution, a function of its result, and a classifier."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function, self.head = nn.Conv2d(3, 4, 3), function, head()

    def forward(self, x):
        return self.head(self.function(self.conv(x)))


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_a_network_in_eval_mode_is_fused_in_part(network):
    model = with_statistics(network())
    check(model, images(), PARTLY)
    fused = [line for line in engine.explain(model, images()) if "convolution" in line]
    assert len(fused) == sum(isinstance(layer, nn.Conv2d) for layer in model.modules())


def test_a_network_of_convolutions_is_fused():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(4, 2, 3)
    check(with_statistics(nn.Sequential(*layers)), images(), FUSED)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_network_of_another_library(library):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library}, whose networks are compared here, is not installed")
    if library == "timm":
        model = importlib.import_module("timm").create_model("resnet18", num_classes=10)
    else:
        model = importlib.import_module("torchvision.models").resnet18(num_classes=10)
    check(with_statistics(model), torch.rand(2, 3, 64, 64), PARTLY)


def batch_coupled(x):
    return x - x.mean(0)


def without_gradient(x):
    with torch.no_grad():
        scale = x.mean((2, 3), keepdim=True)
    return x * scale


def detached(x):
    return x * x.detach().sigmoid()


def depends_on_data(x):
    return x if x.sum() > 0 else -x


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (F.gelu, PARTLY),
        (batch_coupled, PARTLY),
        (depends_on_data, LEFT),
        (without_gradient, LEFT),
        (detached, PARTLY),
        (StraightThrough.apply, LEFT),
    ],
    ids=["gelu", "batch coupled", "control flow", "no_grad", "detach", "straight-through"],
)
def test_code_in_forward(function, expected):
    check(Changed(function).eval(), images(), expected)


def test_noise_in_forward_leaves_the_model_and_the_random_state():
    model, x = Changed(lambda x: x + torch.randn_like(x)).eval(), images()
    state = torch.get_rng_state()
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Autograd)
        assert torch.equal(torch.get_rng_state(), state)
        actual = gradients.gradient(x, loss)
    torch.set_rng_state(state)
    torch.testing.assert_close(actual, engine.Autograd(model).gradient(x, loss))


class Signature(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), head()


class Optional(Signature):
    def forward(self, x, mask=None):
        x = self.conv(x)
        return self.head(x if mask is None else x * mask)


class Tuple(Signature):
    def forward(self, x):
        x = self.conv(x)
        return self.head(x), x


class Dict(Signature):
    def forward(self, x):
        return {"logits": self.head(self.conv(x))}


class Second(Signature):
    def forward(self, x, y):
        return self.head(self.conv(x) + y)


def test_a_second_input_that_has_a_default():
    check(Optional().eval(), images(), PARTLY)


@pytest.mark.parametrize(("model", "logits_of"), [(Tuple, lambda out: out[0]), (Dict, lambda out: out["logits"])])
def test_a_model_that_returns_several_tensors_is_left(model, logits_of):
    model, x = model().eval(), images()
    assert outcome(model, x) == LEFT
    with engine.input_gradients(model, x) as gradients:
        assert gradients.gradient(x, lambda out: loss(logits_of(out))).shape == x.shape


def test_a_model_with_two_inputs_is_left():
    assert "missing 1 required positional argument: 'y'" in engine.explain(Second().eval(), images())[0]


@pytest.mark.parametrize("path", ["layer1.conv1", "layer1"])
def test_hooks_of_inner_modules_are_called_and_honoured(path):
    x, y = images(), torch.tensor([0, 1, 2])
    calls = []
    hooks = [
        ("forward_hook", lambda module, args, output: calls.append("reads")),
        ("forward_hook", lambda module, args, output: calls.append("forward") or output * 2),
        ("forward_pre_hook", lambda module, args: calls.append("pre") or (args[0] + 1,)),
        ("full_backward_hook", lambda module, grad, _: calls.append("backward") or (grad[0] * 2,)),
        ("full_backward_pre_hook", lambda module, grad: calls.append("backward pre") or (grad[0] * 3,)),
    ]
    for kind, hook in hooks:
        model = with_statistics(ResNet())
        getattr(model.get_submodule(path), f"register_{kind}")(hook)
        check(model, x, PARTLY)
        calls.clear()
        engine_used = attacks.pgd(model, x, y, steps=2, random_start=False, engine=True)
        with_engine = list(calls)
        calls.clear()
        autograd = attacks.pgd(model, x, y, steps=2, random_start=False, engine=False)
        assert with_engine == calls and calls
        torch.testing.assert_close(engine_used, autograd, atol=1e-3, rtol=0)


def test_a_hook_that_is_registered_after_the_first_attack():
    model, x = with_statistics(ResNet()), images()
    check(model, x, PARTLY)
    handle = model.layer1.register_forward_hook(lambda module, args, output: output * 2)
    check(model, x, PARTLY)
    handle.remove()
    check(model, x, PARTLY)


def test_a_model_that_counts_its_calls_goes_on_counting():
    class Counting(Changed):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model, x, y = Counting(torch.relu).eval(), images(), torch.tensor([0, 1, 2])
    check(model, x, LEFT)
    before = model.calls
    attacks.pgd(model, x, y, steps=3)
    assert model.calls == before + 3


def test_hooks_of_the_model_itself_leave_it():
    model = with_statistics(ResNet())
    model.register_forward_hook(lambda module, args, output: output * 2)
    check(model, images(), LEFT)


@pytest.mark.parametrize("kind", ["forward_pre_hook", "forward_hook"])
def test_hooks_of_all_modules_leave_it_while_they_are_registered(kind):
    model, called = with_statistics(ResNet()), []
    check(model, images(), PARTLY)
    handle = getattr(torch.nn.modules.module, f"register_module_{kind}")(lambda *args: called.append(args[0]))
    try:
        check(model, images(), LEFT)
    finally:
        handle.remove()
    assert model.layer1.conv1 in called
    check(model, images(), PARTLY)


@pytest.mark.parametrize(
    "reparametrize",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["pruned", "weight_norm", "spectral_norm"],
)
def test_reparametrized_weights_are_followed(reparametrize):
    model = with_statistics(ResNet())
    reparametrize(model.layer1.conv1)
    reparametrize(model.linear)
    model.eval()  # the parametrizations too
    for _ in range(2):
        check(model, images(), PARTLY)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)


def test_a_norm_in_training_mode_leaves_the_model():
    model = with_statistics(ResNet())
    model.bn1.train()
    assert "training mode" in engine.explain(model, images())[0]
    model.bn1.eval()
    check(model, images(), PARTLY)


def test_frozen_parameters():
    check(with_statistics(ResNet()).requires_grad_(False), images(), PARTLY)


def test_bfloat16():
    model = with_statistics(ResNet())
    model.bfloat16()
    check(model, images(dtype=torch.bfloat16), PARTLY, tolerance=0.1)


def test_an_input_that_requires_gradients():
    model, x = with_statistics(ResNet()), images().requires_grad_()
    check(model, x, PARTLY)
    assert x.grad is None


def test_attacks_in_inference_mode():
    model, x, y = with_statistics(ResNet()), images(), torch.tensor([0, 1, 2])
    expected = attacks.pgd(model, x, y, steps=2, random_start=False)
    with torch.inference_mode():
        actual = attacks.pgd(model, x.clone(), y.clone(), steps=2, random_start=False)
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("data_parallel_without_devices")
def test_data_parallel_on_the_cpu_is_left():
    """Attacks call the module inside, and `explain` tells of that."""
    model = nn.DataParallel(with_statistics(ResNet())).eval()
    with engine.input_gradients(model, images()) as gradients:
        assert isinstance(gradients, engine.Autograd)
    assert engine.explain(model, images()) == engine.explain(model.module, images())


@pytest.mark.parametrize("use_engine", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["whole", "part"])
def test_gradients_in_inference_mode(use_engine, inside):
    model, x = with_statistics(ResNet()), images()
    expected = engine.Autograd(model).gradient(x, loss)
    with torch.inference_mode(inside), engine.input_gradients(model, images(), use_engine) as gradients:
        assert isinstance(gradients, engine.Program) == use_engine
        assert torch.is_inference_mode_enabled() == inside
        with torch.inference_mode():
            x = images()
            actual, logits = gradients.gradient(x, loss), gradients.logits(x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, model(images()).detach(), rtol=1e-3, atol=1e-4)


def test_steps_are_explained_in_inference_mode():
    with torch.inference_mode():
        assert outcome(with_statistics(ResNet()), images()) == PARTLY


def test_a_scripted_model_is_left():
    model = torch.jit.trace(with_statistics(ResNet()), images())
    check(model, images(), LEFT)


def test_a_compiled_model_is_left():
    model = torch.compile(with_statistics(ResNet()), backend="eager")
    check(model, images(), LEFT)


def test_parameters_get_no_gradients():
    model = with_statistics(ResNet())
    check(model, images(), PARTLY)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError, KeyError])
def test_a_hook_that_takes_no_float64_leaves_the_model(error):
    def hook(module, args, output):
        if output.dtype == torch.float64:
            raise error("no float64")

    model = with_statistics(ResNet())
    model.layer1.register_forward_hook(hook)
    check(model, images(), LEFT)
    assert "no float64" in engine.explain(model, images())[0]
    assert engine.fuse_for_training(model.train(), images()) is model
