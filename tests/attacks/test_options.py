"""`AttackOptions`: values out of range and unknown names raise, in the functions and in the classes alike."""

import math

import pytest
from helpers.attacked import batch, make_model

from sparse_adv.attacks import FGSM, PGD, TPGD, AttackOptions, fgsm, fgsm_rs, n_fgsm, pgd, tpgd

INVALID = [
    ({"eps": -1.0}, "eps must not be negative or NaN, got -1.0"),
    ({"alpha": math.nan}, "alpha must be finite, got nan"),
    ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
    ({"steps": 1.5}, "steps must be an integer of at least 0, got 1.5"),
    ({"restarts": 0}, "restarts must be an integer of at least 1, got 0"),
    ({"restarts": 2, "random_start": False}, "restarts must be 1 without a random start, got 2"),
    ({"norm": "l1"}, 'norm must be "linf" or "l2", got \'l1\''),
    ({"loss": "cw"}, 'loss must be "ce", "margin", "dlr" or a callable, got \'cw\''),
    ({"bn_mode": "bn"}, 'bn_mode must be "eval", "train" or "batch", got \'bn\''),
    ({"lo": 1.0, "hi": 0.0}, "lo must not exceed hi, got lo=1.0 and hi=0.0"),
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
