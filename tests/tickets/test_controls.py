"""The shuffled mask of a control: random, with the density and the blocks of the ticket's in each layer."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_adv import masks, tickets
from sparse_adv.nn import sparsify


@given(
    shape=st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2),
    block=st.sampled_from([(1, 1), (2, 1), (4, 4), (1, 1, 3, 3)]),
    density=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_a_shuffled_mask_has_the_same_density_and_blocks(shape, block, density, seed):
    layer = nn.Conv2d(shape[1], shape[0], shape[2:])
    pruned = masks.prune(nn.Sequential(layer), density, block)
    shuffled = tickets.shuffle(pruned, seed)
    assert shuffled["0"].count_nonzero() == pruned["0"].count_nonzero() and shuffled["0"].shape == pruned["0"].shape
    assert torch.equal(shuffled["0"], tickets.shuffle(pruned, seed)["0"])
    # `sparsify` refuses a mask that is not made of such blocks.
    sparsify(nn.Sequential(layer), shuffled, block=masks.largest_block(pruned["0"]))


def test_a_shuffled_mask_differs():
    pruned = {"layer": torch.rand(16, 16, 3, 3) < 0.3, "linear": torch.rand(16, 8) < 0.5}
    pruned["its twin"] = pruned["layer"].clone()
    shuffled = tickets.shuffle(pruned, 0)
    assert not shuffled["layer"].equal(shuffled["its twin"])  # each layer has a permutation of its own
    assert all(not shuffled[name].equal(pruned[name]) for name in pruned)
    assert masks.density(shuffled) == masks.density(pruned)


def test_every_block_can_move_also_at_the_edges():
    """Blocks of 4 x 4 in a weight of 10 x 7: in each of the four regions of blocks of one size some are kept."""
    grid = torch.tensor([[True, False], [False, True], [True, False]])
    pruned = grid.repeat_interleave(4, 0).repeat_interleave(4, 1)[:10, :7]
    assert masks.largest_block(pruned)[:2] == (4, 4)
    moved = torch.stack([tickets.shuffle({"layer": pruned}, seed)["layer"] != pruned for seed in range(20)]).any(0)
    assert moved[:8].all()  # the last row of blocks has one block of each size, which cannot move
    assert not moved[8:].any()


def network() -> nn.Module:
    """A weight that two layers share, a grouped convolution and a linear layer."""
    model = nn.Sequential(
        nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 24, 3, groups=4), nn.Flatten(), nn.Linear(24, 20)
    )
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("block", [(16, 16), (3, 5), (5, 1, 3, 1), "filter", "channel"])
def test_a_given_block_is_moved_as_a_whole(block):
    model = network()
    pruned = masks.prune(model, 0.3, block, scope="uniform", linear=True)
    shuffled = tickets.shuffle(pruned, 0, block, model)
    assert {name: int(mask.sum()) for name, mask in shuffled.items()} == {
        name: int(mask.sum()) for name, mask in pruned.items()
    }
    assert block == (16, 16) or all(not shuffled[name].equal(pruned[name]) for name in pruned)

    def keep(name, weight):
        return shuffled[name].float()

    # Whole blocks are kept whole if they have the scores 1 and 0.
    again = masks.prune(model, 0.3, block, scope="uniform", score=keep, linear=True)
    assert all(again[name].equal(mask) for name, mask in shuffled.items())


def test_layers_that_share_a_weight_get_one_shuffled_mask():
    model = network()
    pruned = masks.prune(model, 0.3, linear=True)
    assert not tickets.shuffle(pruned, 0)["0"].equal(tickets.shuffle(pruned, 0)["1"])
    shuffled = tickets.shuffle(pruned, 0, model=model)
    assert shuffled["0"].equal(shuffled["1"]) and not shuffled["0"].equal(pruned["0"])
    sparsify(model, shuffled)


def test_a_block_that_a_mask_disobeys_or_that_does_not_exist_is_refused():
    pruned = masks.prune(network(), 0.3)
    with pytest.raises(ValueError, match=r"block must be one that the mask of '0' obeys, got 'filter'"):
        tickets.shuffle(pruned, 0, "filter")
    with pytest.raises(ValueError, match="block must be a block shape or one of filter, channel, got 'column'"):
        tickets.shuffle(pruned, 0, "column")
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        tickets.shuffle({"0": torch.ones(2, 2)}, 0, (1, 1))


@pytest.mark.parametrize("example_input", [(1, 1, 4, 4), torch.zeros(3, 1, 4, 4)], ids=["shape", "images"])
@pytest.mark.parametrize("weights", [True, False])
def test_channels_of_empty_filters_are_zero_whatever_the_weights(weights, example_input):
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    ticket = masks.Ticket({"0": torch.arange(4)[:, None, None, None].expand(4, 1, 3, 3) > 1}, model.state_dict(), {})
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    tickets.restore(other, ticket, example_input, weights=weights)
    assert other[1].weight.tolist() == [0, 0, 1, 1] and not other[1].bias.any()


def test_a_control_with_the_weights_of_the_ticket_is_refused_and_the_model_unchanged():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    ticket = masks.Ticket(masks.prune(model, 0.5, linear=True), copy.deepcopy(model.state_dict()), {})
    with torch.no_grad():
        model[0].weight[~ticket.masks["0"]] = 7  # no mask keeps these
    with pytest.raises(ValueError, match="model has the ticket's weights, which weights=False is to replace"):
        tickets.restore(model, ticket, (1, 1, 4, 4), weights=False)
    assert type(model[0]) is nn.Conv2d
    nn.init.normal_(model[2].weight)  # one layer with fresh weights is another network
    tickets.restore(model, ticket, (1, 1, 4, 4), weights=False)
    nothing = masks.Ticket({"0": torch.zeros(4, 1, 3, 3, dtype=torch.bool)}, ticket.state_dict, {})
    fresh = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    assert tickets.restore(fresh, nothing, (1, 1, 4, 4), weights=False)[0].density == 0


def problem() -> tuple[nn.Module, masks.Ticket]:
    """A model, and a ticket with other weights."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    other = copy.deepcopy(model)
    nn.init.normal_(other[0].weight)
    return model, masks.Ticket(masks.prune(other, 0.5, block=(1, 1, 3, 3)), other.state_dict())


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("changes", "example_input", "error", "message"),
    [
        ({"masks": {"0": torch.ones(4, 1, 3, 3)}}, (1, 1, 4, 4), TypeError, "mask must be a bool tensor"),
        ({"masks": {"1": torch.ones(4, dtype=torch.bool)}}, (1, 1, 4, 4), ValueError, r"or \[K, C\], got \(4,\)"),
        ({"masks": {"9": torch.ones(4, 1, dtype=torch.bool)}}, (1, 1, 4, 4), ValueError, "must have '9.weight'"),
        ({"state_dict": {"0.weight": torch.ones(4, 1, 3, 3)}}, (1, 1, 4, 4), ValueError, "it lacks '0.bias'"),
        ({"extra": {"0._extra_state": 3}}, (1, 1, 4, 4), ValueError, "got '0._extra_state', a int"),
        ({}, (1, 2, 4, 4), (ValueError, RuntimeError), "channels"),
    ],
)
def test_a_ticket_that_does_not_fit_leaves_the_model_unchanged(changes, example_input, error, message, weights):
    model, ticket = problem()
    changes = dict(changes)
    if extra := changes.pop("extra", None):
        changes["state_dict"] = ticket.state_dict | extra
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        tickets.restore(model, replace(ticket, **changes), example_input, weights=weights)
    assert type(model[0]) is nn.Conv2d
    after = model.state_dict()
    assert after.keys() == before.keys() and all(after[key].equal(before[key]) for key in before)


def test_masks_that_differ_for_a_shared_weight_leave_the_model_unchanged():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1))
    model[1].weight = model[0].weight
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    kept = {"0": torch.ones(2, 2, 3, 3, dtype=torch.bool), "1": torch.zeros(2, 2, 3, 3, dtype=torch.bool)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="weight"):
        tickets.restore(model, masks.Ticket(kept, state), (1, 2, 4, 4))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_of_the_ticket_are_known_in_another_precision(dtype):
    model, ticket = problem()
    model.load_state_dict(ticket.state_dict)
    with pytest.raises(ValueError, match="model has the ticket's weights"):
        tickets.restore(model.to(dtype), ticket, torch.zeros(1, 1, 4, 4, dtype=dtype), weights=False)


def test_a_mask_to_shuffle_of_another_model_is_refused():
    with pytest.raises(ValueError, match="model has no module 'foo'"):
        tickets.shuffle({"foo": torch.ones(4, 4, dtype=torch.bool)}, 0, model=network())


def test_a_restored_channel_is_zeroed_whatever_the_bias_of_its_filter():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    kept = masks.prune(model, 0.5, block="filter")
    tickets.restore(model, masks.Ticket(kept, model.state_dict(), {}), (1, 1, 4, 4))
    assert model[0].bias.all()
    assert torch.equal(model[1].weight != 0, kept["0"].flatten(1).any(1))
