"""Training: what a run records, that it learns, that it repeats, and what it refuses."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_adv import attacks, data, models, tickets, training
from sparse_adv.data import Dataset, Split
from sparse_adv.training import Recipe

QUICK = Recipe(objective="natural", epochs=3, batch_size=32, lr=0.1, eps=0.05, alpha=0.02, steps=2)


def bars(count: int, seed: int) -> Split:
    """Noisy 6 x 6 images with a bright column (class 0) or a bright row (class 1)."""
    noise = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(count, 1, 6, 6, generator=noise)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, 2] += 0.5
    images[labels == 1, :, 2, :] += 0.5
    return Split(images, labels)


DATASET = Dataset(bars(96, 0), bars(40, 1), bars(40, 2))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)
        )


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_every_objective_learns_an_easy_task(objective):
    records = training.train(network(), DATASET, replace(QUICK, objective=objective))
    assert records[-1]["clean_accuracy"] > 0.9
    assert records[-1]["loss"] < records[0]["loss"]


def test_records_count_epochs_and_seconds():
    seen = []
    records = training.train(network(), DATASET, replace(QUICK, objective="fgsm"), seen.append)
    assert seen == records
    assert [record["epoch"] for record in records] == [1, 2, 3]
    spent = sum(record["attack_seconds"] + record["update_seconds"] for record in records)
    assert math.isclose(records[-1]["seconds"], spent)
    assert all(record["attack_seconds"] > 0 and record["evaluation_seconds"] > 0 for record in records)


def test_evaluations_come_when_asked_and_always_at_the_end():
    records = training.train(network(), DATASET, replace(QUICK, epochs=5, evaluate_every=2))
    assert [record["epoch"] for record in records if "robust_accuracy" in record] == [2, 4, 5]


def test_a_run_repeats_bit_for_bit():
    recipe = replace(QUICK, objective="pgd", epochs=2)
    first, second = network(), network()
    losses = [[r["loss"] for r in training.train(model, DATASET, recipe)] for model in (first, second)]
    assert losses[0] == losses[1]
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_the_seed_changes_the_order_of_the_images():
    first, second = network(), network()
    training.train(first, DATASET, QUICK)
    training.train(second, DATASET, replace(QUICK, seed=1))
    assert not torch.equal(first[0].weight, second[0].weight)


def test_the_test_images_are_never_touched():
    forbidden = Split(torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64))
    records = training.train(network(), DATASET._replace(test=forbidden), QUICK)
    assert math.isfinite(records[-1]["loss"])


def test_the_learning_rate_warms_up_and_drops():
    recipe = Recipe(epochs=8, lr=1.0, warmup_epochs=4)
    rates = [recipe.learning_rate(epoch) for epoch in range(8)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert {replace(recipe, warmup_epochs=0, drops=()).learning_rate(epoch) for epoch in range(8)} == {1.0}


def test_evaluation_changes_neither_mode_nor_weights():
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    training.evaluate(model, DATASET.validation, QUICK)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_accuracies_are_those_of_the_images_and_of_the_attacked_images():
    model = network()
    training.train(model, DATASET, QUICK)
    images, labels = DATASET.validation
    model.eval()
    assert training.clean_accuracy(model, DATASET.validation, batch_size=7) == (
        (model(images).argmax(1) == labels).float().mean().item()
    )
    adv = attacks.pgd(model, images, labels, 0.3, 0.1, 5, generator=torch.Generator().manual_seed(9))
    robust = training.robust_accuracy(model, DATASET.validation, eps=0.3, alpha=0.1, steps=5, seed=9)
    assert robust == pytest.approx((model(adv).argmax(1) == labels).float().mean().item())
    assert robust < 0.9


def test_a_diverged_run_stops_with_a_sentence():
    with pytest.raises(FloatingPointError, match="diverged"):
        training.train(network(), DATASET, replace(QUICK, lr=1e30))


@pytest.mark.parametrize(
    ("field", "value"),
    [("objective", "fgms"), ("epochs", 0), ("batch_size", -1), ("steps", 0), ("eps", -0.1), ("lr", math.nan)],
)
def test_an_impossible_recipe_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        Recipe(**{field: value})


def test_no_accuracy_of_no_images():
    with pytest.raises(ValueError, match="images must hold"):
        training.clean_accuracy(network(), Split(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64)))


def test_a_search_refuses_a_wrong_rule_before_it_trains():
    epochs = []
    with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\], got 2"):
        tickets.search(
            models.build("digits_cnn", 0), data.digits(), Recipe(epochs=1), density=2, on_epoch=epochs.append
        )
    assert not epochs
