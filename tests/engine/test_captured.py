"""Passes of searches as CUDA graphs: the same results, bit for bit, as without.

Graphs are those of helpers/cpu_graphs.py, which runs none of the passes' Python code in a replay, as CUDA does.
"""

import logging

import pytest
import torch
from helpers.cpu_graphs import CpuCapturer, CpuGraphs
from torch import nn

from sparse_adv import attacks, engine, masks, sparsify
from sparse_adv.engine import captured
from sparse_adv.engine.kernels_cpu import CpuKernels
from sparse_adv.ops import cuda_graph


@pytest.fixture(autouse=True)
def short_searches_are_long_enough(monkeypatch):
    monkeypatch.setattr(captured, "PASSES_BEFORE", 16)


@pytest.fixture
def capturers(monkeypatch):
    """The capturers of programs that are made from now on, on the CPU and of whole batches as on CUDA."""
    made = []

    class Noted(CpuCapturer):
        def __init__(self, device):
            super().__init__(device)
            made.append(self)

    monkeypatch.setattr(CpuKernels, "capturer", Noted)
    monkeypatch.setattr(CpuKernels, "any_batch", False)
    return made


def network(masked=False):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.GELU(),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5)).eval()
    return sparsify(model, masks.prune(model, 0.4)) if masked else model


IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SEARCHES = {
    "apgd": lambda *args: attacks.apgd(*args, eps=0.05, steps=40, restarts=2, generator=torch.Generator()),
    "apgd_t": lambda *args: attacks.apgd_t(*args, eps=0.02, steps=25, generator=torch.Generator()),
    "fab_t": lambda *args: attacks.fab_t(*args, norm="l2", steps=25, generator=torch.Generator()),
    "square": lambda *args: attacks.square(*args, eps=0.03, queries=60, generator=torch.Generator()),
    "cw": lambda *args: attacks.cw(*args, steps=40),
    "fmn": lambda *args: attacks.fmn(*args, norm="linf", steps=40),
    "pgd": lambda *args: attacks.pgd(*args, eps=0.05, steps=40, generator=torch.Generator(), early_stop=True),
}


def labels_of(model):
    """Those that the model predicts, so that there is something to search, and one that it does not."""
    labels = model(IMAGES).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return labels


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_searches_find_the_same_with_graphs(search, masked, capturers):
    model = network(masked)
    labels = labels_of(model)
    actual = search(model, IMAGES, labels)
    replays = sum(each.replays for each in capturers)
    CpuKernels.capturer = None
    twin = network(masked)
    assert replays > 5 and torch.equal(search(twin, IMAGES, labels), actual)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("in_place", [False, True])
def test_the_weights_are_read_again_in_each_attack(capturers, in_place, masked):
    model = network(masked)
    SEARCHES["apgd"](model, IMAGES, labels_of(model))
    for parameter in model.parameters():
        if in_place:
            parameter.data.mul_(-0.7)
        else:
            parameter.data = -0.7 * parameter.data
    labels = labels_of(model)
    actual = SEARCHES["apgd"](model, IMAGES, labels)
    assert not torch.equal(actual, IMAGES)
    CpuKernels.capturer = None
    twin = network(masked)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(SEARCHES["apgd"](twin, IMAGES, labels), actual)


def check_left(model, capturers, caplog, reason):
    """Passes are never replayed but for the trial, are right, and a log message says why."""
    with caplog.at_level(logging.INFO), engine.input_gradients(model, IMAGES) as gradients:
        for _ in range(3 * captured.PASSES_BEFORE):
            actual = gradients.gradient(IMAGES, lambda logits: logits.square().sum(1))
    expected = engine.Autograd(model).gradient(IMAGES, lambda logits: logits.square().sum(1))
    torch.testing.assert_close(actual, expected)
    assert sum(each.replays for each in capturers) <= 2
    assert caplog.text.count(f"not replayed as CUDA graphs: {reason}") == 1


def test_passes_in_which_the_host_waits_are_left(capturers, caplog, monkeypatch):
    monkeypatch.setattr(CpuCapturer, "synchronises", True)
    check_left(network(), capturers, caplog, "a step synchronises with the GPU")


def test_a_replay_with_another_result_is_never_used(capturers, caplog, monkeypatch):
    capture = CpuCapturer.capture

    def wrong(self, call):
        replay = capture(self, call)
        return lambda: replay().mul_(1.1)

    monkeypatch.setattr(CpuCapturer, "capture", wrong)
    check_left(network(), capturers, caplog, "a replay gave another result")


def test_a_capture_that_fails_is_left(capturers, caplog, monkeypatch):
    def fail(self, call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(CpuCapturer, "capture", fail)
    check_left(network(), capturers, caplog, "operation not permitted when stream is capturing")


def test_passes_are_captured_again_after_another_capture_has_failed(capturers):
    """It may leave their graphs a state of the generator from which no replay can draw."""
    model = network()
    with engine.input_gradients(model, IMAGES) as gradients:
        for again in (False, True):
            if again:
                for holder in list(cuda_graph.holders):
                    holder.forget()
            for _ in range(captured.PASSES_BEFORE + 3):
                actual = gradients.gradient(IMAGES, lambda logits: logits.square().sum(1))
            (capturer,) = capturers
            assert capturer.captures == 2 * (1 + again)
    expected = engine.Autograd(model).gradient(IMAGES, lambda logits: logits.square().sum(1))
    torch.testing.assert_close(actual, expected)


def test_attacks_that_are_captured_as_a_whole_capture_no_passes(capturers):
    model, graphs = network(), CpuGraphs()
    labels = model(IMAGES).argmax(1)
    for _ in range(4):
        attacks.pgd(model, IMAGES, labels, eps=0.05, steps=40, graphs=graphs)
    assert graphs.counts == (1, 2) and not capturers


def test_the_memory_of_graphs_is_free_after_a_search(capturers):
    model = network()
    SEARCHES["apgd"](model, IMAGES, labels_of(model))
    assert sum(each.captures for each in capturers) >= 2
    assert not any(getattr(holder, "_replays", None) for holder in cuda_graph.holders)


def test_infinite_logits_are_replayed(capturers):
    """Of classes that a model leaves out."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = network()

        def forward(self, x):
            return torch.cat([self.model(x), torch.full_like(x[:, 0, 0, :2], -torch.inf)], 1)

    with engine.input_gradients(Masked().eval(), IMAGES) as gradients:
        for _ in range(captured.PASSES_BEFORE + 3):
            logits = gradients.logits(IMAGES)
    assert logits[:, -1].isinf().all() and sum(each.replays for each in capturers) > 1


def test_nothing_is_captured_within_a_capture_of_the_user(capturers, monkeypatch):
    monkeypatch.setattr(CpuCapturer, "is_capturing", staticmethod(lambda: True))
    model = network()
    SEARCHES["pgd"](model, IMAGES, labels_of(model))
    assert not capturers


def test_few_passes_are_not_captured(capturers):
    model = network()
    attacks.pgd(model, IMAGES, model(IMAGES).argmax(1), steps=10)
    attacks.pgd(model, IMAGES, model(IMAGES).argmax(1), steps=10)
    assert not capturers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_on_a_gpu_a_search_finds_examples_as_good_with_graphs(search, masked, monkeypatch):
    """cuDNN may sum in another order each time, so that images near a boundary may fall on either side of it."""
    model = network(masked).cuda()
    images, labels = IMAGES.cuda(), labels_of(network(masked)).cuda()
    fallen = []
    for before in (captured.PASSES_BEFORE, 10**9):
        monkeypatch.setattr(captured, "PASSES_BEFORE", before)
        adv = search(model, images, labels)
        fallen.append(int((model(adv).argmax(1) != labels).sum()))
    assert abs(fallen[0] - fallen[1]) <= 1
