"""Training: what a run records, that it learns, that it repeats, and what it refuses."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from small_runs import QUICK, TEST, TRAIN, VALIDATION, batches, equal_states, network
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import attacks, data, nn, training
from sparse_adv.training import Recipe


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_every_objective_learns_an_easy_task(objective):
    recipe = replace(QUICK, objective=objective, replays=2)
    records = training.train(network(), batches(), recipe, validation=VALIDATION)
    assert records[-1]["clean_accuracy"] > 0.9
    assert records[-1]["loss"] < records[0]["loss"]


def test_records_count_epochs_updates_and_costs():
    seen = []
    records = training.train(
        network(), batches(), replace(QUICK, objective="pgd"), on_epoch=seen.append, before=(10.0, 1000)
    )
    assert seen == records
    assert [(record["epoch"], record["step"], record["images"]) for record in records] == [
        (1, 3, 96),
        (2, 6, 96),
        (3, 9, 96),
    ]
    for unit, before in (("seconds", 10.0), ("multiply_adds", 1000)):
        spent = sum(record[f"{phase}_{unit}"] for record in records for phase in ("attack", "update"))
        assert math.isclose(records[-1][unit], before + spent) and records[0][f"attack_{unit}"] > 0


@pytest.mark.parametrize(
    ("objective", "attack", "update"),
    [
        ("natural", (0, 0), (1, 0)),
        ("fgsm-rs", (1, 1), (1, 0)),
        ("pgd", (2, 2), (1, 0)),
        ("trades", (3, 2), (2, 0)),
        ("free", (0, 0), (2, 2)),
    ],
)
def test_executed_multiply_adds_follow_from_the_passes(objective, attack, update):
    """For each image: forward and backward passes of the attack; updates, and how many go on to the image."""
    model = network()
    (record,) = training.train(model, batches(), replace(QUICK, objective=objective, epochs=1, replays=2))
    work = nn.multiply_adds(model, (32, 1, 6, 6)).per_image()
    whole = work.forward + work.grad_weight + work.grad_input - work.first_grad_input
    assert record["attack_multiply_adds"] == 96 * (attack[0] * work.forward + attack[1] * work.grad_input)
    assert record["update_multiply_adds"] == 96 * (update[0] * whole + update[1] * work.first_grad_input)


def test_evaluations_come_when_asked_and_always_at_the_end():
    recipe = replace(QUICK, epochs=5, evaluate_every=2)
    records = training.train(network(), batches(), recipe, validation=VALIDATION)
    assert [record["epoch"] for record in records if "robust_accuracy" in record] == [2, 4, 5]


@pytest.mark.parametrize("objective", ["n-fgsm", "free", "trades"])
def test_a_run_repeats_bit_for_bit_and_leaves_the_global_generator_alone(objective):
    recipe = replace(QUICK, objective=objective, epochs=2, ema=0.9)
    models = [network(), network()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for model in models:
        training.train(model, batches(), recipe, validation=VALIDATION)
        assert torch.get_rng_state().equal(before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert equal_states(models[0].state_dict(), models[1].state_dict())


def test_seeds_change_the_attack_and_the_order():
    weights = []
    for seed, order in ((0, 0), (1, 0), (0, 1)):
        model = network()
        recipe = replace(QUICK, objective="fgsm-rs", seed=seed, epochs=1)
        training.train(model, batches(seed=order), recipe)
        weights.append(model[0].weight.detach())
    assert not weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_any_iterable_with_a_length_will_do():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    runs = []
    for given in (DataLoader(images, 32), list(DataLoader(images, 32)), batches(shuffle=False)):
        model = network()
        training.train(model, given, QUICK)
        runs.append(model.state_dict())
    assert equal_states(runs[0], runs[1]) and equal_states(runs[0], runs[2])


def test_a_dataloader_shuffles_alike_in_every_run():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    runs = []
    for _ in range(2):
        model = network()
        training.train(model, DataLoader(images, 32, shuffle=True), QUICK)
        runs.append(model.state_dict())
    assert equal_states(*runs)


def test_batches_without_a_length_are_refused():
    with pytest.raises(TypeError, match=r"batches must have a length.*got generator"):
        training.train(network(), (batch for batch in batches()), QUICK)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        training.train(network(), [], QUICK)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.full((4, 1, 6, 6), 2.0), torch.zeros(4, dtype=torch.int64), r"x must lie in \[0, 1\]"),
        (torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64), "x must be finite"),
        (torch.zeros(4, 1, 6, 6), torch.zeros(3, dtype=torch.int64), "one label per image"),
    ],
)
@pytest.mark.parametrize("objective", ["natural", "fgsm", "free"])
def test_wrong_batches_are_named(images, labels, said, objective):
    with pytest.raises(ValueError, match=said):
        training.train(network(), [(images, labels)], replace(QUICK, objective=objective))


def test_a_clipped_gradient_moves_the_weights_no_further():
    moved = []
    for clip in (0.0, 1e-3):
        model = network()
        start = copy.deepcopy(model.state_dict())
        training.train(model, batches(96), replace(QUICK, epochs=1, clip=clip, momentum=0.0, weight_decay=0.0))
        step = [model.state_dict()[name] - start[name] for name, _ in model.named_parameters()]
        moved.append(torch.cat([part.flatten() for part in step]).norm().item())
    assert moved[1] == pytest.approx(0.1 * 1e-3, rel=1e-3) and moved[0] > 10 * moved[1]


def test_averaged_weights_are_the_mean_that_the_decay_says():
    model, steps = network(), []
    recipe = replace(QUICK, epochs=1, ema=0.5)
    run = training.Training(model, batches(), recipe, on_step=lambda _: steps.append(model[0].weight.detach().clone()))
    list(run.epochs())
    assert torch.allclose(run.evaluated[0].weight, 0.25 * steps[0] + 0.25 * steps[1] + 0.5 * steps[2], atol=1e-6)
    assert run.evaluated is not model


def test_bfloat16_trains_with_weights_of_float32():
    model = network()
    records = training.train(model, batches(), replace(QUICK, precision="bfloat16", objective="pgd"), validation=TEST)
    assert records[-1]["clean_accuracy"] > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_evaluation_changes_neither_mode_nor_weights():
    model = network().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    training.robust_accuracy(model, VALIDATION, steps=2)
    assert model.training and model[0].training and not model[1].training
    assert equal_states(before, model.state_dict())


def test_accuracies_are_those_of_the_images_and_of_the_attacked_images():
    model = network()
    training.train(model, batches(), QUICK)
    images, labels = data.to_unit(VALIDATION.images), VALIDATION.labels
    right = model(images).argmax(1) == labels
    assert training.clean_accuracy(model, VALIDATION, batch_size=7) == right.float().mean().item()
    fgsm = attacks.fgsm(model, images, labels, 0.2)
    expected = (right & (model(fgsm).argmax(1) == labels)).float().mean().item()
    assert training.fgsm_accuracy(model, VALIDATION, eps=0.2) == pytest.approx(expected)


def test_restarts_only_lower_the_accuracy_and_count_their_passes():
    model = network()
    training.train(model, batches(), replace(QUICK, epochs=1))
    attack = {"eps": 0.12, "alpha": 0.04, "steps": 3, "seed": 9}
    one, five = (training.robust_accuracy(model, VALIDATION, **attack, restarts=n) for n in (1, 5))
    assert 0 < five <= one < 1
    assert one.images == 40 and one.backward <= 3 * 40 and five.backward > one.backward


def test_the_learning_rate_follows_its_schedule():
    recipe = Recipe(epochs=8, lr=1.0, warmup_epochs=4)
    epochs = [recipe.learning_rate(epoch, 1) for epoch in range(8)]
    assert epochs == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.01, 0.01])
    climb = [replace(recipe, warmup_from=0.5).learning_rate(step, 2) for step in range(8)]
    assert climb == pytest.approx([0.5 + 0.0625 * (step + 1) for step in range(8)])
    cosine = [replace(recipe, warmup_epochs=0, schedule="cosine").learning_rate(step, 1) for step in (0, 4)]
    assert cosine == pytest.approx([1.0, 0.5])
    cyclic = [replace(recipe, warmup_epochs=0, schedule="cyclic").learning_rate(step, 1) for step in range(8)]
    assert max(cyclic) < 1 and min(cyclic) > 0 and cyclic == pytest.approx(cyclic[::-1])
    constant = {replace(recipe, warmup_epochs=0, schedule="constant").learning_rate(step, 3) for step in range(24)}
    assert constant == {1.0}


def test_a_drop_inside_the_warm_up_is_not_lost():
    recipe = Recipe(epochs=4, lr=1.0, warmup_epochs=3, drops=(0.25,))
    assert recipe.learning_rate(1, 1) == pytest.approx(2 / 3 * 0.1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("objective", "fgms"),
        ("schedule", "linear"),
        ("epochs", 0),
        ("steps", 0),
        ("replays", 1.5),
        ("eps", -0.1),
        ("lr", math.nan),
        ("ema", 1.0),
        ("precision", "int8"),
        ("drops", (0.5, 2)),
    ],
)
def test_an_impossible_recipe_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{str(value)[-3:].strip('()')}"):
        Recipe(**{field: value})


@pytest.mark.parametrize("objective", ["n-fgsm", "free", "trades"])
def test_objectives_of_one_norm_refuse_the_other(objective):
    with pytest.raises(ValueError, match="linf"):
        Recipe(objective=objective, norm="l2")


def test_a_diverged_run_stops_with_a_sentence():
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        training.train(network(), batches(), replace(QUICK, lr=1e30))


def test_no_accuracy_of_no_images():
    with pytest.raises(ValueError, match="images must hold"):
        training.clean_accuracy(network(), data.Split(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64)))
