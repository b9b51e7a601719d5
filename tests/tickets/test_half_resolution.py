"""Searches with images of half the resolution, which leave the network and its ticket as they are."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.small_runs import QUICK, TRAIN, VALIDATION, Batches, Stop, equal_states, network
from torch import nn

from sparse_adv import tickets
from sparse_adv.data import Split
from sparse_adv.tickets import PruneConfig
from sparse_adv.tickets.half_resolution import Halved, check_takes, half

CONFIG = replace(QUICK, objective="fgsm", epochs=2)


def pooled_network() -> nn.Module:
    *layers, _, _ = network(channels=8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def search(model, batches, validation=VALIDATION, folder=None, on_epoch=None, **pruning):
    pruning = PruneConfig(density=0.3, **pruning)
    return tickets.search(model, batches, CONFIG, pruning, validation=validation, folder=folder, on_epoch=on_epoch)


class HalvedByHand(Batches):
    def __iter__(self):
        return ((F.avg_pool2d(x, 2), y) for x, y in super().__iter__())


@pytest.mark.parametrize("permute", [{}, {"permute_channels": True, "block": (2, 2)}], ids=["", "permuted"])
def test_the_search_sees_images_averaged_over_squares(permute):
    ticket = search(pooled_network(), Batches(TRAIN, 32), half_resolution=True, **permute)
    validation = Split(F.avg_pool2d(VALIDATION.images.float() / 255, 2), VALIDATION.labels)
    expected = search(pooled_network(), HalvedByHand(TRAIN, 32), validation, **permute)
    assert equal_states(ticket.masks, expected.masks) and equal_states(ticket.state_dict, expected.state_dict)
    record, by_hand = tickets.record_of(ticket), tickets.record_of(expected)
    assert [epoch.robust_accuracy for epoch in record.epochs] == [epoch.robust_accuracy for epoch in by_hand.epochs]
    assert record.cost.macs == by_hand.cost.macs and record.prune.half_resolution


def test_validation_images_in_batches_are_averaged_over_squares_too():
    whole, batched = (
        tickets.record_of(search(pooled_network(), Batches(TRAIN, 32), images, half_resolution=True)).epochs
        for images in (VALIDATION, list(Batches(VALIDATION, 40, shuffle=False)))
    )
    for epoch, other in zip(whole, batched, strict=True):
        assert epoch.clean_accuracy == other.clean_accuracy and epoch.robust_accuracy == other.robust_accuracy


def test_the_cost_is_that_of_small_images():
    whole, halved = (
        tickets.cost_of(search(pooled_network(), Batches(TRAIN, 32), half_resolution=chosen)).macs
        for chosen in (False, True)
    )
    assert 0.25 < halved / whole < 0.26  # the linear layer costs the same


def test_a_network_that_depends_on_the_size_of_images_is_refused_before_anything_is_written(tmp_path):
    refusal = r"its linear layer '7' takes 144 inputs, but gets 36 from images of 3 x 3 pixels"
    with pytest.raises(ValueError, match=refusal):
        search(network(), Batches(TRAIN, 32), folder=tmp_path / "run", half_resolution=True)
    assert not (tmp_path / "run").exists()
    pool = nn.Sequential(nn.MaxPool2d(6), *pooled_network())
    with pytest.raises(ValueError, match="half_resolution does not fit the model for images of 3 x 3 pixels: "):
        search(pool, Batches(TRAIN, 32), half_resolution=True)
    points = Split(torch.rand(8, 1, 1, 6), torch.arange(8) % 2)
    with pytest.raises(ValueError, match="half_resolution needs images of at least 2 x 2 pixels"):
        search(pooled_network(), Batches(points, 4), half_resolution=True)


def test_a_stopped_search_finds_the_same_ticket(tmp_path):
    def stop(record):
        raise Stop

    expected = search(pooled_network(), Batches(TRAIN, 32), half_resolution=True)
    with pytest.raises(Stop):
        search(pooled_network(), Batches(TRAIN, 32), folder=tmp_path, on_epoch=stop, half_resolution=True)
    ticket = search(pooled_network(), Batches(TRAIN, 32), folder=tmp_path, half_resolution=True)
    assert equal_states(ticket.masks, expected.masks)
    assert tickets.record_of(ticket).epochs[-1].loss == tickets.record_of(expected).epochs[-1].loss


def test_a_last_odd_row_and_column_are_left_out():
    images = torch.arange(15, dtype=torch.float32).view(1, 1, 3, 5) / 15
    assert half(images).mul(15).tolist() == [[[[3.0, 5.0]]]]


def test_halved_batches_are_shuffled_anew_in_each_epoch():
    batches = Batches(TRAIN, 32)
    halved = Halved(batches)
    halved.set_epoch(5)
    assert batches.epoch == 5 and len(halved) == len(batches)


def test_a_linear_layer_reads_the_last_dimension_whatever_the_others_are():
    class ByPixel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x.movedim(1, -1)).mean((1, 2))

    model = ByPixel()
    check_takes(model, (1, 3, 4, 4))
    with pytest.raises(ValueError, match="'layer' takes 3 inputs, but gets 4"):
        check_takes(model, (1, 4, 3, 3))
    with pytest.raises(RuntimeError):  # PyTorch's own error: the check has left nothing behind
        model(torch.rand(1, 4, 3, 3))


def test_halved_batches_can_be_copied_and_pickled():
    halved = Halved(Batches(TRAIN, 32))
    for copied in (copy.copy(halved), copy.deepcopy(halved), pickle.loads(pickle.dumps(halved))):
        assert [images.shape for images, _ in copied] == [images.shape for images, _ in halved]
