"""The gradient of a model's steps is compared with autograd's once for each state of the model, not for each batch."""

import math

import pytest
import torch
from helpers.attacked import batch, make_model
from torch import nn

from sparse_adv import engine
from sparse_adv.engine import input_gradients
from sparse_adv.engine.training import TrainingGraph


def test_batches_of_other_sizes_take_the_verdict_of_the_first(compared):
    model = make_model().eval()
    for size in (7, 3, 12, 1, 5, 30, 2, 1):
        x, _ = batch(size=size)
        with input_gradients(model, x) as gradients, input_gradients(model, x, use_engine=False) as expected:
            actual = gradients.gradient(x, torch.sum)
            torch.testing.assert_close(actual, expected.gradient(x, torch.sum), rtol=1e-4, atol=1e-6)
        assert gradients is not expected
    assert [size[0] for size in compared] == [2, 1]
    with torch.no_grad():
        model.register_buffer("another", torch.ones(1))
    with input_gradients(model, batch(size=7)[0]):
        assert [size[0] for size in compared] == [2, 1, 2]


def test_programs_of_more_shapes_than_are_kept_are_not_made_for_each_call(made, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()

    def attacked(size):
        x = torch.rand(2, 3, size, size)
        with input_gradients(model, x) as gradients:
            assert gradients.gradient(x, torch.sum).shape == x.shape
        return isinstance(gradients, engine.Program)

    def sizes_made():
        return [shape[2] for shape in made]

    sizes = range(4, 13)
    assert all(attacked(size) for size in sizes) and sizes_made() == [*sizes]  # the first is forgotten with the last
    assert [attacked(size) for size in sizes] == [False, *[True] * 8] and sizes_made() == [*sizes]
    assert caplog.text.count("its inputs are of more than 8 shapes in turn") == 1
    assert [attacked(4) for _ in range(20)].count(True) >= 5  # as often as that it is worth it
    assert sizes_made() == [*sizes, 4]


def test_memory_that_does_not_suffice_once_says_nothing_about_the_model(caplog):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), torch.rand(2, 3, 6, 6)
    failures = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")]

    def fail_once(module, inputs, output):
        if failures:
            raise failures.pop()

    model[2].register_forward_hook(fail_once)
    used = []
    for _ in range(2):
        with engine.input_gradients(model, x) as gradients:
            used.append(type(gradients))
    assert used == [engine.Autograd, engine.Program]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "memory did not suffice to try it out: CUDA out of memory" in caplog.text


@pytest.mark.parametrize("bad", ["image", "weight"])
def test_results_that_are_not_finite_say_nothing_about_the_model(bad, caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
    x, weight = torch.rand(2, 3, 6, 6), model[0].weight.detach().clone()
    spoilt = x.clone()
    if bad == "image":
        spoilt[0] = math.nan
    else:
        model[0].weight.data.fill_(math.nan)
    with engine.input_gradients(model, spoilt) as gradients:
        assert isinstance(gradients, engine.Autograd)
    assert engine.fuse_for_training(model.train(), spoilt) is model
    assert caplog.text.count("its results are not finite") == 2
    model[0].weight.data.copy_(weight)
    assert isinstance(engine.fuse_for_training(model, x), TrainingGraph)
    with engine.input_gradients(model.eval(), x) as gradients:
        assert isinstance(gradients, engine.Program)


def test_a_graph_asked_for_in_inference_mode_serves_outside_of_it():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()), torch.rand(2, 3, 6, 6)
    with torch.inference_mode():
        assert isinstance(engine.fuse_for_training(model, x + 0), TrainingGraph)
    engine.fuse_for_training(model, x)(x).sum().backward()
    assert model[0].weight.grad.isfinite().all()
