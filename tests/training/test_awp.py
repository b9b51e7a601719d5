"""Adversarial weight perturbation moves the weights within its block, and nothing else."""

import copy
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.small_runs import TRAIN, WITH_ENGINE, batches, network
from torch import nn

from sparse_adv import data, training
from sparse_adv.training.awp import perturbed_weights


def vector_network() -> nn.Module:
    size = TRAIN.images[0].numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_training_refuses_a_model_without_weights_to_perturb_before_the_warm_up():
    model = network().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_()
    config = replace(WITH_ENGINE, objective="pgd", awp_gamma=0.01, awp_warmup_epochs=1.0)
    records = []
    with pytest.raises(ValueError, match='awp_gamma needs a trained parameter with "weight" in its name'):
        training.train(model, batches(), config, on_epoch=records.append)
    assert not records


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("make", [network, vector_network])
def test_adversarial_weights_are_restored_bit_for_bit_and_move_neither_gradients_nor_statistics(fails, make):
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    x, y = data.to_unit(TRAIN.images[:16]), TRAIN.labels[:16]
    perturbed = perturbed_weights(model, lambda model: F.cross_entropy(model(x), y), 0.1)
    with suppress(ArithmeticError), perturbed:
        moved = {name: (value - before[name]).double().norm() for name, value in model.state_dict().items()}
        if fails:
            raise ArithmeticError
    for name, value in model.state_dict().items():
        assert value.equal(before[name])
        is_weight = "weight" in name and value.dim() > 1
        expected = 0.1 * before[name].norm().item() if is_weight else 0.0
        assert moved[name].item() == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_perturbation_of_weights_moves_no_statistics():
    norm = nn.InstanceNorm2d(2, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.rand(8, 1, 4, 4)
    with perturbed_weights(model, lambda model: model(x).square().mean(), 0.01):
        pass
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
