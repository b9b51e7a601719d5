"""A hook of the user: its state belongs to the run, and is saved, continued and undone with it."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import training
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=4)


class Counting(training.UpdateHook):
    def __init__(self):
        self.updates, self.began = 0, 0

    def begin(self, updater):
        self.began += 1

    def after_update(self, step, gradients):
        self.updates += 1
        return False

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


class Empty(Counting):
    """Like a container of results that is empty as yet."""

    def __len__(self):
        return 0


def train(folder=None, hook=None, config=CONFIG, **options):
    hook = Counting() if hook is None else hook
    training.train(network(), batches(), config, folder=folder, hook=hook, **options)
    return hook


@pytest.mark.parametrize("hook", [Counting, Empty])
def test_a_stopped_run_continues_with_the_state_of_its_hook(tmp_path, hook):
    assert train(tmp_path, hook(), on_epoch=lambda record: record.epoch == 2).updates == 6
    assert train(tmp_path, hook()).updates == 12


def test_an_undone_epoch_is_undone_for_the_hook_too(monkeypatch):
    accuracies = iter([0.5, 0.0, 0.5, 0.5, 0.5])
    measure = OverfittingMonitor.measure
    monkeypatch.setattr(
        OverfittingMonitor, "measure", lambda self, model: replace(measure(self, model), fraction=next(accuracies))
    )
    assert train(validation=VALIDATION).updates == 12


def test_a_hook_without_a_truth_value_of_true_is_called():
    hook = train(hook=Empty())
    assert hook.began == 1 and hook.updates == 12


def test_the_state_of_one_hook_is_not_given_to_another(tmp_path):
    train(tmp_path / "with", config=replace(CONFIG, epochs=1))
    with pytest.raises(ValueError, match="hook must be of class Counting, as before, got UpdateHook"):
        training.train(network(), batches(), CONFIG, folder=tmp_path / "with")
    training.train(network(), batches(), replace(CONFIG, epochs=1), folder=tmp_path / "without")
    with pytest.raises(ValueError, match="hook must be of class UpdateHook, as before, got Counting"):
        train(tmp_path / "without")


@pytest.mark.parametrize(
    ("result", "epochs"), [(np.bool_(True), 1), (True, 1), (1, 4), (np.bool_(False), 4), (None, 4)]
)
def test_training_ends_where_on_epoch_returns_true(result, epochs):
    assert len(training.train(network(), batches(), CONFIG, on_epoch=lambda record: result)) == epochs
