"""Rewinding: to the weights after an update, which must be made, in an epoch that was not undone."""

import copy
from dataclasses import replace

import pytest
from helpers.small_runs import QUICK, VALIDATION, batches, equal_states, network

from sparse_adv import tickets, training
from sparse_adv.tickets import PruneConfig
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)


def search(prune, config=CONFIG, model=None, **options):
    model = network() if model is None else model
    return tickets.search(model, batches(), config, prune, validation=VALIDATION, **options)


@pytest.mark.parametrize("to_folder", [False, True])
def test_the_weights_are_those_of_the_last_attempt_at_the_epoch(tmp_path, monkeypatch, to_folder):
    measure, calls = OverfittingMonitor.measure, []

    def measured(self, model):
        calls.append(measure(self, model))
        return replace(calls[-1], fraction=0.0) if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(OverfittingMonitor, "measure", measured)
    model, seen = network(), []

    def on_step(step):
        if step == 5:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    ticket = search(PruneConfig(rewind_step=5), model=model, folder=tmp_path if to_folder else None, on_step=on_step)
    assert len(seen) == 2 and not equal_states(*seen) and equal_states(ticket.state_dict, seen[1])


def test_rewinding_returns_to_the_weights_after_that_update():
    seen = {}
    model = network()
    run = training.Training(model, batches(), CONFIG, validation=VALIDATION)
    list(run.epochs(on_step=lambda step: seen.update({step: copy.deepcopy(model.state_dict())})))
    searched = network()
    ticket = search(PruneConfig(rewind_step=4, rounds=2), model=searched)
    assert equal_states(ticket.state_dict, seen[4])
    assert equal_states(searched.state_dict(), network().state_dict())


def test_rewinding_to_an_update_that_is_never_made_is_refused_before_any_training(tmp_path):
    epochs = []
    for objective, updates in (("natural", 6), ("free", 18)):
        config = replace(CONFIG, objective=objective, replays=3)
        with pytest.raises(ValueError, match=f"must be an update of the first round, which has {updates}"):
            search(PruneConfig(rewind_step=updates + 1), config, folder=tmp_path, on_epoch=epochs.append)
    assert not epochs and not list(tmp_path.iterdir())
    assert search(PruneConfig(rewind_step=6), folder=tmp_path, on_epoch=epochs.append) and len(epochs) == CONFIG.epochs


def test_rewinding_to_an_update_after_an_early_stop_is_refused():
    with pytest.raises(ValueError, match="must be an update of the first round, which did not make it, got 21"):
        search(PruneConfig(rewind_step=21, early_stop_distance=0.39), replace(CONFIG, epochs=7))
