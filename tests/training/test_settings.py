"""Every setting of training changes what is trained or recorded; what is tested at the end are the right weights."""

import json
from dataclasses import fields, replace

import pytest
import torch
from helpers.small_runs import QUICK, TEST, VALIDATION, batches, equal_states, network

from sparse_adv import attacks, data, engine, json_files, runs, tickets, training
from sparse_adv.config import OBJECTIVES
from sparse_adv.training import TrainConfig, checkpoint, loop, overfitting, result

BASE = replace(QUICK, objective="pgd", epochs=2)
CHANGES = {
    "objective": ({}, "fgsm"),
    "schedule": ({}, "cosine"),
    "milestones": ({"schedule": "piecewise"}, (0.2,)),
    "warmup_epochs": ({}, 2.0),
    "warmup_start_lr": ({"warmup_epochs": 1.0}, 0.05),
    "awp_warmup_epochs": ({"objective": "pgd", "awp_gamma": 0.1}, 1.0),
    "norm": ({"eps": 0.2, "alpha": 0.1, "overfitting_monitor": False}, "l2"),
    "beta": ({"objective": "trades"}, 1.0),
    "replays": ({"objective": "free"}, 2),
    "precision": ({}, "bfloat16"),
    "max_grad_norm": ({}, 0.05),
    "overfitting_monitor": ({"objective": "fgsm"}, False),
}
"""Other settings that one needs to take effect, and another value; for other numbers see `change_of`."""
OF_RECORDS = ("evaluate_every", "evaluation_steps", "overfitting_monitor")
"""These do not change what is trained."""
OF_NO_RESULT = ("engine", "graphs")


def change_of(name):
    if name in CHANGES:
        return CHANGES[name]
    value = getattr(BASE, name)
    return {}, not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.5 * value + 0.02


def outcome(config, validation=VALIDATION):
    run = training.Training(network(), batches(), config, validation=validation)
    records = [json_files.to_json(record) for record in run.epochs()]
    times = ("attack", "update", "evaluation", "total")
    for record in records:
        for phase in times:
            record[phase].pop("seconds")
    return run.evaluated.state_dict(), json.dumps(records)


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig) if field.name not in OF_NO_RESULT])
def test_every_setting_changes_what_it_is_for(name):
    others, value = change_of(name)
    config = replace(BASE, **others)
    weights, records = outcome(config)
    other_weights, other_records = outcome(replace(config, **{name: value}))
    assert equal_states(weights, other_weights) == (name in OF_RECORDS)
    assert records != other_records or name not in OF_RECORDS


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_settings_without_effect_are_those_that_an_objective_does_not_use(objective):
    epochs = 8 if objective == "fgsm-rs-cs" else 2  # its second term needs an epoch before which the loss fell steadily
    config = replace(BASE, objective=objective, epochs=epochs, lr=0.01, overfitting_monitor=False, schedule="piecewise")
    weights, _ = outcome(config, None)
    for name, value in (("alpha", 0.01), ("steps", 1), ("beta", 0.5), ("replays", 2), ("milestones", (0.2,))):
        other_weights, _ = outcome(replace(config, **{name: value}), None)
        assert equal_states(weights, other_weights) == (name in config.without_effect()), name
    assert "steps" in replace(config, objective="fgsm").without_effect()
    assert "steps" not in replace(config, objective="fgsm", overfitting_monitor=True).without_effect()
    assert {"milestones", "warmup_start_lr"} <= set(BASE.without_effect())
    assert "warmup_start_lr" not in replace(BASE, warmup_epochs=1.0).without_effect()
    assert "awp_warmup_epochs" in TrainConfig("pgd").without_effect()
    assert "awp_warmup_epochs" not in TrainConfig("pgd", awp_gamma=0.01).without_effect()


@pytest.mark.parametrize("wanted", [True, False])
def test_the_engine_is_used_if_it_is_wanted(wanted, monkeypatch):
    fused, asked = [], []
    fuse, gradients = engine.fuse_for_training, attacks.gradients.input_gradients

    def fuse_for_training(*args, **kwargs):
        fused.append(True)
        return fuse(*args, **kwargs)

    def input_gradients(*args, **kwargs):
        asked.append(kwargs.get("use_engine", args[-1]))
        return gradients(*args, **kwargs)

    monkeypatch.setattr(engine, "fuse_for_training", fuse_for_training)
    monkeypatch.setattr(attacks.gradients, "input_gradients", input_gradients)
    training.train(network(), batches(), replace(BASE, engine=wanted), validation=VALIDATION)
    assert bool(fused) == wanted and set(asked) == {wanted}


@pytest.mark.parametrize("best", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_final_test_is_of_the_best_weights_with_the_settings_of_the_run(tmp_path, best, norm, monkeypatch):
    config = replace(BASE, norm=norm, eps=0.4, seed=3)
    model = network()
    records = training.train(model, batches(), config, validation=VALIDATION if best else None, folder=tmp_path)
    weights = network(seed=9).state_dict()
    if best:
        records[0] = replace(records[0], clean_accuracy=1.0, robust_accuracy=1.0)
        checkpoint.write_weights(tmp_path / runs.BEST, weights, json_files.to_json(records[0]))
    expected = weights if best else checkpoint.read_weights(tmp_path / runs.LAST)[0]
    seen = {}

    def measure(name, fraction):
        def accuracy(model, images, **settings):
            assert equal_states(model.state_dict(), expected) and images is TEST
            seen[name] = settings
            return training.Accuracy(fraction, 8, 8, 8)

        return accuracy

    for name, fraction in (("clean_accuracy", 0.75), ("fgsm_accuracy", 0.5), ("robust_accuracy", 0.25)):
        monkeypatch.setattr(result, name, measure(name, fraction))
    tested = training.final_test(model, tmp_path, records, config, TEST)
    assert seen == {
        "clean_accuracy": {},
        "fgsm_accuracy": {"eps": 0.4, "norm": norm, "engine": config.engine},
        "robust_accuracy": {"eps": 0.4, "norm": norm, "steps": 20, "seed": 3, "engine": config.engine},
    }
    assert tested.test == {"clean": 0.75, "fgsm": 0.5, "pgd-20": 0.25}
    assert (tested.tested, tested.tested_epoch) == (("best", 1) if best else ("last", 2))
    assert tested.validation_robust_accuracy == (1.0 if best else None)
    assert tested.total == records[-1].total and runs.read(tmp_path).result == tested


def test_a_final_test_of_other_weights_than_those_of_the_best_epoch_is_refused(tmp_path):
    model = network()
    records = training.train(model, batches(), BASE, validation=VALIDATION, folder=tmp_path)
    best, path = runs.best(records, BASE).epoch, tmp_path / runs.BEST
    other = next(record for record in records if record.epoch != best)
    checkpoint.write_weights(path, model.state_dict(), json_files.to_json(other))
    with pytest.raises(ValueError, match=rf"best\.safetensors' .* epoch {best} .*, got .* epoch {other.epoch}$"):
        training.final_test(model, tmp_path, records, BASE, TEST)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file of weights '.*best\.safetensors'"):
        training.final_test(model, tmp_path, records, BASE, TEST)
    assert not (tmp_path / runs.RESULT).exists()


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_settings_of_a_run_reach_its_evaluations_and_its_monitor(engine, norm, monkeypatch):
    own = {"eps": 0.4, "norm": norm, "seed": 3, "engine": engine}
    seen = {}
    for module in (loop, overfitting):

        def measure(model, images, module=module, **settings):
            seen[module] = settings
            return training.Accuracy(0.5, 40, 40, 40)

        monkeypatch.setattr(module, "robust_accuracy", measure)
    config = replace(BASE, objective="n-fgsm", epochs=1, evaluation_steps=7, **own)
    run = training.Training(network(), batches(), config, validation=VALIDATION)
    list(run.epochs())
    assert seen[loop] == {**own, "steps": 7, "graphs": run.graphs, "every_image": False}
    assert seen[overfitting] == {**own, "steps": 5, "graphs": run.graphs}


def test_settings_of_an_evaluation_reach_its_attack(monkeypatch):
    seen = []

    def pgd(model, x, y, **settings):
        seen.append(settings | {"noise": settings["generator"].initial_seed()})
        return x

    monkeypatch.setattr(attacks, "pgd", pgd)
    settings = {"eps": 0.3, "alpha": 0.2, "steps": 3, "norm": "l2", "loss": "margin", "early_stop": True}
    for seed in (1, 2):
        training.robust_accuracy(network(), TEST, **settings, restarts=2, seed=seed, engine=False)
    assert len(seen) == 4 and all({name: each[name] for name in settings} == settings for each in seen)
    assert seen[0]["engine"] is False and seen[0]["noise"] == seen[1]["noise"] != seen[2]["noise"]
    training.robust_accuracy(network(), TEST, eps=0.2)
    assert (seen[-1]["alpha"], seen[-1]["steps"], seen[-1]["norm"]) == (0.05, 10, "linf")


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: tickets.shuffle({"fc": torch.eye(16, dtype=torch.bool)}, seed)["fc"],
        lambda seed: next(iter(data.Batches(TEST, 40, seed=seed)))[1],
        lambda seed: attacks.pgd(
            network(),
            *next(iter(batches())),
            eps=0.1,
            alpha=0.0,
            steps=1,
            generator=torch.Generator().manual_seed(seed),
        ),
    ],
    ids=["shuffled masks", "order", "random start"],
)
def test_two_seeds_differ_and_one_repeats(draw):
    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))


def test_the_seed_chooses_the_validation_images():
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    splits = [data.load("digits", validation=100, seed=seed) for seed in (1, 1, 2)]
    held_out = [split.validation.images for split in splits]
    assert held_out[0].equal(held_out[1]) and not held_out[0].equal(held_out[2])
    assert all(split.test.images.equal(splits[0].test.images) for split in splits)


def test_no_part_of_the_final_test_asks_for_the_engine_when_it_is_off(tmp_path, monkeypatch):
    model, config = network(), replace(BASE, objective="natural", epochs=1, engine=False)
    records = training.train(model, batches(), config, folder=tmp_path)
    monkeypatch.setattr(engine.dispatch, "_entry_of", lambda *_: pytest.fail("the engine was asked"))
    assert set(training.final_test(model, str(tmp_path), records, config, TEST).test) == {"clean", "fgsm", "pgd-20"}
