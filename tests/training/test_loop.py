"""Training: what a run records, that it learns, that it repeats, and what it refuses."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers.cpu_graphs import CpuGraphs, no_synchronisation
from helpers.small_runs import QUICK, TEST, TRAIN, VALIDATION, batches, equal_states, network
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import attacks, data, masks, nn, runs, sparsify, training
from sparse_adv.training import checkpoint, devices, evaluation, loop


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_every_objective_learns_an_easy_task(objective):
    recipe = replace(QUICK, objective=objective, replays=2)
    records = training.train(network(), batches(), recipe, validation=VALIDATION)
    assert records[-1]["clean_accuracy"] > 0.9
    assert records[-1]["loss"] < records[0]["loss"]


def test_records_count_epochs_updates_and_costs():
    seen = []
    records = training.train(
        network(), batches(), replace(QUICK, objective="pgd"), on_epoch=seen.append, before=(10.0, 1000)
    )
    assert seen == records
    assert [(record["epoch"], record["step"], record["images"]) for record in records] == [
        (1, 3, 96),
        (2, 6, 96),
        (3, 9, 96),
    ]
    for unit, before in (("seconds", 10.0), ("multiply_adds", 1000)):
        spent = sum(record[f"{phase}_{unit}"] for record in records for phase in ("attack", "update"))
        assert math.isclose(records[-1][unit], before + spent) and records[0][f"attack_{unit}"] > 0


@pytest.mark.parametrize(
    ("objective", "attack", "update"),
    [
        ("natural", (0, 0), (1, 0)),
        ("fgsm-rs", (1, 1), (1, 0)),
        ("pgd", (2, 2), (1, 0)),
        ("trades", (3, 2), (2, 0)),
        ("free", (0, 0), (2, 2)),
    ],
)
def test_executed_multiply_adds_follow_from_the_passes(objective, attack, update):
    """For each image: forward and backward passes of the attack; updates, and how many go on to the image."""
    model = network()
    (record,) = training.train(model, batches(), replace(QUICK, objective=objective, epochs=1, replays=2))
    work = nn.count_macs(model, (32, 1, 6, 6)).per_image()
    whole = work.forward + work.grad_weight + work.grad_input - work.first_grad_input
    assert record["attack_multiply_adds"] == 96 * (attack[0] * work.forward + attack[1] * work.grad_input)
    assert record["update_multiply_adds"] == 96 * (update[0] * whole + update[1] * work.first_grad_input)


def test_evaluations_come_when_asked_and_always_at_the_end():
    recipe = replace(QUICK, epochs=5, evaluate_every=2)
    records = training.train(network(), batches(), recipe, validation=VALIDATION)
    assert [record["epoch"] for record in records if "robust_accuracy" in record] == [2, 4, 5]


@pytest.mark.parametrize("objective", ["n-fgsm", "free", "trades"])
def test_a_run_repeats_bit_for_bit_and_leaves_the_global_generator_alone(objective):
    recipe = replace(QUICK, objective=objective, epochs=2, ema_decay=0.9)
    models = [network(), network()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for model in models:
        training.train(model, batches(), recipe, validation=VALIDATION)
        assert torch.get_rng_state().equal(before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert equal_states(models[0].state_dict(), models[1].state_dict())


def test_seeds_change_the_attack_and_the_order():
    weights = []
    for seed, order in ((0, 0), (1, 0), (0, 1)):
        model = network()
        recipe = replace(QUICK, objective="fgsm-rs", seed=seed, epochs=1)
        training.train(model, batches(seed=order), recipe)
        weights.append(model[0].weight.detach())
    assert not weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_any_iterable_with_a_length_will_do():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    runs = []
    for given in (DataLoader(images, 32), list(DataLoader(images, 32)), batches(shuffle=False)):
        model = network()
        training.train(model, given, QUICK)
        runs.append(model.state_dict())
    assert equal_states(runs[0], runs[1]) and equal_states(runs[0], runs[2])


def test_a_dataloader_shuffles_alike_in_every_run():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    runs = []
    for _ in range(2):
        model = network()
        training.train(model, DataLoader(images, 32, shuffle=True), QUICK)
        runs.append(model.state_dict())
    assert equal_states(*runs)


def test_batches_without_a_length_are_refused():
    with pytest.raises(TypeError, match=r"batches must have a length.*got generator"):
        training.train(network(), (batch for batch in batches()), QUICK)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        training.train(network(), [], QUICK)


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.full((4, 1, 6, 6), 2.0), torch.zeros(4, dtype=torch.int64), r"images must lie in \[0, 1\]"),
        (torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64), "images must be finite"),
        (torch.zeros(4, 1, 6, 6), torch.zeros(3, dtype=torch.int64), "one label per image"),
        (torch.zeros(4, 1, 6, 6, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "must be a floating point"),
    ],
)
@pytest.mark.parametrize("objective", ["natural", "fgsm", "free"])
def test_wrong_batches_are_named(images, labels, said, objective):
    with pytest.raises((ValueError, TypeError), match=said):
        training.train(network(), [(images, labels)], replace(QUICK, objective=objective))


def test_a_clipped_gradient_moves_the_weights_no_further():
    moved = []
    for clip in (0.0, 1e-3):
        model = network()
        start = copy.deepcopy(model.state_dict())
        training.train(model, batches(96), replace(QUICK, epochs=1, max_grad_norm=clip, momentum=0.0, weight_decay=0.0))
        step = [model.state_dict()[name] - start[name] for name, _ in model.named_parameters()]
        moved.append(torch.cat([part.flatten() for part in step]).norm().item())
    assert moved[1] == pytest.approx(0.1 * 1e-3, rel=1e-3) and moved[0] > 10 * moved[1]


def test_averaged_weights_are_the_mean_that_the_decay_says():
    model, steps = network(), []
    recipe = replace(QUICK, epochs=1, ema_decay=0.5)
    run = training.Training(model, batches(), recipe, on_step=lambda _: steps.append(model[0].weight.detach().clone()))
    list(run.epochs())
    assert torch.allclose(run.evaluated[0].weight, 0.25 * steps[0] + 0.25 * steps[1] + 0.5 * steps[2], atol=1e-6)
    assert run.evaluated is not model


def test_bfloat16_trains_with_weights_of_float32():
    model = network()
    records = training.train(model, batches(), replace(QUICK, precision="bfloat16", objective="pgd"), validation=TEST)
    assert records[-1]["clean_accuracy"] > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_diverged_run_stops_with_a_sentence():
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        training.train(network(), batches(), replace(QUICK, lr=1e30))


class Watched:
    """Batches among which, but for the first of a run, a context lasts: an epoch without its beginning and end."""

    def __init__(self, watch) -> None:
        self.batches, self.watch, self.seen = batches(augment=True), watch, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self):
        found = iter(self.batches)
        if not self.seen:
            yield next(found)
        self.seen += 1
        with self.watch():
            yield from found


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_within_an_epoch_nothing_waits_for_a_gpu(objective, monkeypatch):
    monkeypatch.setattr(loop, "reads_at_once", lambda device: False)
    recipe = replace(QUICK, objective=objective, epochs=2, ema_decay=0.5, max_grad_norm=1.0, replays=2)
    given = Watched(no_synchronisation)
    training.train(network(), given, recipe, validation=VALIDATION)
    assert given.seen == 2


def test_a_read_within_an_epoch_would_be_seen():
    with pytest.raises(RuntimeError, match="the host reads"):
        training.train(network(), Watched(no_synchronisation), QUICK)  # on a CPU batches are checked at once


@contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_within_an_epoch_nothing_waits_for_the_gpu(objective, precision):
    recipe = replace(
        QUICK, objective=objective, epochs=4, ema_decay=0.5, max_grad_norm=1.0, replays=2, precision=precision
    )
    recipe = replace(
        recipe, overfitting_monitor=False
    )  # it would repeat an epoch of a network that has learnt so little
    model, given = network().cuda(), Watched(waiting_is_an_error)
    sparsify(model, masks.prune(model, density=0.5))
    given.batches.split = TRAIN.to("cuda")
    records = training.train(model, given, recipe, validation=VALIDATION.to("cuda"))
    assert given.seen == len(records) == 4


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_graphs_change_no_bit_of_a_run(objective, sparse, monkeypatch):
    recipe = replace(QUICK, objective=objective, ema_decay=0.9, precision="bfloat16", replays=2)
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: False)
    found = []
    for graphs in (attacks.Graphs, CpuGraphs):
        monkeypatch.setattr(loop, "Graphs", graphs)
        model = network()
        if sparse:
            sparsify(model, masks.prune(model, density=0.5))
        run = training.Training(model, batches(40), recipe, validation=VALIDATION)
        records = [without_seconds(record) for record in run.epochs()]
        found.append((records, run.evaluated.state_dict()))
    assert found[0][0] == found[1][0] and equal_states(found[0][1], found[1][1])
    # Evaluation, probe, and the attack on full batches and on the last: the second is recorded, the third replayed.
    replays = {"natural": 1, "free": 2}.get(objective, 2 + 4 + 1)
    assert run.graphs.counts == (min(replays, 4), replays)


def without_seconds(record: dict) -> dict:
    return {name: value for name, value in record.items() if "seconds" not in name}


@pytest.mark.parametrize("objective", training.OBJECTIVES)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ((torch.full((4, 1, 6, 6), 2.0), torch.zeros(4, dtype=torch.int64)), r"images must lie in \[0, 1\].* to 2:"),
        ((torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64)), "images must be finite"),
        ((torch.zeros(4, 1, 6, 6), torch.full((4,), 2)), r"labels must lie in \[0, 1\], .*, got 0 to 2"),
        ((torch.zeros(4, 1, 6, 6), torch.full((4,), -100)), r"labels must lie in \[0, 1\], .*, got -100 to 1"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_wrong_values_in_a_later_batch_are_named_at_the_latest_when_the_epoch_ends(
    objective, wrong, said, at_once, monkeypatch, tmp_path
):
    monkeypatch.setattr(loop, "reads_at_once", lambda device: at_once)
    good = next(iter(batches()))
    said = said if not at_once else said.replace("got 0", "got 2").replace(" to 1", " to -100")
    with pytest.raises(ValueError, match=said):
        training.train(network(), [good, wrong, good], replace(QUICK, objective=objective), folder=tmp_path)
    assert not (tmp_path / runs.STATE).exists()


def test_channels_last_training_learns_and_continues_bit_for_bit(tmp_path, monkeypatch):
    recipe = replace(QUICK, objective="pgd", precision="bfloat16", ema_decay=0.5)
    options = {"validation": VALIDATION}
    monkeypatch.setattr(loop, "wants_channels_last", lambda device, precision: True)
    whole, stopped, other = network(channels=8), network(channels=8), network(channels=8)
    records = training.train(whole, batches(), recipe, folder=tmp_path / "whole", **options)
    for folder in ("stopped", "other"):
        training.train(network(channels=8), batches(), recipe, folder=tmp_path / folder, on_epoch=once, **options)
    training.train(stopped, batches(), recipe, folder=tmp_path / "stopped", **options)
    assert records[-1]["clean_accuracy"] > 0.9 and equal_states(whole.state_dict(), stopped.state_dict())
    assert whole[3].weight.is_contiguous(memory_format=torch.channels_last) and whole[3].weight.dtype == torch.float32
    monkeypatch.undo()
    training.train(other, batches(), recipe, folder=tmp_path / "other", **options)
    assert other[3].weight.is_contiguous() and other.state_dict().keys() == whole.state_dict().keys()
    for name, weights in checkpoint.read_weights(tmp_path / "whole" / runs.LAST)[0].items():
        assert weights.is_contiguous() and weights.shape == network(channels=8).state_dict()[name].shape


def once(record: dict) -> bool:
    return True


def test_channels_last_is_for_tensor_cores():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = [
        devices.wants_channels_last(device, precision)
        for device in (cuda, cpu)
        for precision in ("float32", "bfloat16", "float16")
    ]
    assert chosen == [False, True, True, False, False, False]
