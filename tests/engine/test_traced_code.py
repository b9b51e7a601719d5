"""Models whose Python code reads or writes state: the engine follows every change, or leaves the model to autograd."""

import copy
import enum
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import attacks, engine

X = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
OTHERS = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)) / 2


class Mode(enum.Enum):
    ONE, THREE = 1, 3


class Stateful(nn.Module):
    """A network with state of many kinds, of which `function(self, images)` uses some before the network runs."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        self.register_buffer("buffer", torch.ones(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.tensor, self.number, self.seen = torch.ones(()), 1.0, None
        self.tensors, self.calls = [torch.ones(()), "text"], []
        self.mode, self.set, self.array, self.scalar = Mode.ONE, {1}, np.ones(2), np.float32(1)
        self.options = types.SimpleNamespace(scale=[1.0])

    def forward(self, x):
        x = F.relu(self.norm(self.conv(self.function(self, x))))
        return self.linear(x.mean((2, 3)))


def passes(model, use_engine, images):
    with engine.input_gradients(model, images, use_engine) as gradients:
        return gradients.logits(images), gradients.gradient(images, lambda logits: logits.square().sum(1))


def assert_as_autograd(model, images=X):
    for actual, expected in zip(passes(model, True, images), passes(model, False, images), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


READS = {
    "a function of a buffer": lambda m, x: x * m.buffer.exp(),
    "a number in a buffer": lambda m, x: x * m.buffer.item(),
    "the float of a buffer": lambda m, x: x * float(m.buffer),
    "a branch on a buffer": lambda m, x: x * 2 if m.buffer > 2 else x,
    "an attribute that is a tensor": lambda m, x: x * m.tensor,
    "a function of it": lambda m, x: x * (m.tensor * 2),
    "a tensor in a list": lambda m, x: x * m.tensors[0],
    "a function of that": lambda m, x: x * m.tensors[0].exp(),
    "an enum": lambda m, x: x * m.mode.value,
    "a set": lambda m, x: x * len(m.set),
    "an array": lambda m, x: x * torch.from_numpy(m.array).to(x.dtype).sum(),
    "a scalar of NumPy": lambda m, x: x * float(m.scalar),
    "a list in an object": lambda m, x: x * m.options.scale[0],
}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "assigned"])
@pytest.mark.parametrize("name", READS)
def test_state_that_changes_after_the_first_pass(name, in_place):
    model = Stateful(READS[name]).eval()
    assert_as_autograd(model)
    if in_place:
        for tensor in (model.buffer, model.tensor, model.tensors[0]):
            tensor.fill_(3)
        model.set.add(7)
        model.array[:], model.options.scale[0] = 3, 3.0
    else:
        model.buffer, model.tensor, model.tensors[0] = (torch.tensor(3.0) for _ in range(3))
        model.set, model.array, model.scalar, model.mode = {1, 7}, np.full(2, 3), np.float32(3), Mode.THREE
        model.options = types.SimpleNamespace(scale=[3.0])
    assert_as_autograd(model)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x / x.amax().item(),
        lambda m, x: x / float(x.amax().tolist()),
        lambda m, x: x / sum(x[0, 0, 0].tolist()),
        lambda m, x: x / x.shape[(x.sum() > 400).long()],
    ],
    ids=["item", "float", "list", "index"],
)
def test_numbers_read_from_images_are_those_of_the_present_ones(function):
    model = Stateful(function).eval()
    for images in (X, OTHERS, X / 4):
        assert_as_autograd(model, images)


def test_constants_that_code_makes_of_numbers_are_part_of_the_steps():
    def normalized(m, x):
        mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1) * m.number
        return (x - mean.to(x.device)) / torch.arange(1, 4).view(3, 1, 1)

    model = Stateful(normalized).eval()
    assert not engine.explain(model, X)[0].startswith("autograd")
    assert_as_autograd(model)
    model.number = 2.0
    assert_as_autograd(model)


def count(m, x):
    m.count += 1
    return x


def average(m, x):
    with torch.no_grad():
        m.buffer.mul_(0.9).add_(0.1 * x.mean())
    return x * m.buffer


WRITES = {
    "a buffer": count,
    "a running average": average,
    "an attribute": lambda m, x: setattr(m, "seen", x * 2) or x,
    "a new attribute": lambda m, x: setattr(m, "features", x * 2) or x,
    "a list": lambda m, x: m.calls.append(x.mean()) or x,
    "a list in an object": lambda m, x: m.options.scale.append(1.0) or x,
    "a tensor in a list": lambda m, x: x * m.tensors[0].add_(1),
}


def state_of(model):
    held = {name: str(vars(model).get(name)) for name in ("seen", "features", "calls", "tensors", "options")}
    return held | {name: value.tolist() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", WRITES)
def test_what_code_writes_is_written_once_in_each_pass_and_never_by_a_trace(name):
    model = Stateful(WRITES[name]).eval()
    expected = copy.deepcopy(model)
    for _ in range(3):
        for one, other in zip(passes(model, True, X), passes(expected, False, X), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert state_of(model) == state_of(expected)
    attacks.pgd(model, X, torch.zeros(6, dtype=torch.long), steps=1)
    torch.save(model.state_dict() | {"seen": model.seen}, "/dev/null")  # no objects of a trace are left


@pytest.mark.parametrize("name", [*READS, *WRITES])
def test_training_follows_state(name):
    model = Stateful((READS | WRITES)[name]).train()
    expected = copy.deepcopy(model)
    for step in range(3):
        losses = [run(X).square().mean() for run in (engine.fuse_for_training(model, X), expected)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
        for each in (model, expected):
            each.buffer.add_(step)
            each.tensor = each.tensor + 1
            each.tensors[0].add_(1)
            each.options.scale[0] += 1
            each.mode = Mode.THREE
        torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_a_batch_norm_of_ones_own_that_counts_its_batches():
    class Averaging(nn.BatchNorm2d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked)
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum)

    model = nn.Sequential(Averaging(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).train()
    expected = copy.deepcopy(model)
    for images in (X, OTHERS, X):
        engine.fuse_for_training(model, images)(images)
        expected(images)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


def test_a_loss_may_keep_the_logits_and_write_to_them():
    model, kept = Stateful(lambda m, x: x).eval(), {True: [], False: []}

    def gradient(use_engine):
        def loss(logits):
            kept[use_engine].append(logits.detach())
            logits[:, 0] -= 1
            return logits.square().sum(1)

        with engine.input_gradients(model, X, use_engine) as gradients:
            return [gradients.gradient(images, loss) for images in (X, OTHERS)]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kept[True], kept[False], rtol=1e-4, atol=1e-6)


def test_a_loss_without_gradient_is_refused_with_and_without_the_engine():
    model = Stateful(lambda m, x: x).eval()
    for use_engine in (True, False):
        with (
            engine.input_gradients(model, X, use_engine) as gradients,
            pytest.raises(engine.NoGradientError, match="no gradient of the images"),
        ):
            gradients.gradient(X, lambda logits: logits.argmax(1).float())


def test_a_part_of_another_dtype_leaves_the_model():
    class Double(nn.Linear):
        def forward(self, x):
            return super().forward(x.double())

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), Double(144, 5).double()).eval()
    with engine.input_gradients(model, X) as gradients:
        assert gradients.logits(X).dtype == torch.float64


class InstanceNormFunction(nn.Module):
    def forward(self, x):
        return F.instance_norm(x)


def hooked(layer):
    layer.register_forward_hook(lambda module, args, output: None)
    return layer


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(8), InstanceNormFunction(), hooked(nn.Sequential(nn.InstanceNorm2d(8)))],
    ids=["module", "function", "inside of a module with hooks"],
)
@pytest.mark.parametrize("images", [6, 2, 1])
def test_one_image_of_a_network_with_instance_norm(images, norm):
    layers = nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers).eval()
    engine.explain(model, X)  # a program for all images
    with engine.input_gradients(model, X) as gradients:
        assert isinstance(gradients, engine.Program)
        actual = gradients.gradient(X[:images], lambda logits: logits.square().sum(1))
    torch.testing.assert_close(actual, passes(model, False, X[:images])[1], rtol=1e-3, atol=1e-5)


class GradientFormats(TorchDispatchMode):
    """Whether the gradients that reach a Mish are in channels_last."""

    def __init__(self):
        super().__init__()
        self.channels_last = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mish_backward.default:
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("images", [6, 1])
def test_gradients_of_other_operations_keep_the_memory_format(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    with engine.input_gradients(model, X[:images]) as gradients, GradientFormats() as seen:
        gradients.gradient(X[:images], torch.sum)
    assert seen.channels_last == [True]


@pytest.mark.parametrize("changed", ["hook", "subclass"])
def test_a_narrow_strided_1x1_convolution_that_is_not_guarded_keeps_the_memory_format(changed):
    class Other(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight, self.bias, self.stride)

    kind = Other if changed == "subclass" else nn.Conv2d
    model = nn.Sequential(kind(3, 6, 1, stride=2), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)).train()
    formats = []
    if changed == "hook":
        model[0].register_forward_hook(lambda module, args, output: None)
    model[2].register_forward_pre_hook(lambda module, args: formats.append(args[0].is_contiguous()))
    model = nn.Sequential(model, nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    fused = engine.fuse_for_training(model, X)
    formats.clear()
    fused(X)
    assert fused is not model and formats == [True]  # oneDNN ends the process in channels_last


@pytest.mark.parametrize("seed", range(3))
def test_training_is_fused_whatever_the_weights_of_the_moment(seed):
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), block, nn.ReLU(), nn.Conv2d(4, 4, 3))
    nn.init.zeros_(block[0].weight)  # as a mask that keeps nothing
    nn.init.zeros_(block[0].bias)
    assert engine.fuse_for_training(model.train(), X) is not model


class Masked(nn.Module):
    """A network of which a buffer chooses the channels."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.linear, self.function = nn.Conv2d(3, 8, 3), nn.Linear(36, 5), function
        self.register_buffer("mask", torch.arange(8) < 6)

    def forward(self, x):
        y = self.conv(x)
        z, count = self.function(self, y)
        return self.linear(z.sum(1).flatten(1)) / count


SIZES = {
    "by a mask": lambda m, y: (z := F.relu(y[:, m.mask]), z.shape[1]),
    "masked_select": lambda m, y: (y, torch.masked_select(m.mask, m.mask).shape[0]),
    "nonzero": lambda m, y: (y, torch.nonzero(m.mask).shape[0]),
    "where": lambda m, y: (y, torch.where(m.mask)[0].numel()),
}


@pytest.mark.parametrize("function", SIZES.values(), ids=SIZES)
def test_sizes_that_depend_on_values_leave_a_model(function):
    model = Masked(function).eval()
    for kept in (6, 2):
        model.mask.copy_(torch.arange(8) < kept)
        assert_as_autograd(model)
    assert "the size of a result of" in engine.explain(model, X)[0]


def test_a_model_may_index_by_numbers():
    model = Masked(lambda m, y: (y[:, m.order], 8)).eval()
    model.register_buffer("order", torch.randperm(8))
    assert_as_autograd(model)
    assert "autograd: " not in engine.explain(model, X)[0]


def test_a_model_that_reads_strides_is_left():
    def rows(m, y):
        strides = y.stride()
        return torch.as_strided(y, y.shape, (strides[0], strides[1], strides[3], strides[2])), 1

    model = Masked(rows).eval()
    for images in (X, X.contiguous(memory_format=torch.channels_last)):
        assert_as_autograd(model, images)
