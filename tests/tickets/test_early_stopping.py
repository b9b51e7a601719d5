"""Early-Bird tickets: a search ends when its mask changes no more; not always, and not never."""

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, batches, network

from sparse_adv import masks, tickets
from sparse_adv.tickets import EarlyStopping, PruneConfig
from sparse_adv.tickets.early_stopping import check_threshold

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)


def search(folder=None, config=CONFIG, on_epoch=None, **pruning):
    return tickets.search(network(), batches(), config, PruneConfig(**pruning), folder=folder, on_epoch=on_epoch)


def test_a_search_ends_early_when_its_mask_changes_no_more(tmp_path):
    config = replace(CONFIG, epochs=12, lr=1e-3)
    ticket = search(tmp_path, config, early_stop_distance=0.05)
    epochs = tickets.record_of(ticket).epochs
    assert 6 <= len(epochs) < 12
    assert epochs[-1].mask_distance < 0.05 and epochs[0].mask_distance == 1.0


def test_early_stopping_compares_a_mask_with_those_of_the_five_epochs_before():
    stopping = EarlyStopping(0.2, None)
    sizes = iter([0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4])

    def prune():
        return {"layer": torch.arange(10) < next(sizes)}

    stops = [stopping.should_stop(epoch, prune) for epoch in range(1, 13)]
    assert stops == [False] * 5 + [True] + [False] * 5 + [True]
    assert stopping.distance == 0.0


@pytest.mark.parametrize(
    ("pruning", "epochs", "said"),
    [
        ({"density": 0.04}, 20, r"early_stop_distance must be below 0\.08, .* of density 0\.04 exceed, got 0\.1"),
        ({"density": 0.25, "rounds": 40}, 20, r"early_stop_distance must be below 0\.0681, .*0\.966 exceed, got 0\.1"),
        ({"density": 1.0}, 20, r"early_stop_distance must be below 0, .*density 1 exceed, got 0\.1"),
        ({"density": 0.06}, 6, r"epochs must be more than 6, .*early_stop_distance 0\.1 ends .*, got 6"),
    ],
    ids=str,
)
def test_an_early_stop_that_comes_always_or_never_is_refused_before_training(tmp_path, pruning, epochs, said):
    seen = []
    with pytest.raises(ValueError, match=said):
        search(tmp_path, replace(CONFIG, epochs=epochs), on_epoch=seen.append, early_stop_distance=0.1, **pruning)
    assert not seen and not list(tmp_path.iterdir())


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.9])
def test_no_two_masks_exceed_the_bound_of_an_early_stop(density):
    """Masks as far apart as they can be: one keeps the first weights, the other the last."""
    count = round(100 * density)
    first, last = ({"layer": positions < count} for positions in (torch.arange(100), torch.arange(100).flip(0)))
    bound = masks.distance(first, last)
    check_threshold(PruneConfig(density=density, early_stop_distance=0.99 * bound), 7)
    with pytest.raises(ValueError, match="early_stop_distance must be below"):
        check_threshold(PruneConfig(density=density, early_stop_distance=min(1.0, 1.01 * bound)), 7)
