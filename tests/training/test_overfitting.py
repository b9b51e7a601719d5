"""The overfitting monitor: it detects the loss of robustness, and the epoch is undone and repeated with PGD."""

import logging
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import training
from sparse_adv.runs import Cost
from sparse_adv.training import CatastrophicOverfittingError, TrainConfig
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=4)


def monitor(objective: str = "fgsm-rs") -> OverfittingMonitor:
    return OverfittingMonitor([], TrainConfig(objective))


def test_an_accuracy_of_less_than_half_of_the_best_is_overfitting():
    watch = monitor()
    assert [watch.must_undo(accuracy) for accuracy in (0.1, 0.4, 0.25, 0.38, 0.32)] == [False] * 5
    assert watch.best == 0.4
    assert watch.must_undo(0.1)
    assert watch.best == 0.4


def test_small_drops_are_noise():
    watch = monitor()
    assert not watch.must_undo(0.09) and not watch.must_undo(0.0)


def test_an_accuracy_that_is_nan_is_overfitting():
    assert monitor().must_undo(float("nan"))


def test_each_event_doubles_the_epochs_of_pgd():
    watch = monitor()
    watch.must_undo(0.5)
    for events in (1, 2, 3):
        assert watch.must_undo(0.05) and watch.pgd_epochs == 2 ** (events - 1)
        for _ in range(watch.pgd_epochs):
            assert not watch.must_undo(0.5)
        assert watch.pgd_epochs == 0


@pytest.mark.parametrize("objective", ["pgd", "trades", "mart"])
def test_overfitting_in_training_with_pgd_is_an_error(objective):
    watch = monitor(objective)
    watch.must_undo(0.5)
    with pytest.raises(CatastrophicOverfittingError, match=rf"from 50\.0% to 5\.0% .* objective '{objective}'"):
        watch.must_undo(0.05)


def test_overfitting_in_a_repeated_epoch_is_an_error():
    watch = monitor()
    watch.must_undo(0.5)
    assert watch.must_undo(0.05)
    with pytest.raises(CatastrophicOverfittingError, match="an epoch with objective 'pgd'"):
        watch.must_undo(0.05)


@pytest.fixture
def overfit_once(monkeypatch):
    """The second measurement of the monitor is 0; the others are real."""
    measure, calls = OverfittingMonitor.measure, []

    def faked(self, model):
        calls.append(measure(self, model))
        return calls[-1]._replace(fraction=0.0) if len(calls) == 2 else calls[-1]

    monkeypatch.setattr(OverfittingMonitor, "measure", faked)


def test_an_overfitted_epoch_is_undone_and_repeated_with_pgd(overfit_once, caplog):
    updates, model = [], network()
    with caplog.at_level(logging.WARNING):
        records = training.train(
            model,
            batches(),
            CONFIG,
            validation=VALIDATION,
            on_step=lambda step: updates.append((step, model[0].weight.detach().clone())),
        )
    assert [step for step, _ in updates] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert not updates[3][1].equal(updates[6][1])  # the same batch and weights, but another attack
    assert [record.undone_accuracy for record in records] == [None, 0.0, None, None]
    assert "epoch 2: catastrophic overfitting" in caplog.text and "repeated with PGD" in caplog.text
    last_attempts = sum((record.attack + record.update for record in records), Cost())
    assert records[-1].total.macs > last_attempts.macs  # the undone attempt is counted
    assert records[1].attack.macs == 2 * records[0].attack.macs  # PGD-2 instead of one step


def test_there_is_no_monitor_without_validation_images_or_attacks_or_if_it_is_turned_off():
    assert training.Training(network(), batches(), CONFIG).monitor is None
    for config in (replace(CONFIG, objective="natural"), replace(CONFIG, overfitting_monitor=False)):
        assert training.Training(network(), batches(), config, validation=VALIDATION).monitor is None


def test_the_monitor_distinguishes_a_robust_network_from_one_that_is_not():
    model, config = network(), replace(CONFIG, eps=0.15)
    watch = OverfittingMonitor(VALIDATION, config)
    training.train(model, batches(), replace(config, objective="pgd", steps=5))
    robust = watch.measure(model).fraction
    assert robust > 0.5 and not watch.must_undo(robust)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    assert watch.must_undo(watch.measure(model).fraction)
