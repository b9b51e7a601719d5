"""What AutoAttack keeps of a run: its time, the clean logits that identify a function, settings within their ranges."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.attacked import batch, interrupted_at_its_first_state, make_model
from torch import nn

from sparse_adv.attacks import AutoAttack, autoattack, autoattack_run, autoattack_state
from sparse_adv.attacks.autoattack_state import State, first_logits
from sparse_adv.attacks.autoattack_versions import APGDSettings, FABSettings, Settings

CUSTOM = {"eps": 0.01, "version": "custom", "attacks_to_run": ["apgd-ce", "square"], "seed": 3, "verbose": False}


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock takes one second, and the attacks find nothing."""
    ticks = itertools.count()
    monkeypatch.setattr(autoattack_run, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    for name, member in list(autoattack.MEMBERS.items()):
        changed = replace(member, attack=lambda model, x, y, **_: x)
        monkeypatch.setitem(autoattack.MEMBERS, name, changed)


def test_the_seconds_are_those_of_all_batches_of_all_processes(clock, tmp_path):
    model, (images, _) = make_model().eval(), batch(size=10)
    labels, path = model(images).argmax(1), tmp_path / "state.safetensors"
    whole = AutoAttack(model, **CUSTOM)
    whole.run_standard_evaluation(images, labels, bs=4)
    assert whole.result.seconds == 6  # two attacks on three batches
    with interrupted_at_its_first_state():
        AutoAttack(model, **CUSTOM).run_standard_evaluation(images, labels, bs=4, state_path=path)
    continued = AutoAttack(model, **CUSTOM)
    continued.run_standard_evaluation(images, labels, bs=4, state_path=path)
    assert continued.result.seconds == 6


def test_a_run_may_be_continued_with_smaller_batches(tmp_path):
    model, (images, _) = make_model().eval(), batch(size=10)
    labels, path = model(images).argmax(1), tmp_path / "state.safetensors"
    with interrupted_at_its_first_state():
        AutoAttack(model, **CUSTOM).run_standard_evaluation(images, labels, bs=4, state_path=path)
    continued = AutoAttack(model, **CUSTOM)
    continued.run_standard_evaluation(images, labels, bs=2, state_path=path)
    assert list(continued.result.accuracy) == ["clean", "apgd-ce", "square"]


def test_writing_the_state_between_batches_takes_a_tenth_of_the_time(monkeypatch, tmp_path):
    clock, written = [0.0], []
    monkeypatch.setattr(autoattack_state, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def write_bytes(path, data):
        written.append(clock[0])
        clock[0] += 3  # seconds

    monkeypatch.setattr(autoattack_state, "write_bytes", write_bytes)
    state = State.initial("", 0, torch.zeros(12, 1, 2, 2), torch.zeros(12), torch.randn(12, 5))
    while clock[0] < 300:
        clock[0] += 1  # a batch
        state.write_if_due(tmp_path / "state")
    assert written[0] == 1 and len(written) == 10


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_logits_are_compared_relative_to_the_largest_one(scale, tmp_path):
    logits = scale * torch.randn(12, 5)
    images = torch.zeros(12, 1, 2, 2)
    none = torch.zeros(12, dtype=torch.bool)
    state = State("", 0, images, logits.argmax(1), ~none, none, first_logits(logits), {}, {})
    for same in (logits, logits * (1 + 1e-5), logits[:3]):
        state.check_logits(same, tmp_path)
    for other in (logits.roll(1, 1), logits * 1.01, 1 - logits):
        with pytest.raises(ValueError, match="is of another model, with other clean logits"):
            state.check_logits(other, tmp_path)


def test_logits_that_are_nan_are_compared_too(tmp_path):
    logits, none = torch.randn(12, 5), torch.zeros(12, dtype=torch.bool)
    logits[1], logits[2, 3] = torch.nan, torch.inf
    state = State("", 0, torch.zeros(12, 1, 2, 2), logits.argmax(1), ~none, none, first_logits(logits), {}, {})
    state.check_logits(logits.clone(), tmp_path)
    for other in (logits.nan_to_num(), logits.roll(1, 0), logits + 1):
        with pytest.raises(ValueError, match="is of another model, with other clean logits"):
            state.check_logits(other, tmp_path)


RANGES = [
    *[("apgd", "rho", value, 0 <= value <= 1) for value in (-0.01, 0.0, 1.0, 1.01)],
    *[("fab", "alpha_max", value, 0 <= value <= 1) for value in (-0.01, 0.0, 1.0, 1.01)],
    *[("fab", "beta", value, 0 < value < 1) for value in (0.0, 0.01, 0.99, 1.0)],
    *[("fab", "eta", value, value >= 1) for value in (0.99, 1.0, 3.0)],
    *[("square", "p_init", value, 0 < value <= 1) for value in (0.0, 0.01, 1.0, 1.01)],
    *[("square", "n_queries", value, value > 0) for value in (-1, 0, 1)],
    *[("apgd", name, value, value > 0) for name in ("n_restarts", "n_iter", "eot_iter") for value in (0, 1)],
    *[("apgd_targeted", "n_target_classes", value, value > 0) for value in (0, 1)],
]


@pytest.mark.parametrize(("group", "name", "value", "legal"), RANGES)
def test_settings_have_the_ranges_of_the_attacks_arguments(group, name, value, legal):
    settings = getattr(AutoAttack(nn.Flatten()), group)
    if legal:
        setattr(settings, name, value)
        assert getattr(settings, name) == value
    else:
        before = getattr(settings, name)
        with pytest.raises(ValueError, match=f"{name} must"):
            setattr(settings, name, value)
        assert getattr(settings, name) == before


def test_rand_expects_random_outputs_and_no_other_sign_of_masking(clock):
    model, (images, _) = make_model().eval(), batch(size=4)
    labels = model(images).argmax(1)
    for version, expected in (("rand", 1), ("standard", 2)):
        noisy = AutoAttack(lambda x: model(x + 1e-3 * torch.rand_like(x)).softmax(1), version=version, verbose=False)
        noisy.run_standard_evaluation(images, labels)
        signs = noisy.result.signs
        assert len(signs) == expected and any("are probabilities" in sign for sign in signs)
        assert any("between two calls" in sign for sign in signs) == (version == "standard")


def test_every_setting_reaches_its_attacks(monkeypatch):
    """Every setting has an unusual value, and each attack gets those of its own."""
    unusual = {"n_restarts": 7, "n_iter": 11, "eot_iter": 3, "rho": 0.5, "n_target_classes": 2, "alpha_max": 0.2}
    unusual |= {"eta": 1.5, "beta": 0.7, "n_queries": 13, "p_init": 0.4, "resc_schedule": True}
    ascent = {"steps": 11, "restarts": 7, "eot_iter": 3, "rho": 0.5}
    boundary = {"steps": 11, "alpha_max": 0.2, "eta": 1.5, "beta": 0.7}
    expected = {
        "apgd-ce": ascent,
        "apgd-dlr": ascent,
        "apgd-t": ascent | {"n_target_classes": 2},
        "fab": boundary | {"restarts": 7},
        "fab-t": boundary | {"n_target_classes": 2},
        "square": {"queries": 13, "restarts": 7, "p_init": 0.4, "resc_schedule": True},
    }
    names, given = {name for arguments in expected.values() for name in arguments}, {}
    for member, settings in list(autoattack.MEMBERS.items()):

        def attack(model, x, y, member=member, **arguments):
            given[member] = {name: value for name, value in arguments.items() if name in names}
            return x

        monkeypatch.setitem(autoattack.MEMBERS, member, replace(settings, attack=attack))
    model, (images, _) = make_model().eval(), batch(size=4)
    evaluator = AutoAttack(model, **CUSTOM | {"attacks_to_run": list(expected)})
    for group in (evaluator.apgd, evaluator.apgd_targeted, evaluator.fab, evaluator.square):
        for name in unusual.keys() & set(dir(group)):
            setattr(group, name, unusual[name])
    evaluator.run_standard_evaluation(images, model(images).argmax(1))
    assert given == expected


def test_versions_have_the_budgets_of_the_authors_implementation():
    standard = Settings()
    assert standard.apgd == APGDSettings(n_restarts=1, n_iter=100, eot_iter=1, rho=0.75)
    assert (standard.apgd_targeted.n_iter, standard.apgd_targeted.n_target_classes) == (100, 9)
    assert (standard.fab.n_iter, standard.fab.n_restarts, standard.fab.n_target_classes) == (100, 1, 9)
    assert (standard.fab.alpha_max, standard.fab.eta, standard.fab.beta) == (0.1, 1.05, 0.9)
    assert (standard.square.n_queries, standard.square.n_restarts, standard.square.p_init) == (5000, 1, 0.8)
    assert Settings.of("standard") == standard
    assert Settings.of("rand") == replace(standard, apgd=APGDSettings(eot_iter=20))
    more = replace(standard, apgd=APGDSettings(n_restarts=5), fab=FABSettings(n_restarts=5))
    assert Settings.of("plus") == Settings.of("custom") == more
