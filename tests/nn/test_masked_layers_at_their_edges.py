"""Masked layers where other code gives them parameters, masks and calls in unusual ways."""

import copy
import sys
from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv import attacks, masks, ops
from sparse_adv.nn import (
    MaskedConv2d,
    MaskedLinear,
    count_macs,
    dead_channels,
    dense_gradients,
    densify,
    frozen_weights,
    sparsify,
    tune,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def sparse(density=0.4) -> nn.Sequential:
    model = network()
    return sparsify(model, masks.prune(model, density, linear=True))


@pytest.mark.parametrize("engine", [True, False])
def test_attacks_differentiate_the_parameters_of_a_functional_call(engine):
    class Averaged(nn.Module):
        def __init__(self, net, other):
            super().__init__()
            self.net, self.other = net, other

        def forward(self, x):
            return torch.func.functional_call(self.net, self.other, x)

    net = sparse()
    other = {name: torch.randn_like(value) for name, value in net.named_parameters()}
    for name, layer in net.named_modules():
        if hasattr(layer, "weight_mask"):
            other[f"{name}.weight"] = other[f"{name}.weight"] * layer.weight_mask
    model, x = Averaged(net, other).eval(), torch.rand(4, 2, 6, 6)
    dense = network()
    dense.load_state_dict(other, strict=False)
    with frozen_weights(model):
        torch.testing.assert_close(model(x), dense(x))
    options = {"eps": 0.1, "alpha": 0.05, "steps": 2, "random_start": False, "engine": engine}
    labels = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(attacks.pgd(model, x, labels, **options), attacks.pgd(dense, x, labels, **options))


def test_a_dense_state_is_missing_the_masks_of_a_model_on_meta():
    with torch.device("meta"):
        model = network()
    kept = masks.prune(network(), 0.4, linear=True)
    sparsify(model, {name: mask.to("meta") for name, mask in kept.items()})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight_mask"'):
        model.load_state_dict(network().state_dict(), assign=True)
    state = sparsify(network(), kept).state_dict()
    model.load_state_dict(state, assign=True)
    x = torch.rand(2, 2, 6, 6)
    torch.testing.assert_close(model(x), sparsify(network(), kept)(x))


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 4, 3), lambda: nn.Linear(6, 4)])
def test_weights_are_revived_from_0_after_a_write_by_hand(make):
    model = nn.Sequential(make())
    kept = torch.rand(model[0].weight.shape) < 0.5
    sparsify(model, {"0": kept})
    nn.init.ones_(model[0].weight)
    model[0].set_mask(torch.ones_like(kept))
    assert model[0].weight.equal(kept.float())


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 4, 3), lambda: nn.Linear(6, 4)])
def test_a_parametrized_layer_gets_no_other_mask(make):
    model = nn.Sequential(make())
    kept = torch.rand(model[0].weight.shape) < 0.5
    sparsify(model, {"0": kept})
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(TypeError, match="weight is computed from something else"):
        model[0].set_mask(~kept)
    assert model[0].weight_mask.equal(kept)


def test_the_refusal_of_spectral_norm_leaves_the_layer_whole():
    layer = sparse()[0]
    weight = layer.weight
    with pytest.raises(TypeError, match="spectral_norm cannot change a masked layer"):
        nn.utils.spectral_norm(layer)
    assert layer.weight is weight and layer(torch.rand(1, 2, 6, 6)).isfinite().all()


def test_an_interrupt_while_weights_are_frozen_freezes_none(monkeypatch):
    model = sparse()

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(MaskedLinear, "freeze", interrupt)
    with pytest.raises(KeyboardInterrupt), frozen_weights(model):
        pass
    model(torch.rand(2, 2, 6, 6)).sum().backward()
    assert model[0].weight.grad is not None


def test_layers_may_be_called_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=self.conv(input=x))

    model = Model()
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[1] = False
    assert dead_channels(model, {"conv": mask}, (1, 2, 6, 6))["norm"].tolist() == [False, True, False, False]
    sparsify(model, {"conv": mask})
    assert count_macs(model, (1, 2, 6, 6)).kept == 3 * 2 * 9 * 16
    assert set(tune(model, torch.rand(1, 2, 6, 6), trials=1)) == {"conv"}


def test_weights_frozen_in_inference_mode_give_the_gradients_of_the_input_outside_of_it():
    model, x = sparse(), torch.rand(2, 2, 6, 6)
    (expected,) = torch.autograd.grad(densify(copy.deepcopy(model))(x.requires_grad_()).square().sum(), x)
    with torch.inference_mode(), frozen_weights(model), torch.inference_mode(False):
        (actual,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_a_state_that_is_read_between_two_backward_passes_changes_no_second_derivative():
    model, x = sparse(), torch.rand(2, 2, 6, 6)
    dense, mask = densify(copy.deepcopy(model)), model[0].weight_mask
    for each in (model, dense):
        each(x).square().sum().backward(create_graph=True)
        penalty = each[0].weight.grad.mul(mask).square().sum()
        each.state_dict()
        penalty.backward()
    for (name, parameter), twin in zip(model.named_parameters(), dense.parameters(), strict=True):
        kept = dict(model.named_buffers()).get(f"{name}_mask", torch.tensor(True))
        torch.testing.assert_close(parameter.grad, twin.grad * kept)


def test_a_masked_layer_inside_of_another_is_replaced_too():
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    model[0].child = nn.Conv2d(2, 2, 1)
    kept = {"0": torch.rand(2, 2, 3, 3) < 0.5, "0.child": torch.rand(2, 2, 1, 1) < 0.5}
    sparsify(model, kept)
    assert isinstance(model[0], MaskedConv2d) and isinstance(model[0].child, MaskedConv2d)


@pytest.mark.parametrize("choices", [{"0": {"forward": "dense"}}, {"0": "dense"}])
def test_malformed_choices_name_the_layer(choices):
    with pytest.raises(ValueError, match="choices of '0': kernel of forward must be"):
        tune(sparse(), torch.rand(1, 2, 6, 6), choices=choices)


def test_dense_gradients_in_bfloat16_are_right_at_strides():
    draw = torch.Generator().manual_seed(0)
    for stride, padding, pixels in ((2, 1, 1), (3, 1, 2), (2, 2, 3)):
        layer = nn.Conv2d(16, 16, 3, stride, padding)
        model = sparsify(nn.Sequential(layer), {"0": torch.rand(16, 16, 3, 3, generator=draw) < 0.5}).bfloat16()
        x = torch.randn(4, 16, pixels, pixels, generator=draw).bfloat16()
        out = copy.deepcopy(model)(x)
        grad = torch.randn(out.shape, generator=draw).bfloat16()
        weight = model[0].weight.detach().double().requires_grad_()
        F.conv2d(x.double(), weight, None, stride, padding).backward(grad.double())
        for _ in range(10):
            junk = [torch.full((size,), 7e33) for size in (64, 1024, 20_000)]
            del junk
            with dense_gradients(model) as gradients:
                model(x).backward(grad)
            (found,) = gradients.values()
            torch.testing.assert_close(found.double(), weight.grad, rtol=0.05, atol=0.2)


def test_a_module_of_two_names_is_written_pruned_under_both(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(2, 4, 3)
            self.b = self.a

    model = Twice()
    kept = masks.prune(model, 0.3)
    for format in ("dense", "prune"):
        masks.save_pruned(tmp_path / "x.pt", kept, model.state_dict(), format=format)
        loaded = masks.load_pruned(tmp_path / "x.pt")
        assert all(loaded.masks[name].equal(kept["a"]) for name in ("a", "b"))
    sparsify(model, kept)
    masks.save_pruned(tmp_path / "x.pt", kept, model.state_dict())
    state = torch.load(tmp_path / "x.pt")
    assert state["b.weight"].count_nonzero() == kept["a"].sum()


CASES = [  # images, weight, stride, padding, dilation, groups
    ((8, 1, 5, 1), (16, 1, 3, 3), (1, 4), (1, 2), (2, 1), 1),
    ((2, 1, 3, 1), (16, 1, 3, 2), (1, 2), (2, 1), (1, 1), 1),
    ((2, 12, 3, 1), (4, 3, 1, 1), (1, 3), (0, 2), (1, 4), 4),
    ((8, 4, 4, 1), (1, 4, 1, 1), (2, 2), (3, 3), (2, 2), 1),
    ((8, 2, 1, 1), (16, 1, 3, 3), (3, 2), (1, 2), (1, 1), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_at_which_onednn_fails_are_right(case, dtype):
    """It reads memory that nobody wrote, or ends the process, in channels_last."""
    size, filters, stride, padding, dilation, groups = case
    draw, geometry = torch.Generator().manual_seed(0), (stride, padding, dilation, groups)
    x, weight = torch.randn(size, generator=draw).to(dtype), torch.randn(filters, generator=draw).to(dtype)
    bias = torch.randn(filters[0], generator=draw).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv2d(*leaves, bias.double(), *geometry)
    grad = torch.randn(expected.shape, generator=draw).to(dtype)
    expected_gradients = torch.autograd.grad(expected, leaves, grad.double())
    pattern = ops.compile_pattern(torch.ones(filters, dtype=torch.bool), groups=groups)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    last = torch.channels_last
    for x_last, weight_last in ((False, False), (False, True), (True, False), (True, True)):
        own = [x.to(memory_format=last) if x_last else x, weight.to(memory_format=last) if weight_last else weight]
        for _ in range(5):
            junk = [torch.full((count,), 7e3) for count in (64, 256, 1024, 4096, 20_000)]
            del junk
            inputs = [tensor.detach().requires_grad_() for tensor in own]
            out = ops.masked_conv2d(*inputs, pattern, bias, *geometry)
            torch.testing.assert_close(out.double(), expected, **near)
            for found, wanted in zip(torch.autograd.grad(out, inputs, grad), expected_gradients, strict=True):
                torch.testing.assert_close(found.double(), wanted, **near)


@pytest.mark.parametrize("assign", [setattr, MaskedLinear.register_buffer])
def test_a_buffer_in_place_of_the_mask_is_a_new_mask(assign):
    kept = torch.rand(4, 6) < 0.3
    layer = MaskedLinear(6, 4, mask=kept)
    assign(layer, "weight_mask", torch.ones_like(kept))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.rand(3, 6)).sum().backward()
    optimizer.step()
    assert layer.weight[~kept].all()
    with pytest.raises(ValueError, match="shape"):
        assign(layer, "weight_mask", kept[1:])
    assert layer.weight_mask.all()


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(2, 4, 3), lambda: nn.Linear(5, 4)])
def test_a_forward_pass_and_a_state_dict_evaluate_a_parametrization_as_often_as_a_dense_layer(make):
    calls = []

    class Scale(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return 2 * weight

    def evaluations(layer):
        nn.utils.parametrize.register_parametrization(layer, "weight", Scale())
        calls.clear()
        layer(torch.rand(1, 2, 5, 5))
        forward = len(calls)
        layer.state_dict()
        return forward, len(calls) - forward

    dense = make()
    kept = torch.ones_like(dense.weight, dtype=torch.bool)
    sparse_layer = sparsify(nn.Sequential(copy.deepcopy(dense)), {"0": kept})[0]
    assert evaluations(sparse_layer) == evaluations(dense) == (1, 0)


def test_masks_change_while_optimisers_make_their_first_steps_in_another_thread():
    layers = [MaskedLinear(2, 2) for _ in range(2)]
    layers[0].weight.data.zero_()
    layers[0].weight.grad = torch.ones(2, 2)
    kept, before = torch.eye(2, dtype=torch.bool), layers[1].weight.detach().clone()
    optimizers = [torch.optim.SGD(layers[0].parameters(), lr=0.125) for _ in range(500)]

    def make_steps():
        for optimizer in optimizers:
            optimizer.step()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = Thread(target=make_steps)
        thread.start()
        while thread.is_alive():
            layers[1].set_mask(torch.ones_like(kept))
            layers[1].set_mask(kept)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert layers[0].weight.eq(-0.125 * len(optimizers)).all()
    assert layers[1].weight.equal(before * kept) and layers[1].weight_mask.equal(kept)
