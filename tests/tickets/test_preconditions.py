"""What a search cannot use is refused before any training."""

from dataclasses import replace

import pytest
from helpers.small_runs import QUICK, ExtraState, Untraceable, batches, network
from torch import nn

from sparse_adv import tickets
from sparse_adv.tickets import PruneConfig

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)


def search(model, **arguments):
    tickets.search(model, batches(), CONFIG, **arguments, on_step=lambda step: pytest.fail("it was trained"))


def test_a_model_that_cannot_be_traced_for_a_channel_permutation_is_refused():
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace"):
        search(Untraceable(*network()), prune_config=PruneConfig(permute_channels=True))


def test_a_pruning_configuration_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"score must be a function or one of .*, got 'taylor'"):
        search(network(), prune_config=PruneConfig(score="taylor"))


def test_weights_that_cannot_be_ranked_are_refused():
    model = network()
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(ValueError, match="score of '0' must not be NaN"):
        search(model)


@pytest.mark.parametrize(
    ("metadata", "error", "said"),
    [
        ({"note": {1, 2}}, ValueError, "metadata must be JSON data: Object of type set"),
        ({"note": float("nan")}, ValueError, "metadata must be JSON data"),
        ({"epochs": 3}, ValueError, "metadata must not have the key 'epochs'"),
        ("note", TypeError, "metadata must be of type dict or None, got 'note'"),
    ],
)
def test_metadata_that_a_ticket_cannot_hold_are_refused(metadata, error, said):
    with pytest.raises(error, match=said):
        search(network(), metadata=metadata)


def test_a_model_with_extra_state_is_refused():
    with pytest.raises(ValueError, match=r"state_dict must hold tensors alone, got '8._extra_state', a dict"):
        search(nn.Sequential(*network(), ExtraState()))
