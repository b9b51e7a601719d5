"""Gradients of a batch that becomes smaller while an attack runs."""

import torch

from sparse_adv import models
from sparse_adv.attacks.gradients import batch_gradients
from sparse_adv.engine import Program, dispatch

HALVES = [128, 64, 32, 16, 8, 4, 2, 1]


def test_the_programs_of_all_halves_of_a_batch_are_kept(monkeypatch):
    model, x, made, make = models.build("digits_cnn", width=4).eval(), torch.rand(128, 1, 8, 8), [], dispatch._make
    monkeypatch.setattr(dispatch, "_make", lambda model, x: made.append(len(x)) or make(model, x))
    for _ in range(2):
        with batch_gradients(model, x, use_engine=True) as gradients:
            for count in HALVES:
                assert gradients.logits(x[:count]).shape == (count, 10)
                assert isinstance(gradients.formed_by, Program)
    assert made == HALVES
