"""A search on a network in which two layers have one weight."""

from dataclasses import replace

import pytest
from helpers.small_runs import VALIDATION, WITH_ENGINE, batches, network
from torch import nn

from sparse_adv import masks, tickets, training
from sparse_adv.nn import explain
from sparse_adv.tickets import PruneConfig

CONFIG = replace(WITH_ENGINE, objective="fgsm-rs", epochs=2)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_weight_that_layers_share_counts_once(tmp_path, rounds):
    model = network()
    model.insert(6, nn.Conv2d(4, 4, 3, padding=1, bias=False))
    model[6].weight = model[3].weight
    weights = sum(layer.weight.numel() for layer in (model[0], model[3], model[8]))
    pruning = PruneConfig(density=0.3, rounds=rounds, linear=True)
    ticket = tickets.search(model, batches(), CONFIG, pruning, validation=VALIDATION, folder=tmp_path)
    done = tickets.record_of(ticket).checks
    assert (done.weights, done.weights_kept) == (weights, round(0.3 * weights)) and model[6].weight is model[3].weight
    assert ticket.masks["3"].equal(ticket.masks["6"])
    density = done.weights_kept / weights
    assert density == ticket.provenance["density"] == masks.density(ticket.masks, model) != masks.density(ticket.masks)
    sparse = tickets.restore(model, ticket, (1, 1, 6, 6))
    assert explain(sparse).density == density
    assert training.train(sparse, batches(), CONFIG)[-1].density.weights == density
