"""Models that other threads use while they are attacked."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparse_adv import attacks, masks, sparsify, training

IMAGES, LABELS = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 3)
    )
    return sparsify(model, masks.prune(model, 0.5, linear=True))


@pytest.mark.parametrize("attack", [attacks.pgd, attacks.apgd])
def test_flags_that_an_attack_does_not_need_to_change_stay_as_others_set_them(attack):
    model = network().eval()

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        model[3].train()  # as another thread would
        return F.cross_entropy(logits, labels, reduction="none")

    attack(model, IMAGES, LABELS, loss=loss, engine=False)
    assert [module.training for module in model] == [False] * 3 + [True] + [False] * 2


def test_a_copy_is_attacked_while_the_model_is_trained():
    model = network().train()
    attacked = copy.deepcopy(model)
    before = attacked.eval()(IMAGES)
    done, flags, failures = threading.Event(), [], []

    def train() -> None:
        try:
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            while not done.is_set() or len(flags) < 5:
                optimizer.zero_grad()
                F.cross_entropy(model(IMAGES), LABELS).backward()
                optimizer.step()
                flags.append(all(module.training for module in model.modules()))
                flags.append(all(parameter.grad is not None for parameter in model.parameters()))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for use_engine in (True, False) * 3:
            attacks.pgd(attacked.train(), IMAGES, LABELS, eps=0.1, engine=use_engine)
            training.clean_accuracy(attacked, [(IMAGES, LABELS)])
    finally:
        done.set()
        thread.join()
    assert not failures and all(flags)
    assert attacked.training and torch.equal(attacked.eval()(IMAGES), before)


def test_an_attack_leaves_the_gradients_of_a_thread_that_trains_the_same_model():
    model = network().eval()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    frozen, trained = threading.Event(), threading.Event()

    def train() -> None:
        frozen.wait(60)
        F.cross_entropy(model(IMAGES), LABELS).backward()
        trained.set()

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        frozen.set()  # from now on the other thread runs, with this one in the middle of an attack
        assert trained.wait(60)
        return F.cross_entropy(logits, labels, reduction="none")

    thread = threading.Thread(target=train)
    thread.start()
    attacks.pgd(model, IMAGES, LABELS, loss=loss, engine=False)
    thread.join()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
