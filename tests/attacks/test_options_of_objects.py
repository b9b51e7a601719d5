"""Options of attack objects: each may be set between two calls, and nothing else."""

import copy
import functools
import inspect
import pickle
from dataclasses import fields
from functools import partial

import pytest
import torch
from helpers.attacked import batch, make_model

from sparse_adv import attacks
from sparse_adv.attacks import APGD, FGSM, MIFGSM, PGD, AttackOptions, AutoAttack, MultiAttack

SMALL = {"eps": 0.1, "steps": 3}
HOST = ("APGD", "APGDT", "CW", "DeepFool", "EOTPGD", "FAB", "FABT", "FMN", "GN", "MIFGSM", "RFGSM", "Square")


@pytest.mark.parametrize(
    "option",
    [
        {"lo": 0.4},
        {"hi": 0.5},
        {"norm": "l2"},
        {"loss": "margin"},
        {"bn_mode": "batch"},
        {"early_stop": True},
        {"targeted": True},
        {"alpha": 0.01},
        {"steps": 1},
        {"eps": 0.01},
    ],
    ids=str,
)
def test_an_option_of_pgd_that_is_set_is_the_same_as_one_that_is_given(option):
    model, (images, labels) = make_model(), batch()
    images = images.clamp(0.4, 0.5)
    attack = PGD(model, random_start=False, **SMALL)
    before = attack(images, labels)
    for name, value in option.items():
        setattr(attack, name, value)
    expected = PGD(model, random_start=False, **SMALL | option)
    assert attack(images, labels).equal(expected(images, labels)) and repr(attack) == repr(expected)
    assert not attack(images, labels).equal(before)


def test_every_option_of_attack_options_is_one_of_pgd():
    attack = PGD(make_model())
    for field in fields(AttackOptions):
        if field.name not in ("start_eps", "project"):
            assert getattr(attack, field.name) == field.default
            setattr(attack, field.name, field.default)


@pytest.mark.parametrize(
    ("name", "value"), [("bn_mode", "nonsense"), ("engine", 2), ("generator", "x"), ("hi", -1.0), ("check", None)]
)
def test_a_wrong_value_is_refused_when_it_is_set(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(PGD(make_model()), name, value)


@pytest.mark.parametrize(
    ("name", "setting", "least"),
    [
        *((name, "n_restarts", 1) for name in ("APGD", "APGDT", "FAB", "FABT", "Square")),
        *((name, "n_classes", 2) for name in ("APGDT", "FAB", "FABT")),
        ("Square", "n_queries", 1),
    ],
)
def test_a_number_that_the_function_calls_otherwise_is_refused_by_its_own_name(name, setting, least):
    kind, model = getattr(attacks, name), make_model()
    attack = kind(model, **{setting: least})
    for wrong in (least - 1, 2.5):
        for give in (partial(kind, model, **{setting: wrong}), partial(setattr, attack, setting, wrong)):
            with pytest.raises(ValueError, match=f"^{setting} must be an integer of at least {least}, got {wrong}"):
                give()
    assert getattr(attack, setting) == least and f"{setting}={least}" in repr(attack)


@pytest.mark.parametrize("name", HOST)
def test_the_range_of_pixels_may_be_set_between_two_calls(name):
    torch.manual_seed(0)
    model, (images, labels) = make_model(), batch()
    attack = getattr(attacks, name)(model)
    attack.lo, attack.hi, attack.check, attack.engine = 0.4, 0.5, False, False
    adv = attack(images.clamp(0.4, 0.5), labels)
    assert adv.min() >= 0.4 and adv.max() <= 0.5
    assert "lo=0.4" in repr(attack) and "hi=0.5" in repr(attack)
    with pytest.raises(TypeError, match=f"{name}.* got an unexpected keyword argument 'step'"):
        getattr(attacks, name)(model, step=3)


@pytest.mark.parametrize("name", [name for name in HOST if name not in ("FABT", "GN")])
def test_each_setting_of_an_object_reaches_its_function(name, monkeypatch):
    kind = getattr(attacks, name)
    attack, reached = kind(make_model()), {}
    function = attack._function

    @functools.wraps(function)
    def record(model, images, labels, **settings):
        reached.update(settings)
        return images

    monkeypatch.setattr(kind, "_function", staticmethod(record))
    without = {"model", "options", "verbose", "multi_targeted"} | ({"n_classes"} if name == "FAB" else set())
    own = set(inspect.signature(kind).parameters) - without
    for setting in own - {"targeted", "seed"}:
        vars(attack)[setting] = 1234
    attack(*batch())
    names = {"n_restarts": "restarts", "n_queries": "queries", "n_classes": "n_target_classes", "seed": "generator"}
    for setting in own:
        value = reached.pop(names.get(setting, setting))
        if setting not in ("targeted", "seed"):
            assert value == (1233 if setting == "n_classes" else 1234)
    assert set(reached) - {"targeted"} == {"lo", "hi", "check", "engine"}


@pytest.mark.parametrize("name", ["PGD", "FGSM", "TPGD", "BIM", "VANILA", *HOST, "AutoAttack"])
def test_an_attribute_that_does_not_exist_cannot_be_set(name):
    attack = getattr(attacks, name)(make_model())
    for each in (attack, copy.copy(attack), copy.deepcopy(attack)):
        with pytest.raises(AttributeError, match=f"{name} has no option 'step'"):
            each.step = 50
    assert not hasattr(attack, "step")


def test_a_multi_attack_has_no_options_of_its_members():
    model = make_model()
    with pytest.raises(AttributeError, match="MultiAttack has no option 'eps'"):
        MultiAttack([FGSM(model), PGD(model)]).eps = 0.1


def test_a_subclass_sets_its_own_options_in_its_constructor():
    class Twice(PGD):
        def __init__(self, model):
            super().__init__(model)
            self.times = 2

    attack = pickle.loads(pickle.dumps(copy.copy(PGD(make_model(), 0.1))))
    assert attack.eps == 0.1
    attack = Twice(make_model())
    attack.times, attack._private = 3, 4
    assert list(inspect.signature(Twice).parameters) == ["model"] and "eps" in inspect.signature(PGD).parameters
    with pytest.raises(AttributeError, match="Twice has no option 'time'"):
        attack.time = 3

    class Clean(attacks.Attack):
        def forward(self, model, images, labels, targeted):
            return images

    with pytest.raises(AttributeError, match="Clean has no option 'eps'"):
        Clean(make_model()).eps = 3


@pytest.mark.parametrize("name", ["norm", "eps", "lo", "hi"])
def test_the_ball_of_autoattack_may_be_set_between_two_runs(name):
    value = {"norm": "L2", "eps": 0.5, "lo": -1.0, "hi": 2.0}[name]
    evaluator = AutoAttack(make_model(), verbose=False)
    setattr(evaluator, name, value)
    assert evaluator.ball == AutoAttack(make_model(), **{name: value}).ball
    with pytest.raises((TypeError, ValueError), match=name):
        setattr(evaluator, name, "nonsense")


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (lambda model: APGD(model, **SMALL), {"verbose": 1}),
        (lambda model: attacks.PGDL2(model, **SMALL), {"eps_for_division": 1}),
        (
            lambda model: AutoAttack(model, eps=0.1, version="custom", attacks_to_run=["apgd-ce"], verbose=False),
            {"n_classes": 1},
        ),
        (
            lambda model: FGSM(model, eps=0.1),
            {"device": torch.device("cpu"), "targeted": False, "attack_mode": "default"},
        ),
    ],
    ids=["APGD", "PGDL2", "AutoAttack", "FGSM"],
)
def test_what_torchattacks_sets_may_be_set_and_changes_no_result(make, values):
    model, (images, _) = make_model().eval(), batch()
    labels, results = model(images).argmax(1), []
    for each in ({}, {"model": model, **values}):
        attack = make(model)
        for name, value in each.items():
            setattr(attack, name, value)
        torch.manual_seed(0)
        results.append(attack(images, labels))
    assert results[0].equal(results[1]) and not results[0].equal(images)


def test_a_targeted_attack_is_described_as_one():
    model = make_model()
    assert "targeted=True" in repr(MIFGSM(model, targeted=True)) and "targeted" not in repr(MIFGSM(model))
    attack = PGD(model)
    attack.set_mode_targeted_by_label(quiet=True)
    assert "targeted=True" in repr(attack) and "targeted" not in repr(PGD(model))
