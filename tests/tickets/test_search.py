"""Tickets: the search goes back to the start, its masks are what was asked, and every claim of that is checked."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, batches, equal_states, network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_adv import masks, runs, tickets, training
from sparse_adv.nn import MaskedConv2d, sparsify
from sparse_adv.tickets import BrokenTicket, MaskWatch, PruneConfig, checks

RECIPE = replace(QUICK, objective="fgsm-rs", epochs=2)
SHAPE = (1, 1, 6, 6)


def search(folder=None, recipe=RECIPE, model=None, **rule):
    model = network() if model is None else model
    return tickets.search(model, batches(), recipe, PruneConfig(**rule), validation=VALIDATION, folder=folder), model


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_search_ends_where_it_began(rounds):
    start = network().state_dict()
    ticket, model = search(rounds=rounds)
    assert equal_states(start, model.state_dict()) and equal_states(start, ticket.state_dict)
    assert all(type(module) is not MaskedConv2d for module in model.modules())


@pytest.mark.parametrize(("rounds", "linear"), [(1, True), (1, False), (3, True)])
def test_the_masks_are_those_of_the_trained_network(rounds, linear):
    ticket, _ = search(density=0.3, rounds=rounds, linear=linear)
    assert set(ticket.masks) == ({"0", "3", "7"} if linear else {"0", "3"})
    weights = sum(mask.numel() for mask in ticket.masks.values())
    assert sum(int(mask.count_nonzero()) for mask in ticket.masks.values()) == round(0.3 * weights)
    if rounds == 1:
        model = network()
        training.train(model, batches(), RECIPE, validation=VALIDATION)
        expected = masks.prune(model, 0.3, score="relative_magnitude", linear=linear)
        assert equal_states(ticket.masks, expected)
    else:
        assert not equal_states(ticket.masks, search(density=0.3, linear=linear)[0].masks)


def test_provenance_tells_what_was_done_and_checked():
    ticket, _ = search(density=0.3, rounds=2)
    told = ticket.provenance
    assert [(record["round"], record["epoch"]) for record in told["epochs"]] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert told["recipe"]["objective"] == "fgsm-rs" and told["rule"]["rounds"] == 2
    assert told["checks"] == {
        "reset": True,
        "pruned_weights_zero": True,
        "nested": True,
        "kept": 140,
        "asked": 140,
        "weights": 468,
    }
    first, last = told["epochs"][0], told["epochs"][-1]
    assert first["density"] == 1 and last["density"] == pytest.approx(0.3**0.5, abs=0.01)
    assert told["seconds"] >= last["seconds"] > first["seconds"] and told["multiply_adds"] == last["multiply_adds"]


def test_rewinding_goes_back_to_the_weights_of_that_update():
    seen = {}
    model = network()
    run = training.Training(
        model,
        batches(),
        RECIPE,
        validation=VALIDATION,
        on_step=lambda step: seen.update({step: copy.deepcopy(model.state_dict())}),
    )
    list(run.epochs())
    ticket, searched = search(rewind_step=4, rounds=2)
    assert equal_states(ticket.state_dict, seen[4])
    assert equal_states(searched.state_dict(), network().state_dict())


def test_an_update_that_never_comes_is_no_place_to_rewind_to():
    with pytest.raises(
        ValueError, match="rewind_step must come before the first round ends, got 99: it made 6 updates"
    ):
        search(rewind_step=99)


@pytest.mark.parametrize("rounds", [1, 2])
def test_gathering_reorders_masks_and_initial_weights_alike(rounds):
    rule = {"density": 0.3, "block": (2, 2), "scope": "uniform"}
    start = network(channels=8)
    ticket, searched = search(model=network(channels=8), permute_channels=True, rounds=rounds, **rule)
    assert equal_states(searched.state_dict(), start.state_dict())
    assert not equal_states(ticket.state_dict, start.state_dict())
    x = torch.rand(3, 1, 6, 6)
    reordered = network(channels=8)
    reordered.load_state_dict(ticket.state_dict)
    torch.testing.assert_close(reordered.eval()(x), start.eval()(x))
    before, after = ticket.provenance["checks"]["retained"]
    assert before < after < 1
    if rounds == 1:  # the masks are those of the trained network in the same order
        model = network(channels=8)
        training.train(model, batches(), RECIPE, validation=VALIDATION)
        order = masks.gather_channels(model, shape=SHAPE, score="relative_magnitude", linear=True, **rule)
        order.apply(model)
        assert equal_states(ticket.masks, masks.prune(model, score="relative_magnitude", linear=True, **rule))
        assert equal_states(ticket.state_dict, order.reorder(start.state_dict()))
    sparse = tickets.restore(network(seed=3, channels=8), ticket, SHAPE)
    assert sparse[3].weight_mask.equal(ticket.masks["3"])


class Untraceable(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_gathering_refuses_a_model_that_it_cannot_trace_before_it_trains():
    epochs = []
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace"):
        tickets.search(
            Untraceable(*network()), batches(), RECIPE, PruneConfig(permute_channels=True), on_epoch=epochs.append
        )
    assert not epochs


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", range(1, 7))
@pytest.mark.parametrize(
    "rule",
    [
        {"rounds": 3, "rewind_step": 2},
        {"rounds": 2, "early_stop_distance": 0.9},
        {"rounds": 3, "rewind_step": 2, "permute_channels": True, "block": (2, 2)},
    ],
)
def test_a_stopped_search_finds_the_same_ticket(tmp_path, stop_at, rule):
    recipe = replace(RECIPE, epochs=2 if "rewind_step" in rule else 7)
    expected, _ = search(tmp_path / "whole", recipe, density=0.3, **rule)

    def on_epoch(record):
        if record["epoch"] == stop_at:
            raise Stop

    with pytest.raises(Stop):
        tickets.search(
            network(),
            batches(),
            recipe,
            PruneConfig(density=0.3, **rule),
            validation=VALIDATION,
            folder=tmp_path / "stopped",
            on_epoch=on_epoch,
        )
    ticket, _ = search(tmp_path / "stopped", recipe, network(seed=5), density=0.3, **rule)  # the file decides the start
    assert equal_states(ticket.masks, expected.masks) and equal_states(ticket.state_dict, expected.state_dict)
    journals = [runs.read(tmp_path / run).records for run in ("whole", "stopped")]
    assert [r["loss"] for r in journals[0]] == [r["loss"] for r in journals[1]]
    assert [r.get("mask_distance") for r in journals[0]] == [r.get("mask_distance") for r in journals[1]]


def test_a_finished_search_returns_at_once(tmp_path):
    first, _ = search(tmp_path)
    again = tickets.search(network(), [None], RECIPE, PruneConfig(), folder=tmp_path)
    assert equal_states(first.masks, again.masks)
    with pytest.raises(ValueError, match="the ticket of another rule"):
        search(tmp_path, density=0.5)
    with pytest.raises(ValueError, match="the ticket of another recipe"):
        search(tmp_path, replace(RECIPE, lr=0.5))


def test_a_search_ends_when_its_mask_stands_still(tmp_path):
    recipe = replace(RECIPE, epochs=12, lr=1e-3)
    ticket, _ = search(tmp_path, recipe, early_stop_distance=0.05)
    epochs = ticket.provenance["epochs"]
    assert 6 <= len(epochs) < 12
    assert epochs[-1]["mask_distance"] < 0.05 and epochs[0]["mask_distance"] == 1.0


def test_a_moving_mask_is_watched_over_five_epochs():
    watch, position = MaskWatch(0.2, None), torch.arange(10)
    where = iter([0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4])

    def mask():
        return {"layer": position < next(where)}

    settled = [watch.settled(epoch, mask) for epoch in range(1, 13)]
    assert settled == [False] * 5 + [True] + [False] * 5 + [True]
    assert watch.distance == 0.0


def test_a_search_refuses_a_wrong_rule_before_it_trains():
    epochs = []
    with pytest.raises(ValueError, match=r"density must be a number in \[0, 1\], got 2"):
        tickets.search(network(), batches(), RECIPE, PruneConfig(density=2), on_epoch=epochs.append)
    assert not epochs


def test_broken_invariants_are_found():
    model = network()
    kept = masks.prune(model, 0.5)
    start = copy.deepcopy(model.state_dict())
    assert checks.reset(model, start) == {"reset": True}
    sparsify(model, kept)
    checks.pruned_weights_are_zero(model, kept)
    with torch.no_grad():
        model[3].weight[~kept["3"]] = 1.0
    with pytest.raises(BrokenTicket, match=r"pruned weights of '3' are no longer zero"):
        checks.pruned_weights_are_zero(model, kept)
    with pytest.raises(BrokenTicket, match="came back"):
        checks.nested({name: ~mask for name, mask in kept.items()}, kept)
    with pytest.raises(BrokenTicket, match=r"90 of 180 weights are kept, asked was 36"):
        checks.density(kept, PruneConfig(density=0.2), 1)
    other = network()
    other[1].running_mean += 1
    with pytest.raises(BrokenTicket, match=r"the reset missed \['1.running_mean'\]"):
        checks.reset(other, start)


def test_a_score_that_brings_weights_back_is_found_out():
    def backwards(name, weight):
        return 1 / (1 + weight.abs())

    with pytest.raises(BrokenTicket, match="came back in a later round"):
        search(rounds=2, score=backwards, density=0.3)


def test_a_ticket_makes_a_dense_model_the_sparse_network():
    ticket, _ = search(density=0.3)
    network_of_ticket = tickets.restore(network(seed=3), ticket, SHAPE)
    start = network().state_dict()
    for name, mask in ticket.masks.items():
        layer = network_of_ticket.get_submodule(name)
        assert layer.weight_mask.equal(mask) and layer.weight.equal(start[f"{name}.weight"] * mask)
    fresh = tickets.restore(network(seed=3), ticket, SHAPE, weights=False)
    assert fresh[3].weight.equal(network(seed=3)[3].weight * ticket.masks["3"])


def test_channels_of_dead_filters_are_silent_and_stay_so():
    ticket, _ = search(density=0.3)
    ticket.masks["3"][1] = False
    model = tickets.restore(network(), ticket, SHAPE)
    training.train(model, batches(), RECIPE)
    assert model[4].weight[1] == 0 and model[4].bias[1] == 0 and model[4].bias[0] != 0
    assert tickets.pruned_weights_are_zero(model, ticket.masks) == {"pruned_weights_zero": True}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: network(channels=6), r"its '0\.weight' is \(4, 1, 3, 3\), the model's \(6, 1, 3, 3\)"),
        (lambda: network()[:7], r"it has '7\.weight', which the model has not"),
        (lambda: nn.Sequential(*network(), nn.Linear(2, 2)), r"it lacks '8\.weight'"),
    ],
)
def test_a_ticket_for_another_architecture_is_refused_and_changes_nothing(other, said):
    ticket, _ = search()
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the ticket is for another architecture: {said}"):
        tickets.restore(model, ticket, SHAPE)
    assert equal_states(before, model.state_dict())


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2),
    block=st.sampled_from([(1, 1), (2, 1), (4, 4), (1, 1, 3, 3)]),
    density=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_a_shuffled_mask_keeps_count_and_block(shape, block, density, seed):
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    kept = masks.prune(nn.Sequential(layer), density, block)
    moved = tickets.shuffle(kept, seed)
    assert moved["0"].count_nonzero() == kept["0"].count_nonzero() and moved["0"].shape == kept["0"].shape
    found = masks.largest_block(kept["0"])
    assert torch.equal(moved["0"], tickets.shuffle(kept, seed)["0"])
    sparsify(nn.Sequential(layer), moved, block=found)  # refuses a mask that does not obey


def test_a_shuffled_mask_is_another_mask():
    kept = {"layer": torch.rand(16, 16, 3, 3) < 0.3, "linear": torch.rand(16, 8) < 0.5}
    moved = tickets.shuffle(kept, 0)
    assert all(not moved[name].equal(kept[name]) for name in kept)
    assert masks.density(moved) == masks.density(kept)
