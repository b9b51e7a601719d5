"""`AttackOptions`: values out of range and unknown names raise, in functions and classes alike; published defaults."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from helpers.attacked import batch, make_model

from sparse_adv import attacks
from sparse_adv.attacks import FGSM, PGD, TPGD, AttackOptions, fgsm, fgsm_rs, n_fgsm, pgd, tpgd

INVALID = [
    ({"eps": -1.0}, "eps must not be negative or NaN, got -1.0"),
    ({"alpha": math.nan}, "alpha must be finite, got nan"),
    ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
    ({"steps": 1.5}, "steps must be an integer of at least 0, got 1.5"),
    ({"steps": True}, "steps must be an integer of at least 0, got True"),
    ({"steps": "3"}, "steps must be an integer of at least 0, got '3'"),
    ({"restarts": 0}, "restarts must be an integer of at least 1, got 0"),
    ({"restarts": 2, "random_start": False}, "restarts must be 1 without a random start, got 2"),
    ({"norm": "l1"}, 'norm must be "linf" or "l2", got \'l1\''),
    ({"loss": "cw"}, 'loss must be "ce", "margin", "dlr" or a callable, got \'cw\''),
    ({"bn_mode": "bn"}, 'bn_mode must be "eval", "train" or "batch", got \'bn\''),
    ({"lo": 1.0, "hi": 0.0}, "lo must not exceed hi, got lo=1.0 and hi=0.0"),
    ({"lo": torch.tensor([0.0, 0.9, 0.0]), "hi": 0.5}, r"lo must not exceed hi, got lo=tensor\(.*\) and hi=0.5"),
    ({"lo": 0.5, "hi": torch.tensor([0.4, 0.9, 1.0])}, r"lo must not exceed hi, got lo=0.5 and hi=tensor\(.*\)"),
]


@pytest.mark.parametrize(("options", "message"), INVALID)
def test_an_option_out_of_range_raises_an_error_that_names_it(options, message):
    model = make_model()
    for make in (AttackOptions, lambda **o: pgd(model, *batch(), **o), lambda **o: PGD(model, **o)):
        with pytest.raises(ValueError, match=message):
            make(**options)


@pytest.mark.parametrize("attack", [fgsm, fgsm_rs, n_fgsm, tpgd])
def test_single_step_attacks_validate_the_same_options(attack):
    labels = () if attack is tpgd else batch()[1:]
    for options, message in (({"eps": -1.0}, "eps must not be negative"), ({"bn_mode": "bn"}, "bn_mode must be")):
        with pytest.raises(ValueError, match=message):
            attack(make_model(), batch()[0], *labels, **options)


@pytest.mark.parametrize(
    ("attack", "options"),
    [
        (fgsm, {"restarts": 2}),
        (fgsm_rs, {"project": False}),
        (n_fgsm, {"restarts": 2}),
        (tpgd, {"targeted": True}),
        (tpgd, {"loss": "ce"}),
        (FGSM, {"steps": 2}),
        (TPGD, {"targeted": True}),
    ],
)
def test_an_option_that_an_attack_does_not_have_raises_type_error(attack, options):
    batch_ = () if isinstance(attack, type) else batch()[:1] if attack is tpgd else batch()
    with pytest.raises(TypeError, match=next(iter(options))):
        attack(make_model(), *batch_, **options)


OBJECTS = [name for name in attacks.__all__ if isinstance(getattr(attacks, name), type(attacks.Attack))]
FUNCTIONS = ["bim", "fgsm", "fgsm_rs", "n_fgsm", "pgd", "tpgd", "apgd", "apgd_t", "cw", "deepfool", "eotpgd", "fab"]
FUNCTIONS += ["fab_t", "fmn", "mifgsm", "rfgsm", "square"]


@pytest.mark.parametrize(
    ("name", "unknown"),
    [
        *((name, "foo") for name in OBJECTS if name not in ("Attack", "MultiAttack")),
        *((name, "foo") for name in FUNCTIONS),
        *(("BIM", "random_start"), ("BIM", "restarts"), ("bim", "random_start")),
        *(("PGDL2", "norm"), ("FGSM", "alpha"), ("FABT", "multi_targeted")),
    ],
)
def test_an_unknown_keyword_is_refused_in_the_name_of_what_was_called(name, unknown):
    called = getattr(attacks, name)
    given = () if isinstance(called, type) else batch()[:1] if name == "tpgd" else batch()
    with pytest.raises(TypeError, match=rf"^{name}(\.__init__)?\(\) got an unexpected keyword argument '{unknown}'"):
        called(make_model(), *given, **{unknown: 1})


def test_an_unknown_keyword_of_a_class_of_the_caller_is_refused_in_its_name():
    class Own(PGD):
        pass

    with pytest.raises(TypeError, match=r"^Own\(\) got an unexpected keyword argument 'foo'"):
        Own(make_model(), foo=1)


EPS, ALPHA = {"eps": 8 / 255}, {"alpha": 2 / 255, "steps": 10}
BOUNDARY, SQUARE = {"alpha_max": 0.1, "eta": 1.05, "beta": 0.9}, {"p_init": 0.8}
ASCENT, NEAREST = {"rho": 0.75, "eot_iter": 1}, {"steps": 100, "alpha": 1.0, "gamma": 0.05, "loss": "margin"}
CARLINI = {"c": 1.0, "kappa": 0.0, "steps": 50, "lr": 0.01, "binary_search_steps": 1}
DEFAULTS = {
    # Of the classes, those of torchattacks.
    "FGSM": EPS,
    "FFGSM": EPS | {"alpha": 10 / 255},
    "PGD": EPS | ALPHA | {"random_start": True},
    "BIM": EPS | ALPHA,
    "RFGSM": EPS | ALPHA,
    "TPGD": EPS | ALPHA,
    "MIFGSM": EPS | ALPHA | {"decay": 1.0},
    "EOTPGD": EPS | ALPHA | {"eot_iter": 2, "random_start": True},
    "PGDL2": {"eps": 1.0, "alpha": 0.2, "steps": 10, "random_start": True},
    "APGD": EPS | ASCENT | {"norm": "Linf", "steps": 10, "n_restarts": 1, "seed": 0, "loss": "ce"},
    "APGDT": EPS | ASCENT | {"norm": "Linf", "steps": 10, "n_restarts": 1, "seed": 0, "n_classes": 10},
    "FAB": EPS | BOUNDARY | {"norm": "Linf", "steps": 10, "n_restarts": 1, "multi_targeted": False, "n_classes": 10},
    "Square": EPS | SQUARE | {"norm": "Linf", "n_queries": 5000, "n_restarts": 1, "seed": 0},
    "CW": CARLINI,
    "DeepFool": {"steps": 50, "overshoot": 0.02},
    "FMN": NEAREST | {"norm": "Linf"},
    # Of the functions, those of the papers and of AutoAttack.
    "bim": EPS | ALPHA,
    "rfgsm": EPS | {"alpha": 4 / 255, "steps": 1},
    "mifgsm": EPS | ALPHA | {"decay": 1.0},
    "eotpgd": EPS | ALPHA | {"eot_iter": 2},
    "apgd": EPS | ASCENT | {"steps": 100, "restarts": 1, "loss": "ce"},
    "apgd_t": EPS | ASCENT | {"steps": 100, "restarts": 1, "n_target_classes": 9},
    "fab": BOUNDARY | {"eps": None, "steps": 100, "restarts": 1},
    "fab_t": BOUNDARY | {"eps": None, "steps": 100, "restarts": 1, "n_target_classes": 9},
    "square": EPS | SQUARE | {"queries": 5000, "restarts": 1},
    "cw": CARLINI,
    "deepfool": {"steps": 50, "overshoot": 0.02},
    "fmn": NEAREST,
    "AutoAttack": EPS | {"norm": "linf", "version": "standard", "seed": None},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_published_ones(name):
    parameters = inspect.signature(getattr(attacks, name)).parameters
    assert {option: parameters[option].default for option in DEFAULTS[name]} == DEFAULTS[name]


def test_numbers_of_numpy_are_numbers():
    model, (images, labels) = make_model().eval(), batch()
    options = {"eps": 0.1, "alpha": 0.05, "steps": 2, "random_start": False}
    others = {"eps": np.float32(0.1), "alpha": np.float64(0.05), "steps": np.int64(2)}
    torch.testing.assert_close(pgd(model, images, labels, **options | others), pgd(model, images, labels, **options))


@pytest.mark.parametrize(
    ("attack", "wrong"),
    [
        (fgsm_rs, {"eps": "a"}),
        (n_fgsm, {"eps": None}),
        (attacks.apgd, {"rho": "a"}),
        (attacks.cw, {"c": "1"}),
        (attacks.cw, {"kappa": None}),
        (attacks.deepfool, {"overshoot": "a"}),
        (attacks.fab, {"eta": "a"}),
        (attacks.fmn, {"gamma": "a"}),
        (attacks.mifgsm, {"decay": "a"}),
        (attacks.square, {"p_init": [0.8]}),
    ],
)
def test_what_is_no_number_is_refused_by_name(attack, wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(TypeError, match=f"{name} must be a number, got {re.escape(repr(value))}"):
        attack(make_model(), *batch(), **wrong)


@pytest.mark.parametrize("make", [attacks.AutoAttack, attacks.APGD, attacks.FAB, attacks.FMN, attacks.Square])
def test_a_norm_that_is_no_text_is_refused_by_name(make):
    with pytest.raises(ValueError, match='norm must be "linf" or "l2", got'):
        make(make_model(), norm=np.inf)(*batch())
