"""A small network, and its masked state dict as each supported tool writes it."""

import copy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from sparse_adv.nn import sparsify


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.block = Block()
        self.fc = nn.Linear(6, 5)


class Multiplied(nn.Module):
    def __init__(self, mask) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight):
        return weight * self.mask


def pruned_by_torch(model, masks):
    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        torch_prune.custom_from_mask(pruned.get_submodule(name), "weight", mask)
    return pruned


def as_prune(model, masks):
    return pruned_by_torch(model, masks).state_dict()


def as_parametrize(model, masks):
    for name, mask in masks.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", Multiplied(mask.float()))
    return model.state_dict()


def as_masked(model, masks):
    return sparsify(model, masks).state_dict()


def as_turboprune(model, masks):
    for name, mask in masks.items():
        model.get_submodule(name).register_buffer("mask", mask.float())
    return model.state_dict()


def as_open_lth(model, masks):
    pruned = nn.Module()
    pruned.model = model
    for name, mask in masks.items():
        pruned.register_buffer("mask_" + f"{name}.weight".replace(".", "___"), mask.float())
    return pruned.state_dict()


def as_zeros(model, masks):
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.mul_(mask)
    return model.state_dict()


WRITERS = {
    "prune": as_prune,
    "parametrize": as_parametrize,
    "masked": as_masked,
    "turboprune": as_turboprune,
    "open_lth": as_open_lth,
    "zeros": as_zeros,
}


def as_npy(path, masks):
    entries = np.empty(len(masks), dtype=object)
    entries[:] = [mask.numpy() for mask in masks]
    np.save(path, entries)


def edge_popup_mask(scores, k):
    """The mask that HYDRA and HARP compute from scores."""
    mask, (_, order) = scores.abs().clone(), scores.abs().flatten().sort()
    pruned = int((1 - k) * scores.numel())
    mask.flatten()[order[:pruned]] = 0
    mask.flatten()[order[pruned:]] = 1
    return mask != 0
