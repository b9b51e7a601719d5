"""Frozen modules stay in eval mode in training; which they are is what the model said last in training mode."""

import pytest
from helpers.small_runs import QUICK, batches, network

from sparse_adv import training
from sparse_adv.training.modes import frozen_modules, set_training_mode


def statistics_that_moved(model) -> list[str]:
    """The BatchNorm layers whose statistics a training changes."""
    before = {name: value.clone() for name, value in model.named_buffers()}
    training.train(model, batches(), QUICK)
    return [
        name for name in ("1", "4") if not model.get_submodule(name).running_mean.equal(before[f"{name}.running_mean"])
    ]


@pytest.mark.parametrize("frozen", [["1"], ["1", "4"], []])
def test_a_model_in_training_mode_says_which_modules_are_frozen_whatever_was_before(frozen):
    model = network()
    for names in (["4"], frozen, ["1"]):
        set_training_mode(model, names)
        assert frozen_modules(model) == names == frozen_modules(model.eval())
        set_training_mode(model, names)
        assert statistics_that_moved(model) == [name for name in ("1", "4") if name not in names]
        assert not model.training and frozen_modules(model) == names
