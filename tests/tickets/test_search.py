"""Ticket search: it returns to the initial weights, its masks are those configured, its checks detect defects."""

import copy
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import (
    QUICK,
    TRAIN,
    VALIDATION,
    Stop,
    batches,
    equal_states,
    network,
    stop_after,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import json_files, masks, runs, tickets, training
from sparse_adv.nn import MaskedConv2d, mac_density, sparsify
from sparse_adv.runs import Cost, Density, SearchResult, TicketChecks
from sparse_adv.tickets import PruneConfig, TicketInvariantError, checks

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=2)
SHAPE = (1, 1, 6, 6)


def search(folder=None, config=CONFIG, model=None, on_epoch=None, **pruning):
    model, watch = network() if model is None else model, {"validation": VALIDATION, "on_epoch": on_epoch}
    return tickets.search(model, batches(), config, PruneConfig(**pruning), folder=folder, **watch), model


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_search_ends_with_the_initial_weights(rounds):
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
        training.train(model, batches(), CONFIG, validation=VALIDATION)
        expected = masks.prune(model, 0.3, score="relative_magnitude", linear=linear)
        assert equal_states(ticket.masks, expected)
    else:
        assert not equal_states(ticket.masks, search(density=0.3, linear=linear)[0].masks)


def test_the_ticket_records_configurations_epochs_cost_and_checks():
    ticket, _ = search(density=0.3, rounds=2)
    record = tickets.record_of(ticket)
    assert [(epoch.round, epoch.epoch) for epoch in record.epochs] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    assert record.train == CONFIG and record.prune == PruneConfig(density=0.3, rounds=2)
    assert record.checks == TicketChecks(
        reset=True, pruned_weights_zero=True, nested=True, weights=468, weights_kept=140, weights_requested=140
    )
    first, last = record.epochs[0], record.epochs[-1]
    assert first.density.weights == 1 and last.density.weights == pytest.approx(0.3**0.5, abs=0.01)
    assert record.cost.seconds >= last.total.seconds > first.total.seconds and record.cost.macs == last.total.macs
    assert tickets.cost_of(ticket) == record.cost


def test_the_time_of_pruning_is_a_cost(monkeypatch):
    prune = masks.prune
    monkeypatch.setattr(masks, "prune", lambda *args, **options: time.sleep(0.05) or prune(*args, **options))
    record = tickets.record_of(search(density=0.3)[0])
    assert record.cost.seconds >= record.epochs[-1].total.seconds + 0.05


def test_a_ticket_from_elsewhere_has_no_record_and_no_cost():
    ticket = masks.Ticket({}, {}, {"arch": "vgg16"})
    assert tickets.cost_of(ticket) == Cost()
    with pytest.raises(ValueError, match="the provenance of the ticket lacks the key 'train'"):
        tickets.record_of(ticket)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_channel_permutation_applies_to_masks_and_initial_weights(rounds):
    pruning = {"density": 0.3, "block": (2, 2), "scope": "uniform"}
    start = network(channels=8)
    ticket, searched = search(model=network(channels=8), permute_channels=True, rounds=rounds, **pruning)
    assert equal_states(searched.state_dict(), start.state_dict())
    assert not equal_states(ticket.state_dict, start.state_dict())
    x = torch.rand(3, 1, 6, 6)
    reordered = network(channels=8)
    reordered.load_state_dict(ticket.state_dict)
    torch.testing.assert_close(reordered.eval()(x), start.eval()(x))
    before, after = tickets.record_of(ticket).checks.retained
    assert before < after < 1
    if rounds == 1:  # the masks are those of the trained network, with its channels in the same order
        model = network(channels=8)
        training.train(model, batches(), CONFIG, validation=VALIDATION)
        order = masks.permute_channels(model, example_input=SHAPE, score="relative_magnitude", linear=True, **pruning)
        order.apply(model)
        assert equal_states(ticket.masks, masks.prune(model, score="relative_magnitude", linear=True, **pruning))
        assert equal_states(ticket.state_dict, order.permute_state_dict(start.state_dict()))
    sparse = tickets.restore(network(seed=3, channels=8), ticket, SHAPE)
    assert sparse[3].weight_mask.equal(ticket.masks["3"])


@pytest.fixture(
    scope="module",
    params=[
        {"rounds": 3, "rewind_step": 2},
        {"rounds": 2, "early_stop_distance": 0.55},
        {"rounds": 3, "rewind_step": 2, "permute_channels": True, "block": (2, 2)},
    ],
    ids=lambda pruning: "-".join(pruning),
)
def whole(request, tmp_path_factory):
    """Pruning, recipe, ticket and folder of a search that was not stopped."""
    config = replace(CONFIG, epochs=2 if "rewind_step" in request.param else 7)
    folder = tmp_path_factory.mktemp("search") / "whole"
    ticket, _ = search(folder, config, density=0.3, **request.param)
    return request.param, config, ticket, folder


def test_a_search_that_is_stopped_after_each_epoch_finds_the_same_ticket(tmp_path, whole):
    pruning, config, expected, folder = whole
    for stop_at in range(1, 7):

        def on_epoch(record, stop_at=stop_at):
            if record.epoch == stop_at:
                raise Stop

        with pytest.raises(Stop):
            search(tmp_path, config, on_epoch=on_epoch, density=0.3, **pruning)
    ticket, _ = search(tmp_path, config, density=0.3, **pruning)
    assert equal_states(ticket.masks, expected.masks) and equal_states(ticket.state_dict, expected.state_dict)
    records = [runs.read(run).records for run in (folder, tmp_path)]
    assert [record.loss for record in records[0]] == [record.loss for record in records[1]]
    assert [record.mask_distance for record in records[0]] == [record.mask_distance for record in records[1]]
    totals = [[record.total.macs for record in each] for each in records]
    assert totals[0] == totals[1] and tickets.cost_of(ticket).macs == tickets.cost_of(expected).macs == totals[0][-1]
    assert tickets.record_of(ticket).checks == tickets.record_of(expected).checks


def test_a_search_that_stops_in_a_later_round_keeps_the_cost_of_the_rounds_before(tmp_path):
    expected, _ = search(rounds=2)
    steps = []

    def on_step(step):
        steps.append(step)
        if len(steps) == 8:  # round 1 has 6
            raise Stop

    with pytest.raises(Stop):
        pruning = PruneConfig(rounds=2)
        tickets.search(network(), batches(), CONFIG, pruning, validation=VALIDATION, folder=tmp_path, on_step=on_step)
    ticket, _ = search(tmp_path, rounds=2)
    record, whole = tickets.record_of(ticket), tickets.record_of(expected)
    assert steps[5:] == [6, 1, 2] and record.checks == whole.checks
    assert [epoch.total.macs for epoch in record.epochs] == [epoch.total.macs for epoch in whole.epochs]
    assert record.cost.macs == whole.cost.macs == record.epochs[-1].total.macs
    spent = sum(((epoch.attack + epoch.update).macs for epoch in record.epochs), 0)
    assert spent == record.cost.macs


def test_frozen_layers_are_frozen_in_every_round():
    model, modes = network(), []
    model[1].eval()
    start = copy.deepcopy(model[1].state_dict())

    def on_step(step):
        modes.append([model[i].training for i in (0, 1, 4)])
        assert all(value.equal(start[name]) for name, value in model[1].named_buffers())

    tickets.search(model, batches(), CONFIG, PruneConfig(rounds=2), validation=VALIDATION, on_step=on_step)
    assert modes == [[True, False, True]] * 12


def test_a_finished_search_returns_without_training(tmp_path):
    first, _ = search(tmp_path)
    result = runs.read(tmp_path).result
    (tmp_path / runs.RESULT).unlink()  # as if the search had been stopped before its last file
    epochs = []
    again = tickets.search(
        network(), batches(), CONFIG, PruneConfig(), validation=VALIDATION, folder=tmp_path, on_epoch=epochs.append
    )
    assert equal_states(first.masks, again.masks) and not epochs
    assert runs.read(tmp_path).result == result


@pytest.mark.parametrize("pruning", [{"linear": False}, {"rounds": 2}])
def test_the_result_of_a_search_has_its_cost_checks_and_densities(tmp_path, pruning):
    ticket, model = search(tmp_path, density=0.3, **pruning)
    record = tickets.record_of(ticket)
    densities = Density(masks.density(ticket.masks), mac_density(model, ticket.masks, (1, 1, 6, 6)))
    assert runs.read(tmp_path).result == SearchResult(record.cost, record.checks, densities)


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_holds_one_search(tmp_path, finished):
    def on_epoch(record):
        if not finished:
            raise Stop

    def begin(model=None, images=None, validation=VALIDATION, config=CONFIG, **pruning):
        arguments = model or network(), images or batches(), config, PruneConfig(**pruning)
        return tickets.search(*arguments, validation=validation, folder=tmp_path, on_epoch=on_epoch)

    with nullcontext() if finished else pytest.raises(Stop):
        begin()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    sparse = sparsify(network(), masks.prune(network(), 0.5))
    darker = [(0.5 * x, y) for x, y in batches(shuffle=False)]
    for settings, said in (
        ({"density": 0.5}, r"prune.density 0.2, now 0.5"),
        ({"config": replace(CONFIG, lr=0.5)}, r"train.lr 0.1, now 0.5"),
        ({"model": network(seed=5)}, "other initial weights"),
        ({"model": network(channels=8)}, "other network"),
        ({"model": sparse}, "other network"),
        ({"images": batches(16)}, "other training images"),
        ({"images": darker}, "other training images"),
        ({"validation": None}, "other validation images"),
    ):
        with pytest.raises(ValueError, match=said):
            begin(**settings)
    assert files == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    if finished:
        info, faster = runs.read(tmp_path).info, replace(CONFIG, lr=0.5)
        for settings, changed, name in (
            ({"density": 0.5}, {"prune": replace(info.prune, density=0.5)}, "pruning"),
            ({"config": faster}, {"train": faster}, "training"),
        ):
            json_files.write(tmp_path / runs.INFO, replace(info, **changed))
            with pytest.raises(ValueError, match=f"a ticket of another {name} configuration"):
                begin(**settings)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_the_model_of_an_interrupted_search_continues_it(tmp_path, stop_at):
    expected, _ = search(rounds=2)
    model = network()

    with pytest.raises(Stop):
        tickets.search(
            model,
            batches(),
            CONFIG,
            PruneConfig(rounds=2),
            validation=VALIDATION,
            folder=tmp_path,
            on_epoch=stop_after(stop_at),
        )
    ticket, _ = search(tmp_path, model=model, rounds=2)
    assert equal_states(ticket.masks, expected.masks) and equal_states(ticket.state_dict, expected.state_dict)


def test_a_search_that_stops_between_two_rounds_goes_on_with_the_order_of_the_images(tmp_path):
    def loader():
        images = TensorDataset(TRAIN.images.float() / 255, TRAIN.labels)
        return DataLoader(images, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))

    def run(folder=None, on_step=None):
        return tickets.search(network(), loader(), CONFIG, PruneConfig(rounds=2), folder=folder, on_step=on_step)

    expected, first_round, steps = run(), CONFIG.epochs * len(loader()), []

    def stop(step):
        steps.append(step)
        if len(steps) > first_round:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path, stop)
    assert (tmp_path / "round_1" / runs.TICKET).exists() and not (tmp_path / "round_2" / runs.STATE).exists()
    ticket = run(tmp_path)
    assert equal_states(ticket.masks, expected.masks)
    losses = [[epoch["loss"] for epoch in found.provenance["epochs"]] for found in (ticket, expected)]
    assert losses[0] == losses[1]


def test_only_the_masks_of_the_trained_network_are_told_to_be_empty(caplog):
    tickets.search(network(), batches(), CONFIG, PruneConfig(density=0.001))
    assert [record.getMessage().startswith("prune keeps no weight of") for record in caplog.records] == [True]


def test_checks_detect_broken_invariants():
    model = network()
    half = masks.prune(model, 0.5)
    start = copy.deepcopy(model.state_dict())
    checks.check_reset(model, start)
    sparsify(model, half)
    checks.check_pruned_weights(model, half)
    with torch.no_grad():
        model[3].weight[~half["3"]] = 1.0
    with pytest.raises(TicketInvariantError, match=r"pruned weights of '3' are not zero"):
        checks.check_pruned_weights(model, half)
    with pytest.raises(TicketInvariantError, match="a later round keeps them"):
        checks.check_nested({name: ~mask for name, mask in half.items()}, half)
    with pytest.raises(TicketInvariantError, match=r"90 of 180 weights are kept, 36 were requested"):
        checks.check_density(half, PruneConfig(density=0.2), 1)
    other = network()
    other[1].running_mean += 1
    with pytest.raises(TicketInvariantError, match=r"the reset missed \['1.running_mean'\]"):
        checks.check_reset(other, start)


def test_a_score_that_prefers_pruned_weights_brings_none_back():
    kept = []
    for rounds in (1, 2):
        ticket, _ = search(
            rounds=rounds, score=lambda name, weight: 1 / (1 + weight.abs()), density=0.3 ** (rounds / 2)
        )
        kept.append(ticket.masks)
    assert all((kept[0][name] | ~kept[1][name]).all() for name in kept[0])
    assert masks.density(kept[1]) == pytest.approx(0.3, abs=0.005)
    with pytest.raises(TicketInvariantError, match="weights of '0' were pruned before, but a later round keeps them"):
        checks.check_nested(kept[0], kept[1])


def test_restore_turns_a_dense_model_into_the_sparse_network():
    ticket, _ = search(density=0.3)
    sparse = tickets.restore(network(seed=3), ticket, SHAPE)
    start = network().state_dict()
    for name, mask in ticket.masks.items():
        layer = sparse.get_submodule(name)
        assert layer.weight_mask.equal(mask) and layer.weight.equal(start[f"{name}.weight"] * mask)
    fresh = tickets.restore(network(seed=3), ticket, SHAPE, weights=False)
    assert fresh[3].weight.equal(network(seed=3)[3].weight * ticket.masks["3"])


@pytest.mark.parametrize("weights", [True, False])
def test_channels_of_fully_pruned_filters_stay_zero_in_training(weights):
    ticket, _ = search(density=0.3)
    ticket.masks["3"][1] = False
    model = tickets.restore(network(seed=3), ticket, SHAPE, weights=weights)
    training.train(model, batches(), CONFIG)
    assert model[4].weight[1] == 0 and model[4].bias[1] == 0 and model[4].bias[0] != 0
    tickets.check_pruned_weights(model, ticket.masks)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: network(channels=6), r"its '0\.weight' is \(4, 1, 3, 3\), the model's \(6, 1, 3, 3\)"),
        (lambda: network()[:7], r"it has '7\.weight', which the model lacks"),
        (lambda: nn.Sequential(*network(), nn.Linear(2, 2)), r"it lacks '8\.weight'"),
    ],
)
def test_a_ticket_for_another_architecture_is_refused_and_the_model_unchanged(other, difference):
    ticket, _ = search()
    model = other()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"the ticket is for another architecture: {difference}"):
        tickets.restore(model, ticket, SHAPE)
    assert equal_states(before, model.state_dict())


@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_rounds_are_nested_where_blocks_do_not_divide_the_layers(scope):
    """With a score that prefers what was pruned, and rounds that differ by less than a block."""
    pruning = {"block": (4, 4), "scope": scope, "score": lambda name, weight: (weight == 0) + weight.abs()}
    for density, rounds in ((0.85, 3), (0.3, 3)):
        ticket, _ = search(density=density, rounds=rounds, **pruning)
        checks = tickets.record_of(ticket).checks
        assert checks.nested and abs(checks.weights_kept - checks.weights_requested) <= 16 * len(ticket.masks)
