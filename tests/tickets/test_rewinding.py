"""Weights to rewind to are those of an epoch that was not undone."""

from dataclasses import replace

import pytest
from helpers.small_runs import QUICK, VALIDATION, batches, equal_states, network

from sparse_adv import tickets
from sparse_adv.tickets import PruneConfig
from sparse_adv.training.overfitting import OverfittingMonitor


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

    ticket = tickets.search(
        model,
        batches(),
        replace(QUICK, objective="fgsm-rs", epochs=2),
        PruneConfig(rewind_step=5),
        validation=VALIDATION,
        folder=tmp_path if to_folder else None,
        on_step=on_step,
    )
    assert len(seen) == 2 and not equal_states(*seen) and equal_states(ticket.state_dict, seen[1])
