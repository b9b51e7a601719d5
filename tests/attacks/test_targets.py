"""Targets that are chosen from the labels and the logits: bad labels and models, copies and pickles."""

import copy
import pickle

import pytest
import torch
from helpers.attacked import batch, make_model
from torch import nn

from sparse_adv import attacks

MODES = {
    "random": lambda atk: atk.set_mode_targeted_random(quiet=True),
    "least likely": lambda atk: atk.set_mode_targeted_least_likely(kth_min=2, quiet=True),
}


def attack(mode, model=None):
    atk = attacks.PGD(model or make_model().eval(), eps=0.1, steps=2, random_start=False)
    MODES[mode](atk)
    return atk


@pytest.mark.parametrize("mode", MODES)
def test_labels_that_are_no_classes_are_refused(mode):
    images, labels = batch()
    for wrong, message in (
        (labels + 50, r"labels must lie in \[0, 4\], the model's classes, got"),
        (labels - 9, "got -9"),
    ):
        with pytest.raises(ValueError, match=message):
            attack(mode)(images, wrong)
    with pytest.raises(ValueError, match="labels must have one label per image"):
        attack(mode)(images, labels[1:])


@pytest.mark.parametrize("mode", MODES)
def test_models_without_other_classes_or_without_logits_are_refused(mode):
    images, labels = batch()
    one = nn.Sequential(nn.Flatten(), nn.Linear(192, 1))
    with pytest.raises(ValueError, match="a targeted attack needs a model of at least 2 classes, got 1"):
        attack(mode, one)(images, torch.zeros_like(labels))
    with pytest.raises(TypeError, match=r"model must return logits .*, got a tuple"):
        attack(mode, lambda x: (x, x))(images, labels)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda atk: pickle.loads(pickle.dumps(atk))])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_chooses_its_targets_by_its_own_model(mode, copied):
    images, labels = batch()
    atk, other = copied(attack(mode)), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    atk.set_model(other)
    torch.manual_seed(0)
    actual = atk(images, labels)
    torch.manual_seed(0)
    assert actual.equal(attack(mode, other)(images, labels))
