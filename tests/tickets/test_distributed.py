"""Two processes find the same ticket, with a folder and without, and continue a stopped search bit for bit."""

from dataclasses import replace

import pytest
import torch
from helpers.process_group import results_by_rank
from helpers.small_runs import QUICK, TRAIN, VALIDATION, Batches, Stop, equal_states, network, stop_after
from torch import nn

from sparse_adv import tickets
from sparse_adv.tickets import PruneConfig

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)
PRUNING = {
    "rewound": PruneConfig(density=0.3, rounds=2, rewind_step=2),
    "kept": PruneConfig(density=0.3, rounds=2, keep_weights=True, half_resolution=True),
}


def pooled_network() -> nn.Module:
    *layers, _, _ = network(channels=8)
    torch.manual_seed(1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def search(rank, pruning, folder, stop_at=None):
    images = Batches(TRAIN, 32, rank=rank, world_size=2)
    options = {"validation": VALIDATION, "folder": folder, "on_epoch": stop_after(stop_at)}
    return tickets.search(pooled_network(), images, CONFIG, pruning, **options)


def work(rank, folder):
    results = {}
    for name, pruning in PRUNING.items():
        whole = search(rank, pruning, folder / name)
        try:
            search(rank, pruning, folder / f"{name}_stopped", stop_at=3)
        except Stop:
            continued = search(rank, pruning, folder / f"{name}_stopped")
        found = whole, continued, search(rank, pruning, None)
        results[name] = [(ticket.masks, ticket.state_dict) for ticket in found]
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_by_rank(work, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("pruning", PRUNING)
def test_both_processes_have_the_ticket_and_a_stopped_search_finds_it_too(ranks, pruning):
    (masks, weights), *others = [ticket for rank in ranks for ticket in rank[pruning]]
    assert len(others) == 5 and all(mask.any() and not mask.all() for mask in masks.values())
    for other_masks, other_weights in others:
        assert equal_states(masks, other_masks) and equal_states(weights, other_weights)
