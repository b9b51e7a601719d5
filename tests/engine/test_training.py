"""Networks in training mode with BatchNorm, addition and ReLU as one op: what is learnt is what PyTorch learns."""

import copy
import logging
import random
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import other_networks
from helpers.networks import NETWORKS, network
from helpers.random_models import BATCH, CHANNELS, SIZE, random_models
from hypothesis import given, reject, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import engine, masks
from sparse_adv.engine.training import TrainingGraph, graph_for_training
from sparse_adv.nn import optimizer_hook, sparsify
from sparse_adv.ops.cuda_graph import Capturer


def loss(logits):
    weights = torch.arange(1, logits[0].numel() + 1, device=logits.device).to(logits).cos()
    return (logits.flatten(1) @ weights + logits.square().flatten(1).sum(1)).mean()


def learnt(model, x, steps=2, fused=True):
    """What a few steps of SGD leave: weights, statistics, the gradients and the logits of the last step."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = (engine.fuse_for_training(model, x) if fused else model)(x)
        loss(logits).backward()
        optimizer.step()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients, **model.state_dict()}


def check_learns_the_same(model, x, tolerance=1e-8):
    actual, expected = learnt(model, x), learnt(model, x, fused=False)
    assert actual.keys() == expected.keys()
    largest = max(float(value.double().abs().max()) for value in expected.values() if value.numel())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", [None, (4, 4)])
def test_networks_of_the_library(name, block):
    model, shape = network(name)
    if block is not None:
        sparsify(model, masks.prune(model, density=0.3, block=block))
    x = torch.rand(5, *shape[1:], dtype=torch.float64)
    check_learns_the_same(model.double(), x)


@pytest.mark.parametrize("kind", other_networks.NETWORKS, ids=lambda kind: kind.__name__)
def test_networks_of_others(kind):
    model = kind().double()
    check_learns_the_same(model, torch.rand(5, 3, 8, 8, dtype=torch.float64))


def test_random_models():
    seen = []

    @given(random_models())
    @settings(max_examples=25)
    def each(model):
        x = torch.rand(BATCH, CHANNELS, SIZE, SIZE, dtype=torch.float64)
        try:
            learnt(model, x, fused=False)
        except (RuntimeError, ValueError):
            reject()  # PyTorch itself cannot train it
        seen.append(engine.fuse_for_training(model.train(), x) is not model)
        check_learns_the_same(model, x)

    each()
    assert any(seen)


def block_of(norm=None, act=None):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm or nn.BatchNorm2d(4), act or nn.ReLU())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.norm = block_of(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.out_of_place = False

    def forward(self, x):
        y = self.norm(self.conv(self.first(x)))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def test_a_residual_block_is_two_ops_and_one_for_the_shortcut():
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    model = Residual().double().train()
    assert engine.explain(model, x)[1:] == [
        "first_1: BatchNorm + ReLU",
        "norm: BatchNorm + residual + ReLU",
        "shortcut_1: BatchNorm",
    ]
    check_learns_the_same(model, x)


LAYERS = {
    "momentum of all batches": lambda: nn.BatchNorm2d(4, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no weights": lambda: nn.BatchNorm2d(4, affine=False),
    "large eps": lambda: nn.BatchNorm2d(4, eps=0.5, momentum=0.9),
}


@pytest.mark.parametrize("name", LAYERS)
def test_settings_of_batch_norm(name):
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    model = block_of(LAYERS[name]()).double().train()
    assert engine.explain(model, x)[1:] == ["_1: BatchNorm + ReLU"]
    check_learns_the_same(model, x)


def test_a_step_on_a_device_reads_no_value():
    """The device "meta" has none. On a GPU the host would wait for it, which a CUDA graph cannot hold."""
    model = nn.Sequential(Residual(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3, momentum=None)).train().to("meta")
    x = torch.rand(4, 3, 5, 5, device="meta")
    graph = TrainingGraph(model)
    assert not any(line.startswith("_2") for line in graph.fused)  # PyTorch itself reads how many batches there were
    model[2].momentum = 0.1
    graph = TrainingGraph(model)
    assert len(graph.fused) == 4
    graph(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_graph_holds_a_training_step():
    model, x = Residual().train().cuda().to(memory_format=torch.channels_last), torch.rand(4, 3, 5, 5, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)

    def step():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = engine.fuse_for_training(model, x)(x)
        loss(logits.float()).backward()
        return logits

    capturer = Capturer(x.device)
    assert not isinstance(graph_for_training(model, x), str)
    expected = [capturer.run(step) for _ in range(3)][-1].clone()
    gradient, batches = model.norm.weight.grad.clone(), int(model.norm.num_batches_tracked)
    replay = capturer.capture(step)
    torch.testing.assert_close(replay(), expected)
    torch.testing.assert_close(model.norm.weight.grad, gradient)
    assert int(model.norm.num_batches_tracked) == batches + 1


def test_frozen_layers_keep_their_statistics_and_are_not_fused():
    model, x = (
        nn.Sequential(block_of(), nn.Conv2d(4, 3, 1), block_of()).double().train(),
        torch.rand(4, 3, 5, 5).double(),
    )
    model[0][1].eval()
    assert engine.explain(model, x)[1:] == ["_2_1: BatchNorm + ReLU"]
    engine.fuse_for_training(model, x)(x).sum().backward()
    assert not model[0][1].running_mean.any() and model[2][1].running_mean.any()


def test_a_layer_that_is_called_twice_is_left():
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 4, 1), norm).double().train()
    x = torch.rand(4, 3, 5, 5).double()
    assert engine.explain(model, x)[1:] == [
        "training is not fused: it has no BatchNorm2d in training mode that is called once"
    ]


@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (lambda m, x: (y := m.norm(m.a(x))).relu() * y, "norm: BatchNorm"),
        (lambda m, x: (y := m.norm(m.a(x)) + m.b(x)).relu() * y, "norm: BatchNorm + residual"),
        (lambda m, x: (y := m.norm(m.a(x))) + y, "norm: BatchNorm"),
        (lambda m, x: m.b(x) + m.norm(m.a(x)).relu(), "norm: BatchNorm + ReLU"),
        (lambda m, x: m.b(x) - m.norm(m.a(x)), "norm: BatchNorm"),
    ],
)
def test_what_is_read_twice_ends_an_op(function, fused):
    model, x = other_networks.OfLayers(function).double().train(), torch.rand(4, 3, 5, 5, dtype=torch.float64)
    assert engine.explain(model, x)[1:] == [fused]
    check_learns_the_same(model, x)


def test_hooks_run_and_see_what_they_would():
    model, x = nn.Sequential(block_of(), block_of(nn.BatchNorm2d(4)))[:1].train(), torch.rand(4, 3, 5, 5)
    seen = []
    model[0][0].register_forward_hook(lambda module, args, result: seen.append(result.shape))
    model[0][1].register_full_backward_hook(lambda module, grads, _: seen.append(grads[0].shape))
    engine.fuse_for_training(model, x)(x).sum().backward()
    assert seen == [(4, 4, 5, 5)] * 2


def test_a_forward_that_was_replaced_is_called():
    model, x = block_of().train(), torch.rand(4, 3, 5, 5)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []

    def recording(self, images):
        seen.append(images.shape)
        return nn.BatchNorm2d.forward(self, images)

    norm.forward = types.MethodType(recording, norm)
    engine.fuse_for_training(model, x)
    seen.clear()
    engine.fuse_for_training(model, x)(x)
    assert len(seen) == 1


class Drawn(nn.Module):
    """Python code that a trace does not show."""

    def __init__(self, code):
        super().__init__()
        self.block, self.code, self.calls = block_of(), code, 0

    def forward(self, x):
        return self.code(self, self.block(x))


def counted(self, y):
    self.calls += 1
    return y


def stopped(self, y):
    with torch.no_grad():
        return y * 2


HIDDEN = {
    "random": (lambda self, y: y * 2 if random.random() < 2 else y, "draws random numbers"),
    "torch.rand": (lambda self, y: y + float(torch.rand(1)), "draws random numbers"),
    "counter": (counted, "changes attributes"),
    "no_grad": (stopped, "stops gradients"),
    "values": (lambda self, y: y if y.sum() > 0 else -y, "torch.fx cannot trace"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_code_that_a_trace_does_not_show_is_left_to_pytorch(name, caplog):
    code, reason = HIDDEN[name]
    model, x = nn.Sequential(Drawn(code)).train(), torch.rand(4, 3, 5, 5)
    before = random.getstate(), torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        assert engine.fuse_for_training(model, x) is model
    assert random.getstate() == before[0] and torch.get_rng_state().equal(before[1])
    assert reason in caplog.text


def test_random_layers_draw_what_they_would():
    model, x = nn.Sequential(block_of(), nn.Dropout(0.5), nn.Flatten()).train(), torch.rand(4, 3, 5, 5)
    results = []
    for run in (model, engine.fuse_for_training(model, x)):
        torch.manual_seed(3)
        results.append(run(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3)], ids=repr)
def test_dropout_of_feature_maps_drops_what_it_would(layer, memory_format):
    model, x = nn.Sequential(block_of(), layer, nn.Conv2d(4, 2, 3)).train(), torch.rand(4, 3, 5, 5)
    x = x.contiguous(memory_format=memory_format)
    assert isinstance(engine.fuse_for_training(model, x), TrainingGraph)
    check_learns_the_same(model, x, 1e-5)
    check_learns_the_same(model.double(), x.double())


def test_behind_a_layer_that_is_pruned_wholly_gradients_are_rounding_errors():
    model, x = nn.Sequential(block_of(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), torch.rand(4, 3, 16, 16)
    nn.init.normal_(model[0][1].bias)
    sparsify(model, {"0.0": torch.zeros(4, 3, 3, 3, dtype=torch.bool)})
    assert engine.fuse_for_training(model.train(), x) is not model
    check_learns_the_same(model.double(), x.double(), 1e-6)


def test_one_value_of_each_channel_is_refused_as_by_pytorch():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    assert isinstance(engine.fuse_for_training(model, torch.rand(2, 3, 1, 1)), TrainingGraph)
    for run in (model, engine.fuse_for_training(model, torch.rand(2, 3, 1, 1))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            run(torch.rand(1, 3, 1, 1))


def test_shapes_that_only_broadcast_are_added_by_pytorch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.norm = block_of(), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.block(x)
            return F.relu(self.norm(y) + y.mean((2, 3), keepdim=True))

    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    check_learns_the_same(Scaled().double(), x)


def test_autocast():
    model, x = nn.Sequential(block_of(), nn.Flatten(), nn.Linear(100, 3)).train(), torch.rand(8, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        fused = engine.fuse_for_training(model, x)
        assert fused is not model
        actual, expected = fused(x), copy.deepcopy(model)(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_a_model_is_freed_with_its_graphs():
    import gc
    import weakref

    model, x = block_of().train(), torch.rand(4, 3, 5, 5)
    fused = engine.fuse_for_training(model, x)
    reference = weakref.ref(model)
    del model, fused
    gc.collect()
    assert reference() is None


class Listing(TorchDispatchMode):
    """Lists the names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_trace_leaves_the_masks_that_optimisers_hooks_read():
    """It traces copies that share the weights; CUDA graphs of updates hold the masks of the model itself."""
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), torch.rand(2, 2, 6, 6)
    sparsify(model, masks.prune(model, density=0.5))
    layer = model[0]
    mask, shared = optimizer_hook.mask_of(layer.weight), copy.copy(layer)
    assert engine.fuse_for_training(model, x) is not model
    assert optimizer_hook.mask_of(layer.weight) is mask
    other = ~layer.weight_mask
    shared.set_mask(other)
    assert optimizer_hook.mask_of(layer.weight).equal(other) and layer(x).equal(shared(x))


def test_the_running_statistics_of_all_layers_are_updated_together():
    model = nn.Sequential(Residual(), block_of(nn.BatchNorm2d(4, momentum=0.3))[1:], nn.BatchNorm2d(4)).train()
    x = torch.rand(4, 3, 5, 5)
    fused = engine.fuse_for_training(model, x)
    with torch.no_grad(), Listing() as listing:
        fused(x)
    written = [name for name in listing.names if name.endswith("_")]
    assert listing.names.count("batch_norm_act") == 5 and written == ["_foreach_add_", "_foreach_mul_", "_foreach_add_"]


@pytest.mark.parametrize("shared", [("running_mean", "running_var"), ("running_mean",), ("running_var",)])
def test_layers_that_share_statistics_update_them_one_after_the_other(shared):
    model = nn.Sequential(block_of(), nn.Conv2d(4, 3, 1), block_of()).double()
    for name in shared:
        setattr(model[2][1], name, getattr(model[0][1], name))
    x = torch.rand(4, 3, 5, 5, dtype=torch.float64)
    assert len(engine.explain(model.train(), x)) == 3
    check_learns_the_same(model, x)
