"""Two processes change their masks in the same way, as one process does, and a stopped run continues bit for bit."""

from dataclasses import replace

import pytest
import torch
from helpers.process_group import results_by_rank
from helpers.small_runs import QUICK, TRAIN, VALIDATION, Batches, equal_states
from torch import nn

from sparse_adv import training
from sparse_adv.methods import MethodConfig, SparseTraining

CONFIG = replace(QUICK, epochs=3, ema_decay=0.5)
"""Without attack, whose random numbers are those of each process; 9 updates."""
METHODS = {
    name: MethodConfig(
        name,
        density=0.3,
        block=(2, 2),
        interval=2,
        change_until=1.0,
        adapt_from=0.1 if name == "flying-bird-plus" else None,
    )
    for name in ("static", "flying-bird", "flying-bird-plus", "rigl", "set", "gmp")
}
METHODS["permuted"] = replace(METHODS["gmp"], permute_channels=True)
FIXED = [name for name in METHODS if name not in ("gmp", "permuted", "flying-bird-plus")]
"""Methods whose density stays as it is."""


def network() -> nn.Module:
    """Without BatchNorm, whose statistics are those of each process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 2))


def train(method, rank=0, world_size=1, folder=None, stop_at=None):
    model, hook = network(), SparseTraining(method)
    config, validation = CONFIG, None
    if method.method == "flying-bird-plus":  # FGSM has no random numbers either
        config, validation = replace(CONFIG, objective="fgsm"), VALIDATION
    records = training.train(
        model,
        Batches(TRAIN, 32, rank=rank, world_size=world_size),
        config,
        validation=validation,
        folder=folder,
        hook=hook,
        on_epoch=lambda record: record.epoch == stop_at,
    )
    return model.state_dict(), hook, records


def work(rank, folder):
    results = {}
    for name, method in METHODS.items():
        run = folder / f"{name}_stopped"
        whole, hook, records = train(method, rank, 2, folder / name)
        train(method, rank, 2, run, stop_at=2)
        continued, _, _ = train(method, rank, 2, run)
        sent = records[-1].bytes_sent, records[-1].bytes_dense
        density = [record.density.weights for record in records]
        macs = records[-1].total.macs
        results[name] = {
            "whole": whole,
            "continued": continued,
            "changes": hook.changes,
            "sent": sent,
            "density": density,
            "macs": macs,
        }
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_by_rank(work, tmp_path_factory.mktemp("two"))


def masks_of(state):
    return {name: tensor for name, tensor in state.items() if name.endswith("weight_mask")}


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_have_the_same_masks_and_weights(ranks, method):
    first, second = (rank[method] for rank in ranks)
    assert equal_states(first["whole"], second["whole"])
    assert first["changes"] == second["changes"] == (0 if method == "static" else 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_of_two_continues_bit_for_bit(ranks, method):
    assert all(equal_states(rank[method]["whole"], rank[method]["continued"]) for rank in ranks)


# Flying Bird+ follows the accuracy under PGD, which starts at random points of each process.
@pytest.mark.parametrize("method", [name for name in METHODS if name != "flying-bird-plus"])
def test_two_processes_choose_the_masks_of_one(ranks, method):
    state, hook, records = train(METHODS[method])
    two = ranks[0][method]
    assert equal_states(masks_of(state), masks_of(two["whole"])) and hook.changes == two["changes"]
    assert [record.density.weights for record in records] == two["density"]
    assert all(torch.allclose(state[name].float(), two["whole"][name].float(), atol=1e-5) for name in state)
    assert two["macs"] == records[-1].total.macs


@pytest.mark.parametrize("method", FIXED)
def test_gradients_of_pruned_weights_are_not_sent(ranks, method):
    """Nor in the updates that form them, and after a change those of the new masks."""
    state = ranks[0][method]["whole"]
    sent, dense = ranks[0][method]["sent"]
    pruned = sum(int((~mask).sum()) for mask in masks_of(state).values())
    total = sum(state[name].numel() for name in state if not name.endswith("weight_mask"))
    assert sent / dense == pytest.approx((total - pruned) / total)
