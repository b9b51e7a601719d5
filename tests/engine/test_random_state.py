"""Random numbers drawn while the engine tries a model out: its own are undone, those of other threads stay."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn

from sparse_adv import engine
from sparse_adv.engine.random_state import KeptGenerators

DRAWS = {
    "torch": lambda: torch.rand(3).tolist(),
    "in place": lambda: torch.empty(3).normal_().tolist(),
    "dropout": lambda: torch.dropout(torch.ones(20), 0.5, True).tolist(),
    "permutation": lambda: torch.randperm(9).tolist(),
    "numpy": lambda: np.random.rand(3).tolist(),
    "python": lambda: [random.random(), random.gauss(0, 1)],
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_inside_is_undone_and_comes_again(name):
    draw = DRAWS[name]
    with KeptGenerators(torch.device("cpu")) as generators:
        assert not generators.drawn
        first = draw()
        assert generators.drawn
        generators.rewind()
        assert not generators.drawn and draw() == first
    assert draw() == first and draw() != first


def test_a_generator_of_the_callers_own_is_no_global_one():
    own = torch.Generator().manual_seed(0)
    with KeptGenerators(torch.device("cpu")) as generators:
        torch.rand(3, generator=own), torch.randperm(9, generator=own), torch.empty(3).normal_(generator=own)
        assert not generators.drawn
        torch.rand(3)
        assert generators.drawn


def test_other_threads_draw_the_numbers_that_they_would_alone():
    count, x = 3000, torch.rand(2, 3, 8, 8)
    torch.manual_seed(0)
    expected = [float(torch.rand(())) for _ in range(count)]
    actual, begun = [], threading.Event()

    def draw() -> None:
        for i in range(count):
            actual.append(float(torch.rand(())))
            if i == 10:
                begun.set()

    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()) for _ in range(4)]
    torch.manual_seed(0)
    thread = threading.Thread(target=draw)
    thread.start()
    begun.wait()
    for model in models:
        assert engine.fuse_for_training(model, x) is not model
        with engine.input_gradients(model.eval(), x) as gradients:
            assert isinstance(gradients, engine.Program)
    thread.join()
    assert actual == expected
