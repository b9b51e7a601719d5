"""The collapse guard: it sees a collapse, undoes the epoch, and says so."""

import logging
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import training
from sparse_adv.training import CatastrophicOverfittingError, TrainConfig
from sparse_adv.training.overfitting import OverfittingMonitor

RECIPE = replace(QUICK, objective="fgsm-rs", epochs=4)


def guard(**settings) -> OverfittingMonitor:
    return OverfittingMonitor([], TrainConfig(objective="fgsm-rs", **settings))


def test_a_fall_to_less_than_half_is_a_collapse_and_scatter_is_none():
    judge = guard()
    assert [judge.collapsed(accuracy) for accuracy in (0.1, 0.4, 0.25, 0.38, 0.32)] == [False] * 5
    assert judge.best == 0.4
    assert judge.collapsed(0.1)
    assert judge.best == 0.4


def test_small_accuracies_scatter_without_alarm():
    judge = guard()
    assert not judge.collapsed(0.09) and not judge.collapsed(0.0)


def test_pgd_takes_over_for_longer_after_each_collapse():
    judge = guard()
    judge.collapsed(0.5)
    for collapses in (1, 2, 3):
        assert judge.collapsed(0.05) and judge.pgd_epochs == 2 ** (collapses - 1)
        for _ in range(judge.pgd_epochs):
            assert not judge.collapsed(0.5)
        assert judge.pgd_epochs == 0


@pytest.mark.parametrize("objective", ["pgd", "trades"])
def test_what_pgd_cannot_keep_ends_the_run(objective):
    judge = OverfittingMonitor([], TrainConfig(objective=objective))
    judge.collapsed(0.5)
    with pytest.raises(CatastrophicOverfittingError, match=r"fell from 50\.0% to 5\.0%"):
        judge.collapsed(0.05)


def test_a_collapse_in_an_epoch_of_pgd_ends_the_run():
    judge = guard()
    judge.collapsed(0.5)
    assert judge.collapsed(0.05)
    with pytest.raises(CatastrophicOverfittingError, match="an epoch of PGD training"):
        judge.collapsed(0.05)


@pytest.fixture
def collapse_once(monkeypatch):
    """The guard's second probe says that all robustness is gone; the others are what they are."""
    measured, count = OverfittingMonitor.measure, [0]

    def measure(self, model):
        count[0] += 1
        found = measured(self, model)
        return training.Accuracy(0, 40, found.forward, found.backward) if count[0] == 2 else found

    monkeypatch.setattr(OverfittingMonitor, "measure", measure)


def test_a_collapsed_epoch_is_undone_and_trained_again_with_pgd(collapse_once, caplog):
    starts, model = [], network()
    with caplog.at_level(logging.WARNING):
        records = training.train(
            model,
            batches(),
            RECIPE,
            validation=VALIDATION,
            on_step=lambda step: starts.append((step, model[0].weight.detach().clone())),
        )
    assert [step for step, _ in starts] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert not starts[3][1].equal(starts[6][1])  # the same batch from the same weights, with another attack
    assert [record.get("rolled_back", False) for record in records] == [False, True, False, False]
    assert "epoch 2: robustness collapsed" in caplog.text and "trained again with PGD" in caplog.text
    spent = sum(record["attack_multiply_adds"] + record["update_multiply_adds"] for record in records)
    assert records[-1]["multiply_adds"] > spent  # what was undone has been paid for
    assert records[1]["attack_multiply_adds"] == 2 * records[0]["attack_multiply_adds"]  # PGD-2


def test_without_held_out_images_or_for_natural_training_there_is_no_guard():
    assert training.Training(network(), batches(), RECIPE).guard is None
    natural = replace(RECIPE, objective="natural")
    assert training.Training(network(), batches(), natural, validation=VALIDATION).guard is None
    off = replace(RECIPE, overfitting_monitor=False)
    assert training.Training(network(), batches(), off, validation=VALIDATION).guard is None


def test_the_probe_tells_a_robust_network_from_one_that_is_not():
    model = network()
    judge = OverfittingMonitor.over(VALIDATION, replace(RECIPE, eps=0.15))
    training.train(model, batches(), replace(RECIPE, objective="pgd", eps=0.15, steps=5), validation=None)
    healthy = judge.measure(model)
    assert healthy > 0.5 and not judge.collapsed(healthy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    assert judge.collapsed(judge.measure(model))
