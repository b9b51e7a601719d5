"""Costs of training: the MACs of an epoch follow from the passes of its attacks, updates and evaluations."""

from dataclasses import replace

import pytest
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import nn, training


@pytest.mark.parametrize(
    ("objective", "attack", "update"),
    [
        ("natural", (0, 0), (1, 0)),
        ("fgsm-rs", (1, 1), (1, 0)),
        ("pgd", (2, 2), (1, 0)),
        ("trades", (3, 2), (2, 0)),
        ("mart", (2, 2), (2, 0)),
        ("fgsm-uap", (1, 1), (2, 0)),
        ("nu-at", (4 / 3, 1), (2, 0)),  # the second of three updates compares with the clean images
        ("fgsm-rs-cs", (2, 1), (1, 0)),  # the clean images have no gradient in the first epoch
        ("free", (0, 0), (2, 2)),
    ],
)
def test_macs_follow_from_the_passes(objective, attack, update):
    """Per image: forward and backward passes of the attack; updates, and how many of them reach the image."""
    model = network()
    (record,) = training.train(model, batches(), replace(QUICK, objective=objective, epochs=1, replays=2))
    work = nn.count_macs(model, (32, 1, 6, 6)).per_image()
    whole = work.forward + work.grad_weight + work.grad_input - work.first_grad_input
    assert record.attack.macs == round(96 * attack[0]) * work.forward + 96 * attack[1] * work.grad_input
    assert record.update.macs == 96 * (update[0] * whole + update[1] * work.first_grad_input)


def test_macs_of_an_evaluation_follow_from_its_passes():
    model, config = network(), replace(QUICK, epochs=1, evaluation_steps=3)
    (record,) = training.train(model, batches(), config, validation=VALIDATION)
    clean = training.clean_accuracy(model, VALIDATION)
    robust = training.robust_accuracy(model, VALIDATION, eps=config.eps, steps=3)
    assert clean.forward == 40 and clean.backward == 0 and robust.backward > 0
    work = nn.count_macs(model, (32, 1, 6, 6)).per_image()
    assert record.evaluation.macs == (clean.forward + robust.forward) * work.forward + robust.backward * work.grad_input


def test_adversarial_weights_cost_the_gradients_of_an_update_once_more():
    costs = []
    for gamma in (0.0, 0.01):
        config = replace(QUICK, objective="trades", epochs=1, awp_gamma=gamma)
        (record,) = training.train(network(), batches(), config)
        costs.append((record.attack.macs, record.update.macs))
    assert costs[1] == (costs[0][0], 2 * costs[0][1])
