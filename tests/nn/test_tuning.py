"""`tune`: the kernel of a layer is measured, given, or that of the table."""

import copy
import json
import pickle

import pytest
import torch
from helpers.cpu_graphs import CpuCapturer
from helpers.gpu_clocks import GpuClocks
from helpers.tolerances import assert_close
from torch import nn

from sparse_adv.masks import prune
from sparse_adv.nn import explain, frozen_weights, sparsify, tune, tuning
from sparse_adv.ops import PASSES

SHAPE = (2, 3, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, (2, 3), padding="same", padding_mode="zeros"),
        nn.Conv2d(16, 8, 1),
    )
    return sparsify(dense, prune(dense, 0.2, exclude=["3"]))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def given(kernel):
    return {name: {p: {"kernel": kernel} for p in PASSES} for name in ("0", "2")}


def kernels_of(layer):
    explanation = explain(layer, (2, layer.in_channels, 8, 8))
    return {name: text.split()[0] for name, text in explanation.rows[0].kernels.items()}


def race_won_by(winner, loser_ms=2.0):
    def race(run, patterns, trials, seconds):
        run(patterns["sparse"])
        return {kernel: 1e-3 * (1.0 if kernel == winner else loser_ms) for kernel in patterns}

    return race


@pytest.mark.parametrize("winner", ["sparse", "dense"])
def test_the_faster_kernel_is_fixed(model, monkeypatch, winner):
    monkeypatch.setattr(tuning, "_race", race_won_by(winner))
    choices = tune(model, SHAPE)
    assert list(choices) == ["0", "2"]
    for name, choice in choices.items():
        assert {p: choice[p]["kernel"] for p in PASSES} == dict.fromkeys(PASSES, winner)
        assert kernels_of(model[int(name)]) == dict.fromkeys(PASSES, winner)
        for measured in choice.values():
            assert measured[f"{winner}_ms"] == 1.0 and {measured["sparse_ms"], measured["dense_ms"]} == {1.0, 2.0}


def test_the_table_decides_between_kernels_of_equal_time(model, monkeypatch):
    by_table = kernels_of(model[2])
    for winner in ("sparse", "dense"):
        monkeypatch.setattr(tuning, "_race", race_won_by(winner, loser_ms=1.03))
        assert {p: c["kernel"] for p, c in tune(model, SHAPE)["2"].items()} == by_table


def test_real_measurements_choose_the_shorter_time(model):
    for choice in tune(model, SHAPE, trials=2).values():
        for measured in choice.values():
            other = "dense" if measured["kernel"] == "sparse" else "sparse"
            assert 0 < measured[f"{measured['kernel']}_ms"] <= measured[f"{other}_ms"] / 0.95 + 1e-3


@pytest.mark.parametrize(("trials", "seconds", "expected"), [(5, 60.0, 5), (1, 60.0, 2), (5, 0.0, 2)])
def test_each_kernel_is_timed_as_often_as_asked_for_within_the_time(model, monkeypatch, trials, seconds, expected):
    timed = []
    monkeypatch.setattr(tuning, "_clock", lambda run, device: lambda: timed.append(1) or 1.0)
    tune(model, SHAPE, trials=trials, seconds=seconds)
    assert len(timed) == 2 * 3 * 2 * expected  # layers, passes, kernels


def test_tuning_leaves_values_statistics_and_modes_alone(model):
    x = torch.rand(SHAPE)
    before = copy.deepcopy(model)
    tune(model, x, trials=1)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in model.state_dict().items())
    assert model.training and model[1].training
    assert_close(model(x), before(x))
    assert model[0].weight.grad is None


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_both_kernels_compute_the_same(model, kernel):
    x = torch.rand(SHAPE, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    tune(model, SHAPE, given(kernel))
    actual = model(x)
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual.square().sum(), x)[0], expected_grad)
    with frozen_weights(model):
        assert_close(model(x), expected)


def test_choices_are_plain_data_that_can_be_given_back(model, monkeypatch):
    twin = copy.deepcopy(model)
    choices = tune(model, SHAPE, trials=1)
    stored = json.loads(json.dumps(choices))
    monkeypatch.setattr(tuning, "_race", None)
    assert tune(twin, SHAPE, stored) == choices
    assert str(explain(twin, SHAPE)) == str(explain(model, SHAPE))


def test_choices_are_copied_with_the_layer_and_reset_with_the_mask(model):
    tune(model, SHAPE, given("sparse"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kernels_of(twin[0]) == dict.fromkeys(PASSES, "sparse")
    model.load_state_dict(model.state_dict())
    assert model[0].choices is not None
    model[0].set_mask(torch.zeros_like(model[0].weight_mask))
    assert model[0].choices is None
    model[2].weight_mask.logical_not_()
    model(torch.rand(SHAPE))
    assert model[2].choices is None and "tuned" not in str(explain(model, SHAPE))


def test_deterministic_algorithms_ignore_measurements(model, deterministic):
    by_table = kernels_of(model[0])
    for kernel in ("sparse", "dense"):
        tune(model, SHAPE, given(kernel))
        assert kernels_of(model[0]) == by_table
        assert "(deterministic)" in str(explain(model, SHAPE))


def test_wrong_choices_are_refused(model):
    with pytest.raises(ValueError, match=r"choices: model has no module '22'; did you mean '2'?"):
        tune(model, SHAPE, {"22": given("sparse")["0"]})
    with pytest.raises(ValueError, match="choices: model has no module '22'"):
        tune(model, SHAPE, {"0": given("sparse")["0"], "22": given("sparse")["0"]})
    with pytest.raises(ValueError, match=r"choices of .2.: kernel"):
        tune(model, SHAPE, {"0": given("sparse")["0"], "2": given("fast")["2"]})
    with pytest.raises(ValueError, match=r'choices of .0.: kernel of forward must be "sparse" or "dense", got .fast.'):
        tune(model, SHAPE, given("fast"))
    assert model[0].choices is None


def test_layers_without_a_sparse_kernel_are_not_tuned(model):
    model.double()
    assert tune(model, torch.rand(SHAPE).double()) == {}
    assert "dense (no sparse kernel for float64 on cpu)" in str(explain(model))


def weights_after_training(threads: int) -> list[torch.Tensor]:
    """At density 0.7 and 8 x 8 pixels the table chooses the dense grad_weight."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, bias=False)
    )
    sparsify(model, prune(model, 0.7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.rand(64, 3, 8, 8)).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_num_threads(before)
    return [weight.detach().clone() for weight in model.parameters()]


def test_training_gives_the_same_bits_with_any_number_of_threads(deterministic):
    one, two = weights_after_training(1), weights_after_training(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_time_of_a_graph_is_that_of_the_models_gpu(monkeypatch):
    """Another GPU may be the current one."""
    clocks, device, x = GpuClocks(monkeypatch), torch.device("cuda", 1), torch.zeros(1)

    class Timed(CpuCapturer):
        def capture(self, call):
            replay = super().capture(call)

            def timed():
                replay()
                clocks[device] += 20

            return timed

    monkeypatch.setattr(tuning, "Capturer", Timed)
    assert tuning._graph_clock(lambda: x.add_(1), device, calls=10)() == 0.002 and x == 11


@pytest.mark.parametrize("choices", [{"0": {"forward": "dense"}}, {"0": "dense"}])
def test_malformed_choices_name_the_layer(model, choices):
    with pytest.raises(ValueError, match="choices of '0': kernel of forward must be"):
        tune(model, SHAPE, choices=choices)
