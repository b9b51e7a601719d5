"""The overfitting monitor: it detects the loss of robustness, and the epoch is undone and repeated with PGD."""

import logging
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, bars, batches, equal_states, network

from sparse_adv import data, training
from sparse_adv.config import OBJECTIVES
from sparse_adv.runs import Cost
from sparse_adv.training import objectives
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=4)


def monitor() -> OverfittingMonitor:
    return OverfittingMonitor([], CONFIG)


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


def test_pgd_goes_on_until_robustness_is_back(caplog):
    watch = monitor()
    watch.must_undo(0.5)
    assert watch.must_undo(0.05)
    for _ in range(3):
        assert not watch.must_undo(0.05) and watch.pgd_epochs == 1
    assert "5.0 % after an epoch of PGD, and was 50.0 %" in caplog.text
    assert not watch.must_undo(0.45) and watch.pgd_epochs == 0


def test_pruning_is_no_overfitting_and_what_it_leaves_is_the_best():
    watch = monitor()
    assert not watch.must_undo(0.6, 1.0) and not watch.must_undo(0.1, 0.05) and watch.best == 0.1
    assert not watch.must_undo(0.5, 0.05) and watch.best == 0.5
    for density in (0.05, 0.0499, 0.06):  # the same masks, other blocks of unlike sizes, more blocks
        assert watch.must_undo(0.1, density) and watch.best == 0.5
        watch.load_state_dict(watch.state_dict() | {"pgd_epochs": 0})
        assert not watch.must_undo(0.45, 0.05)


def test_a_collapse_while_the_network_is_pruned_step_by_step_is_undone():
    watch = monitor()
    for accuracy, density in ((0.4, 0.8), (0.45, 0.6), (0.44, 0.45)):
        assert not watch.must_undo(accuracy, density)
    assert watch.must_undo(0.0, 0.35)  # and again: its repetition with PGD prunes as well
    assert not watch.must_undo(0.0, 0.35) and watch.pgd_epochs == 1
    assert not watch.must_undo(0.3, 0.28) and watch.pgd_epochs == 0
    assert watch.best == pytest.approx(0.3)


def test_an_undone_attempt_leaves_the_density_before_it():
    watch = monitor()
    assert not watch.must_undo(0.6, 0.5) and watch.must_undo(0.1, 0.8)
    assert not watch.must_undo(0.1, 0.5) and watch.pgd_epochs == 1 and watch.best == 0.6  # judged, and not restored


def test_a_network_that_never_resists_pgd_is_told_once(caplog):
    """With eps 16/255 FGSM-RS had 36 % on its own images of CIFAR-10 and 0.1 % under PGD: no epoch lost anything."""
    watch = monitor()
    for accuracy, train_accuracy in ((0.1, 0.15), (0.2, 0.4), (0.1, 0.29)):
        watch.warn_of_weak_attack(accuracy, train_accuracy)
    assert not caplog.records
    for accuracy in (0.001, 0.0):
        watch.warn_of_weak_attack(accuracy, 0.36)
    (record,) = caplog.records
    assert "36.0 % of the images that fgsm-rs crafts" in record.getMessage() and "0.1 %" in record.getMessage()


def test_the_warning_is_given_in_training(caplog, monkeypatch):
    monkeypatch.setattr(OverfittingMonitor, "measure", lambda self, model: training.Accuracy(0.0, 40, 0, 0))
    training.train(network(), batches(), replace(CONFIG, eps=0.01), validation=VALIDATION)
    assert sum("may be too weak" in record.getMessage() for record in caplog.records) == 1


@pytest.fixture
def overfit_at(monkeypatch):
    """overfit_at(2, 4): the second and the fourth of the next measurements of a monitor are 0; the others are real."""
    measure, calls, faked = OverfittingMonitor.measure, [], []

    def measured(self, model):
        calls.append(measure(self, model))
        return replace(calls[-1], fraction=0.0) if len(calls) in faked else calls[-1]

    def choose(*numbers):
        calls.clear()
        faked[:] = numbers

    monkeypatch.setattr(OverfittingMonitor, "measure", measured)
    return choose


def test_an_overfitted_epoch_is_undone_and_repeated_with_pgd(overfit_at, caplog):
    overfit_at(2)
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


def test_the_monitor_sees_a_collapse_of_the_weights_under_their_average():
    """The average would hide it for epochs, until the weights cannot be repaired by undoing the last of these."""
    config, model, calls = replace(CONFIG, ema_decay=0.99, epochs=3), network(), []

    def collapse(step):
        calls.append(step)
        if len(calls) == 6:  # the last update of epoch 2
            with torch.no_grad():
                model[-1].weight.mul_(-1)

    run = training.Training(model, batches(), config, validation=VALIDATION)
    records = list(run.epochs(collapse))
    assert calls[:9] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert [record.undone_accuracy is None for record in records] == [True, False, True]
    assert run.monitor.measure(model).fraction == records[-1].monitor_accuracy > 0.5 > records[1].undone_accuracy


def test_the_epochs_trained_with_pgd_have_the_step_size_of_pgd(overfit_at, monkeypatch):
    build, built = objectives.build, []
    monkeypatch.setattr(objectives, "build", lambda config, **more: built.append(config) or build(config, **more))
    overfit_at(2)
    training.train(network(), batches(), replace(CONFIG, alpha=0.04, epochs=2), validation=VALIDATION)
    assert [(config.objective, config.step_size) for config in built] == [("fgsm-rs", 0.04), ("pgd", CONFIG.eps / 4)]


@pytest.mark.parametrize("objective", ["fgsm-rs", "fgsm-rs-cs", "fgsm-uap", "nu-at", "free"])
def test_an_undone_epoch_leaves_no_trace(overfit_at, objective):
    """The twin is told before its second epoch to train it with PGD, so it has nothing to undo."""
    config = replace(CONFIG, objective=objective, epochs=3, replays=2, ema_decay=0.9, schedule="cosine", alpha=0.05)
    undone, twin = (
        training.Training(network(), batches(), config, validation=VALIDATION) for _ in ("undone", "its twin")
    )
    overfit_at(2)
    records = [list(undone.epochs())]
    overfit_at()
    records.append([])
    for record in twin.epochs():
        records[1].append(record)
        twin.monitor.pgd_epochs = int(record.epoch == 1)
    assert records[0][1].undone_accuracy == 0.0 and records[1][1].undone_accuracy is None
    for run, its in zip((undone, twin), records, strict=True):
        assert [record.step for record in its] == [epoch * run.updater.steps_per_epoch for epoch in (1, 2, 3)]
    assert [record.loss for record in records[0]] == [record.loss for record in records[1]]
    assert [record.learning_rate for record in records[0]] == [record.learning_rate for record in records[1]]
    assert equal_states(undone.updater.model.state_dict(), twin.updater.model.state_dict())
    assert equal_states(undone.evaluated.state_dict(), twin.evaluated.state_dict())


def test_a_run_that_was_stopped_remembers_its_events(overfit_at, tmp_path):
    """The second event, in epoch 3, has two epochs trained with PGD: a run that continues between them trains both."""

    def run(folder):
        return training.Training(network(), batches(), CONFIG, validation=VALIDATION, folder=folder)

    overfit_at(2, 4)
    whole = run(tmp_path / "whole")
    records = list(whole.epochs())
    overfit_at(2, 4)
    for record in run(tmp_path / "stopped").epochs():
        if record.epoch == 3:
            break
    continued = run(tmp_path / "stopped")
    kept = continued.monitor.state_dict()
    assert (kept["events"], kept["pgd_epochs"]) == (2, 1) and kept["best"] == whole.monitor.best > 0
    assert [record.attack.macs for record in continued.epochs()] == [record.attack.macs for record in records]
    assert records[3].attack.macs == records[2].attack.macs == 2 * records[0].attack.macs
    assert continued.monitor.state_dict() == whole.monitor.state_dict()
    assert equal_states(continued.updater.model.state_dict(), whole.updater.model.state_dict())


def test_there_is_no_monitor_without_validation_images_or_if_it_is_turned_off():
    assert training.Training(network(), batches(), CONFIG).monitor is None
    off = replace(CONFIG, overfitting_monitor=False)
    assert training.Training(network(), batches(), off, validation=VALIDATION).monitor is None


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_monitor_is_for_single_step_attacks(objective):
    watched = training.Training(network(), batches(), replace(CONFIG, objective=objective), validation=VALIDATION)
    assert (watched.monitor is None) == (objective in ("natural", "pgd", "trades", "mart"))


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


def test_the_monitor_looks_at_the_first_256_images_or_at_whole_batches():
    images = bars(300, 3)
    ((x, y),) = OverfittingMonitor(images, CONFIG).images
    assert x.equal(data.to_unit(images.images[:256])) and y.equal(images.labels[:256])
    whole = list(data.Batches(images, 100, shuffle=False))
    assert [len(y) for _, y in OverfittingMonitor(whole, CONFIG).images] == [100] * 3
    assert OverfittingMonitor(images, CONFIG).measure(network()).images == 256
