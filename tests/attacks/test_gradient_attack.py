"""The attack classes: the same results as the functions, and options that are validated when the object is created."""

import inspect

import pytest
import torch
from helpers.attacked import ALPHA, EPS, batch, generator, make_model

from sparse_adv import attacks
from sparse_adv.attacks import FFGSM, FGSM, PGD, PGDL2, TPGD, Graphs, fgsm, fgsm_rs, pgd, tpgd


def test_objects_compute_what_the_functions_compute():
    model, (images, labels) = make_model(), batch()
    for attack, expected in (
        (
            PGD(model, EPS, ALPHA, 3, True, generator=generator()),
            pgd(model, images, labels, steps=3, generator=generator()),
        ),
        (
            PGDL2(model, steps=2, generator=generator()),
            pgd(model, images, labels, eps=1.0, alpha=0.2, steps=2, norm="l2", generator=generator()),
        ),
        (FGSM(model, eps=EPS), fgsm(model, images, labels, eps=EPS)),
        (
            FFGSM(model, generator=generator()),
            fgsm_rs(model, images, labels, eps=EPS, alpha=10 / 255, generator=generator()),
        ),
        (TPGD(model, steps=2, generator=generator()), tpgd(model, images, steps=2, generator=generator())),
    ):
        assert torch.equal(attack(images, labels), expected), attack


DEFAULTS = {
    **{"apgd": {"steps": 100, "rho": 0.75}, "apgd_t": {"steps": 100, "n_target_classes": 9, "rho": 0.75}},
    **{"cw": {"c": 1.0, "kappa": 0.0, "steps": 50, "lr": 0.01}, "deepfool": {"steps": 50, "overshoot": 0.02}},
    "fab": (fab := {"eps": None, "steps": 100, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}),
    "fab_t": fab | {"n_target_classes": 9},
    "square": {"queries": 5000, "p_init": 0.8, "loss": "margin", "resc_schedule": True},
    "fmn": {"steps": 100, "alpha": 1.0, "gamma": 0.05, "loss": "margin"},
    **{"mifgsm": {"steps": 10, "decay": 1.0}, "rfgsm": {"alpha": 4 / 255, "steps": 1}, "bim": {"steps": 10}},
    **{"eotpgd": {"steps": 10, "eot_iter": 2}, "tpgd": {"steps": 10}, "fgsm": {}},
    **{"fgsm_rs": {"alpha": None}, "n_fgsm": {"alpha": None}, "pgd": {"steps": 10, "bn_mode": "eval"}},
    **{"APGD": {"steps": 10}, "APGDT": {"steps": 10, "n_classes": 10}, "DeepFool": {"steps": 50, "overshoot": 0.02}},
    "CW": {"c": 1.0, "kappa": 0.0, "steps": 50, "lr": 0.01},
    "Square": {"n_queries": 5000, "p_init": 0.8, "loss": "margin"},
    "FAB": fab | {"eps": 8 / 255, "steps": 10, "n_classes": 10, "multi_targeted": False},
    **{"FABT": {"steps": 10}, "FMN": {"steps": 100, "alpha": 1.0, "gamma": 0.05, "loss": "margin"}},
    **{"MIFGSM": {"steps": 10, "decay": 1.0}, "RFGSM": {"steps": 10}, "BIM": {"steps": 10}},
    **{"EOTPGD": {"steps": 10, "eot_iter": 2}, "TPGD": {"steps": 10}, "FGSM": {}, "FFGSM": {"alpha": 10 / 255}},
    **{"PGD": {"steps": 10}, "PGDL2": {"eps": 1.0, "alpha": 0.2, "steps": 10, "norm": "l2"}},
}
"""Of the papers, and for objects of torchattacks, where they differ from COMMON."""
COMMON = {
    **{"eps": 8 / 255, "alpha": 2 / 255, "norm": "linf", "restarts": 1, "n_restarts": 1, "seed": 0, "loss": "ce"},
    **{"targeted": False, "random_start": True, "eot_iter": 1, "rho": 0.75, "binary_search_steps": 1, "lo": 0.0},
    **{"hi": 1.0, "check": True, "engine": True, "early_stop": False, "generator": None, "graphs": None},
    **{"verbose": False, "graph": False, "resc_schedule": True, "eps_for_division": 1e-10},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_the_published_ones(name):
    parameters = inspect.signature(getattr(attacks, name)).parameters
    given = {each.name: each.default for each in parameters.values() if each.default is not each.empty}
    expected = COMMON | DEFAULTS[name]
    for option, value in given.items():
        same = value.lower() == expected[option] if isinstance(value, str) else value == expected[option]
        assert same, option  # objects write "Linf"


def test_repr_shows_eps_alpha_steps_and_what_differs_from_pgd():
    assert repr(PGD(make_model(), 0.5, 0.25, 4, norm="l2")) == "PGD(eps=0.5, alpha=0.25, steps=4, norm=l2)"
    assert repr(FGSM(make_model(), eps=0.5)) == "FGSM(eps=0.5, alpha=0.5, steps=1, random_start=False)"


def test_graph_true_gives_each_object_a_cache_of_its_own_and_does_nothing_on_a_cpu():
    model, (images, labels) = make_model(), batch()
    for attack in (PGD(model, graph=True), TPGD(model, steps=1, graph=True)):
        assert isinstance(attack.options.graphs, Graphs)
        assert attack(images, labels).shape == images.shape
    assert "graphs=Graphs(capacity=8)" in repr(PGD(model, graph=True))
    assert PGD(model).options.graphs is None
    shared = Graphs()
    assert PGD(model, graph=True, graphs=shared).options.graphs is shared


def test_an_invalid_option_raises_when_the_object_is_created():
    with pytest.raises(ValueError, match="eps must not be negative or NaN, got -1"):
        FGSM(make_model(), eps=-1)


def test_the_start_of_trades_follows_the_norm_and_the_radius():
    attack = TPGD(make_model(), eps=0.5)
    attack.norm = "l2"
    assert attack.options == TPGD(attack.model, eps=0.5, norm="l2").options
    attack.eps = 0.01
    assert attack.options == TPGD(attack.model, eps=0.01, norm="l2").options
