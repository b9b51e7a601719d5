"""Gradients of a batch that becomes smaller while an attack runs."""

import torch

from sparse_adv import models
from sparse_adv.attacks.gradients import batch_gradients
from sparse_adv.engine import Program

HALVES = [128, 64, 32, 16, 8, 4, 2, 1]


def test_the_programs_of_all_halves_of_a_batch_are_kept():
    model, x, rounds = models.build("digits_cnn", width=4).eval(), torch.rand(128, 1, 8, 8), []
    for _ in range(2):
        programs = []
        with batch_gradients(model, x, use_engine=True) as gradients:
            for count in HALVES:
                assert gradients.logits(x[:count]).shape == (count, 10)
                assert isinstance(gradients.formed_by, Program)
                programs.append(gradients.formed_by)
        rounds.append(programs)
    assert all(first is second for first, second in zip(*rounds, strict=True)) and len(set(rounds[0])) == len(HALVES)
