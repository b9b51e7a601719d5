"""Tickets that keep the weights of the search: those of plain training, and of pruning in rounds without rewinding."""

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, Stop, batches, equal_states, network, stop_after

from sparse_adv import masks, runs, tickets, training
from sparse_adv.nn import sparsify
from sparse_adv.tickets import PruneConfig

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)
SHAPE = (1, 1, 6, 6)


def search(folder=None, config=CONFIG, channels=4, on_epoch=None, **pruning):
    model = network(channels=channels)
    pruning = PruneConfig(density=0.3, keep_weights=True, **pruning)
    options = {"validation": VALIDATION, "folder": folder, "on_epoch": on_epoch}
    return tickets.search(model, batches(), config, pruning, **options), model


def train(model, config=CONFIG):
    training.train(model, batches(), config, validation=VALIDATION)
    return model


def dense_state(model):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("weight_mask")}


def test_the_ticket_holds_the_trained_weights_and_batchnorm_statistics():
    ticket, searched = search()
    trained = train(network())
    assert equal_states(ticket.state_dict, trained.state_dict())
    assert equal_states(ticket.masks, masks.prune(trained, 0.3, score="relative_magnitude", linear=True))
    assert equal_states(searched.state_dict(), network().state_dict())
    record = tickets.record_of(ticket)
    assert record.prune.keep_weights and record.checks.reset is None and record.checks.pruned_weights_zero
    sparse = tickets.restore(network(seed=3), ticket, SHAPE)
    assert sparse[3].weight.equal(trained[3].weight * ticket.masks["3"])
    assert sparse[1].running_mean.equal(trained[1].running_mean) and sparse[1].running_var.equal(trained[1].running_var)


def test_rounds_are_pruning_and_training_by_turns():
    ticket, _ = search(rounds=2)
    model = train(network())
    first = masks.prune(model, 0.3**0.5, score="relative_magnitude", linear=True)
    model = train(sparsify(model, first).train())
    assert equal_states(ticket.masks, masks.prune(model, 0.3, score="relative_magnitude", linear=True))
    assert equal_states(ticket.state_dict, dense_state(model))
    assert all(not ticket.state_dict[f"{name}.weight"][~mask].any() for name, mask in first.items())


def test_robust_bird_ends_with_the_weights_of_the_epoch_in_which_its_mask_is_drawn():
    config = replace(CONFIG, objective="natural", epochs=12, lr=1e-3)
    ticket, _ = search(config=config, score="magnitude", early_stop_distance=0.08)
    epochs = tickets.record_of(ticket).epochs
    assert 6 <= len(epochs) < 12 and epochs[-1].mask_distance < 0.08
    trained = train(network(), replace(config, epochs=len(epochs)))
    assert equal_states(ticket.state_dict, trained.state_dict())


def test_a_channel_permutation_applies_to_the_kept_weights():
    pruning = {"block": (2, 2), "scope": "uniform", "permute_channels": True}
    ticket, _ = search(channels=8, **pruning)
    trained = train(network(channels=8))
    assert not equal_states(ticket.state_dict, trained.state_dict())
    permuted = network(channels=8)
    permuted.load_state_dict(ticket.state_dict)
    x = torch.rand(3, 1, 6, 6)
    torch.testing.assert_close(permuted.eval()(x), trained(x))


@pytest.fixture(
    scope="module", params=[{}, {"permute_channels": True, "block": (2, 2)}], ids=["as they are", "permuted"]
)
def whole(request, tmp_path_factory):
    """Pruning, ticket and folder of a search that was not stopped."""
    pruning, folder = {"rounds": 3, **request.param}, tmp_path_factory.mktemp("search") / "whole"
    return pruning, search(folder, **pruning)[0], folder


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5])
def test_a_stopped_search_finds_the_same_ticket(tmp_path, stop_at, whole):
    pruning, expected, folder = whole
    with pytest.raises(Stop):
        search(tmp_path, on_epoch=stop_after(stop_at), **pruning)
    ticket, _ = search(tmp_path, **pruning)
    assert equal_states(ticket.masks, expected.masks) and equal_states(ticket.state_dict, expected.state_dict)
    losses = [[record.loss for record in runs.read(run).records] for run in (folder, tmp_path)]
    assert losses[0] == losses[1]


def test_kept_weights_are_not_rewound():
    with pytest.raises(ValueError, match="rewind_step must be 0 with keep_weights, which does not rewind, got 3"):
        PruneConfig(keep_weights=True, rewind_step=3)
