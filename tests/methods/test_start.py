"""What a method starts from: random masks, rescaled weights, or the masks that a model has already."""

import pytest
import torch
from helpers.sparse_runs import odd_network, run
from torch import nn

from sparse_adv import masks, methods, tickets
from sparse_adv.methods import MethodConfig, SparseTraining
from sparse_adv.nn import MaskedConv2d, sparsify


def test_random_masks_keep_small_blocks_as_often_as_others():
    model = nn.Sequential(nn.Linear(400, 10), nn.ReLU(), nn.Linear(10, 9, bias=False))
    mask = methods.random_masks(model, MethodConfig("static", density=0.3, block=(4, 4), scope="uniform"), seed=0)["0"]
    assert mask[8:].float().mean() == pytest.approx(0.3, abs=0.1)


def test_filters_that_a_ticket_lacks_are_trained_where_they_may_grow():
    """Their BatchNorm channels, which restore keeps at 0, would take the gradient from what grows before them."""
    torch.manual_seed(0)
    kept = masks.prune(model := odd_network(), 0.5, "filter", scope="uniform")
    ticket = masks.Ticket(kept, model.state_dict(), {})
    for method in ("static", "set"):
        model = tickets.restore(odd_network(), ticket, (1, 1, 6, 6))
        dead = model[1].weight == 0
        assert dead.any()
        run(hook := SparseTraining(MethodConfig(method, interval=2)), model)
        grown = hook.masks()["0"].flatten(1).any(1) & dead
        assert grown.any() == (method == "set")
        assert (model[1].weight != 0).equal(~dead | (method == "set"))
        assert (model[0].weight[grown] != 0).any() == (method == "set")


def test_layers_that_the_method_leaves_out_stay_dense():
    model, _ = run(SparseTraining(MethodConfig("rigl", density=0.3, linear=False)))
    assert isinstance(model[0], MaskedConv2d) and type(model[6]) is nn.Linear


def test_a_model_with_masks_starts_from_them():
    model = odd_network()
    sparsify(model, {"3": torch.rand(7, 5, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5})
    kept = int(model[3].weight_mask.sum())
    run(SparseTraining(MethodConfig("rigl", density=0.1, interval=2)), model)
    assert int(model[3].weight_mask.sum()) == kept and type(model[0]) is nn.Conv2d


def test_masks_that_disobey_the_block_are_refused():
    model = odd_network()
    sparsify(model, {"8": torch.tensor([[True, False, True, True, True, True]] * 2)})
    with pytest.raises(ValueError, match=r"module '8': mask does not obey block \(2, 2, 1, 1\)"):
        run(SparseTraining(MethodConfig("rigl", block=(2, 2))), model)


def test_rescaled_weights_give_each_output_channel_its_variance():
    model, config = odd_network(), MethodConfig("static", density=0.3, rescale_init=True)
    dense = model[3].weight.detach().clone()
    layer = methods.start(model, config, seed=0)[3]
    kept = layer.weight_mask.sum((1, 2, 3), keepdim=True)
    expected = torch.where(layer.weight_mask, dense * (45 / kept).sqrt(), 0)
    assert torch.allclose(layer.weight, expected)


def test_a_weight_that_two_layers_share_is_rescaled_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    dense = model[0].weight.detach().clone()
    first = methods.start(model, MethodConfig("static", density=0.5, rescale_init=True), seed=0)[0]
    kept = first.weight_mask.sum(1, keepdim=True)
    assert torch.allclose(first.weight, torch.where(first.weight_mask, dense * (8 / kept).sqrt(), 0))


def test_a_configuration_without_a_method_is_refused():
    with pytest.raises(ValueError, match="method must name a method, got 'none'"):
        methods.start(nn.Sequential(nn.Linear(8, 8)), MethodConfig(density=0.5), seed=0)
