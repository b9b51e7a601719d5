"""The attack classes: the same results as the functions, and options that are validated when the object is created."""

import pytest
import torch
from helpers.attacked import ALPHA, EPS, batch, generator, make_model

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
