"""Configurations: the learning rate schedules follow their formulas; values out of range are refused by name."""

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from sparse_adv.config import OBJECTIVES, DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig


def rates(config: TrainConfig, steps: range, steps_per_epoch: int = 1) -> list[float]:
    return [config.learning_rate(step, steps_per_epoch) for step in steps]


def test_the_learning_rate_follows_its_schedule():
    config = TrainConfig(epochs=8, lr=1.0)
    assert rates(config, range(8)) == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01])
    assert rates(replace(config, schedule="cosine"), range(0, 8, 4)) == pytest.approx([1.0, 0.5])
    cyclic = rates(replace(config, schedule="cyclic"), range(8))
    assert max(cyclic) < 1 and min(cyclic) > 0 and cyclic == pytest.approx(cyclic[::-1])
    assert set(rates(replace(config, schedule="constant"), range(24), 3)) == {1.0}


def test_the_warm_up_is_linear_and_keeps_milestones():
    config = TrainConfig(epochs=8, lr=1.0, warmup_epochs=4)
    assert rates(config, range(8)) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.01, 0.01])
    start = rates(replace(config, warmup_start_lr=0.5), range(8), 2)
    assert start == pytest.approx([0.5 + 0.0625 * (step + 1) for step in range(8)])
    early = TrainConfig(epochs=4, lr=1.0, warmup_epochs=3, milestones=(0.25,))
    assert early.learning_rate(1, 1) == pytest.approx(2 / 3 * 0.1)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (TrainConfig, "objective", "fgms"),
        (TrainConfig, "schedule", "linear"),
        (TrainConfig, "norm", "l1"),
        (TrainConfig, "precision", "int8"),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "epochs", True),
        (TrainConfig, "seed", 1 << 63),
        (TrainConfig, "eps", 8),
        (TrainConfig, "weight_decay", 1e39),
        (TrainConfig, "steps", 0),
        (TrainConfig, "replays", 1.5),
        (TrainConfig, "seed", -1),
        (TrainConfig, "eps", -0.1),
        (TrainConfig, "lr", math.nan),
        (TrainConfig, "lr", "0.1"),
        (TrainConfig, "alpha", math.inf),
        (TrainConfig, "ema_decay", 1.0),
        (TrainConfig, "label_smoothing", 1.0),
        (TrainConfig, "awp_gamma", -0.1),
        (TrainConfig, "awp_warmup_epochs", -1),
        (TrainConfig, "beta", math.nan),
        (TrainConfig, "milestones", (0.5, 2)),
        (TrainConfig, "momentum", 1),
        (TrainConfig, "alpha", 2),
        (DataConfig, "validation", 0),
        (DataConfig, "validation", 1.5),
        (PruneConfig, "density", 0),
        (PruneConfig, "density", 2),
        (MethodConfig, "density", 0.0),
        (PruneConfig, "rounds", 0),
        (PruneConfig, "rewind_step", -1),
        (PruneConfig, "early_stop_distance", 1.5),
        (DataConfig, "limit", 0),
        (DataConfig, "batch_size", 0),
        (DataConfig, "validation", -0.1),
        (DataConfig, "share", 0),
        (DataConfig, "share", 1.5),
        (NetworkConfig, "width", 0),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_field(config, field, value):
    required = {"arch": "vgg16"} if config is NetworkConfig else {}
    with pytest.raises(ValueError) as refusal:
        config(**required, **{field: value})
    assert str(refusal.value).startswith(f"{field} must be ") and str(refusal.value).endswith(f", got {value!r}")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 100, 383])
def test_one_cycle_is_that_of_pytorch(steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps)
    config, expected, momenta = TrainConfig(schedule="onecycle", lr=0.3, epochs=steps), [], []
    for step in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step + 1 < steps:
            schedule.step()
    assert rates(config, range(steps)) == pytest.approx(expected, rel=1e-12)
    config = replace(config, epochs=1)
    assert rates(config, range(steps), steps) == pytest.approx(expected, rel=1e-12)
    assert [config.momentum_of(step, steps) for step in range(steps)] == pytest.approx(momenta, rel=1e-12)
    assert TrainConfig(momentum=0.7).momentum_of(5, 10) == 0.7


@pytest.mark.parametrize("momentum", [0, 0.95])
def test_one_cycle_needs_a_momentum_that_it_can_move(momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0.05, 0.95\) for schedule 'onecycle', got "):
        TrainConfig(schedule="onecycle", momentum=momentum)


def test_natural_training_has_no_attack_to_perturb_weights_with():
    with pytest.raises(ValueError, match=r"awp_gamma must be 0 for objective 'natural', .*, got 0.01"):
        TrainConfig("natural", awp_gamma=0.01)


def test_weights_are_perturbed_in_some_epoch():
    with pytest.raises(ValueError, match=r"awp_warmup_epochs must be less than the 3 epochs, .*, got 3"):
        TrainConfig(epochs=3, awp_gamma=0.01, awp_warmup_epochs=3)
    assert TrainConfig(epochs=3, awp_warmup_epochs=3).awp_gamma == 0


def test_beta_and_alpha_have_defaults_of_their_objective():
    assert TrainConfig("trades").second_weight == 6 and TrainConfig("mart").second_weight == 5
    assert TrainConfig("fgsm-uap").second_weight == 10 and TrainConfig("nu-at").second_weight == 4
    assert TrainConfig("fgsm-rs-cs").second_weight == 1
    assert TrainConfig("trades", beta=0).second_weight == 0
    steps = {name: round(255 * TrainConfig(name).step_size, 6) for name in OBJECTIVES}  # eps is 8 / 255
    assert steps == dict.fromkeys(OBJECTIVES, 8) | {"fgsm-rs": 10, "pgd": 2, "trades": 2, "mart": 2}


@pytest.mark.parametrize("distance", [0, 1])
def test_the_bounds_of_a_fraction_are_allowed(distance):
    assert PruneConfig(early_stop_distance=distance).early_stop_distance == distance


def test_the_least_number_of_images_is_allowed():
    assert DataConfig(limit=1).limit == DataConfig(batch_size=1).batch_size == 1


@pytest.mark.parametrize("kind", [TrainConfig, PruneConfig, DataConfig, MethodConfig])
def test_a_configuration_cannot_be_changed(kind):
    config = kind()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    assert config == kind()


@pytest.mark.parametrize("config", [TrainConfig(milestones=(0.1, 0.9)), PruneConfig(block=(4, 1)), DataConfig(limit=9)])
def test_a_configuration_survives_json(config):
    assert type(config)(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_a_score_function_is_written_by_its_name():
    def taylor(name, weight):
        return weight.abs()

    assert PruneConfig(score=taylor).named() == PruneConfig(score="taylor")


@pytest.mark.parametrize(
    ("method", "scope", "drop_fraction", "change_until", "growth", "adapt_from"),
    [
        ("static", "erk", 0.3, 1.0, "gradient", None),
        ("set", "erk", 0.3, 1.0, "random", None),
        ("rigl", "erk", 0.3, 0.75, "gradient", None),
        ("flying-bird", "igq", 0.5, 1.0, "gradient", None),
        ("flying-bird-plus", "igq", 0.5, 1.0, "gradient", 0.5),
        ("gmp", "uniform", 0.3, 0.75, "gradient", None),
    ],
)
def test_a_method_has_the_defaults_of_its_paper_and_only_where_nothing_else_is_asked_for(
    method, scope, drop_fraction, change_until, growth, adapt_from
):
    defaults = {"scope": scope, "drop_fraction": drop_fraction, "change_until": change_until, "growth": growth}
    config = MethodConfig(method, density=0.3, interval=7)
    assert config.resolved() == replace(config, **defaults, adapt_from=adapt_from)
    other = "random" if growth == "gradient" else "gradient"
    asked = {"scope": "global", "drop_fraction": 0.0, "change_until": 0.0, "growth": other}
    given = replace(config, **asked)
    assert given.resolved() == replace(given, adapt_from=adapt_from)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (DataConfig, "augment"),
        (TrainConfig, "overfitting_monitor"),
        (TrainConfig, "engine"),
        (TrainConfig, "graphs"),
        (PruneConfig, "linear"),
    ],
)
def test_a_text_is_neither_true_nor_false(config, name):
    for value in ("no", 0, None if config is not DataConfig else "null"):
        with pytest.raises(ValueError, match=f"{name} must be true or false, got {value!r}"):
            config(**{name: value})
    assert getattr(config(**{name: np.bool_(True)}), name) is True


def test_a_radius_above_one_is_for_l2_alone():
    assert TrainConfig(norm="l2", eps=2.0).eps == 2.0
    assert TrainConfig(norm="linf", eps=1.0).eps == 1.0
    with pytest.raises(ValueError, match=r"eps must be at most 1 for norm .linf., .* got 1.5"):
        TrainConfig(norm="linf", eps=1.5)


@pytest.mark.parametrize(("name", "norm"), [("Linf", "linf"), ("L2", "l2"), ("l2", "l2")])
def test_a_norm_has_both_spellings(name, norm):
    assert TrainConfig(norm=name) == TrainConfig(norm=norm) and TrainConfig(norm=name).norm == norm


def test_a_warm_up_ends_within_the_run():
    assert TrainConfig(epochs=2, warmup_epochs=2).warmup_epochs == 2
    with pytest.raises(ValueError, match="warmup_epochs must be at most the 1 epochs, got 99"):
        TrainConfig(epochs=1, warmup_epochs=99)
