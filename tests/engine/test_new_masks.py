"""A program after its model got new masks: it takes the kernels that a new program would, and computes the same."""

import copy

import pytest
import torch
from torch import nn

from sparse_adv import engine, masks, sparsify
from sparse_adv.engine import kernels_cpu


def network():
    torch.manual_seed(0)
    blocks = [layer for _ in range(3) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2), *blocks, *head).eval()


def new_masks(model, density, block):
    sparsify(model, masks.prune(model, density=density, block=block, scope="uniform", score=random_score))


def random_score(name, weight):
    return torch.rand(weight.shape)


@pytest.mark.parametrize("block", [(4, 4), (4, 4, 3, 3), (1, 1)], ids=str)
def test_the_kernels_are_those_of_a_new_program(block):
    model, x = network(), torch.rand(16, 3, 34, 34)
    labels = torch.arange(16) % 10

    def loss(logits):
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    seen = set()
    for density in (0.1, 1.0, 0.5, 0.1):
        new_masks(model, density, block)
        fresh = copy.deepcopy(model)
        assert engine.explain(model, x) == engine.explain(fresh, x)
        seen.add(tuple(engine.explain(model, x)))
        with engine.input_gradients(model, x) as own, engine.input_gradients(fresh, x) as expected:
            assert own.gradient(x, loss).equal(expected.gradient(x, loss))
            torch.testing.assert_close(own.logits(x), model(x), rtol=1e-3, atol=1e-4)
    assert len(seen) > 1


def test_what_is_listed_of_a_mask_is_listed_once(monkeypatch):
    model, x = network(), torch.rand(16, 3, 16, 16)
    new_masks(model, 0.1, (1, 1, 3, 3))
    listed = []
    monkeypatch.setattr(
        kernels_cpu, "live_filters", lambda *given, own=kernels_cpu.live_filters: (listed.append(1), own(*given))[1]
    )
    for expected in (True, False, False):
        listed.clear()
        with engine.input_gradients(model, x):
            assert bool(listed) == expected
    new_masks(model, 0.1, (1, 1, 3, 3))
    with engine.input_gradients(model, x):
        assert listed
