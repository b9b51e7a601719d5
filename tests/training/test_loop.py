"""Training: it learns, its records are right, it repeats bit for bit, and it refuses wrong batches."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers.cpu_graphs import CpuGraphs, no_synchronisation, waiting_is_an_error
from helpers.small_runs import QUICK, TEST, TRAIN, VALIDATION, WITH_ENGINE, batches, equal_states, network
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset

from sparse_adv import attacks, data, masks, runs, sparsify, training
from sparse_adv.json_files import flatten, to_json
from sparse_adv.runs import Cost, EpochRecord
from sparse_adv.training import checkpoint, evaluation, loop, update


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_every_objective_learns_an_easy_task(objective):
    config = replace(QUICK, objective=objective, replays=2)
    records = training.train(network(), batches(), config, validation=VALIDATION)
    assert records[-1].clean_accuracy > 0.9
    assert records[-1].loss < records[0].loss


@pytest.mark.parametrize("objective", training.OBJECTIVES)
@pytest.mark.parametrize("engine", [True, False])
def test_the_training_accuracy_is_that_of_the_images_of_the_updates(objective, engine):
    """Without a perturbation and with learning rate 0 it is the accuracy in training mode, batch by batch."""
    config = replace(QUICK, objective=objective, epochs=1, lr=0.0, eps=0.0, alpha=0.0, replays=2, engine=engine)
    model, images = network(), list(batches())
    (record,) = training.train(model, images, config)
    model.train()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in images)
    assert 0 < right < 96 and record.train_accuracy == right / 96


def test_records_count_epochs_updates_and_costs():
    seen = []
    records = training.train(
        network(), batches(), replace(QUICK, objective="pgd"), on_epoch=seen.append, before=Cost(10.0, 1000)
    )
    assert seen == records
    assert [(record.epoch, record.step, record.images) for record in records] == [
        (1, 3, 96),
        (2, 6, 96),
        (3, 9, 96),
    ]
    spent = sum((record.attack + record.update for record in records), Cost(10.0, 1000))
    assert records[-1].total.seconds == pytest.approx(spent.seconds) and records[-1].total.macs == spent.macs
    assert records[0].attack.seconds > 0 and records[0].attack.macs > 0


def test_evaluations_follow_their_interval_and_the_last_epoch_is_evaluated():
    config = replace(QUICK, epochs=5, evaluate_every=2)
    records = training.train(network(), batches(), config, validation=VALIDATION)
    assert [record.epoch for record in records if record.robust_accuracy is not None] == [2, 4, 5]


@pytest.mark.parametrize("objective", [name for name in training.OBJECTIVES if name != "natural"])
def test_a_run_repeats_bit_for_bit_and_leaves_the_global_generator_alone(objective):
    config = replace(QUICK, objective=objective, epochs=2, ema_decay=0.9)
    models = [network(), network()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for model in models:
        training.train(model, batches(), config, validation=VALIDATION)
        assert torch.get_rng_state().equal(before)
        torch.rand(3)
        before = torch.get_rng_state()
    assert equal_states(models[0].state_dict(), models[1].state_dict())


def test_seeds_change_the_attack_and_the_order():
    weights = []
    for seed, order in ((0, 0), (1, 0), (0, 1)):
        model = network()
        config = replace(QUICK, objective="fgsm-rs", seed=seed, epochs=1)
        training.train(model, batches(seed=order), config)
        weights.append(model[0].weight.detach())
    assert not weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_batches_are_any_iterable_with_a_length():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    states = []
    for given in (DataLoader(images, 32), list(DataLoader(images, 32)), batches(shuffle=False)):
        model = network()
        training.train(model, given, QUICK)
        states.append(model.state_dict())
    assert equal_states(states[0], states[1]) and equal_states(states[0], states[2])


def test_a_shuffling_dataloader_has_the_same_order_in_every_run():
    images = TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels)
    states = []
    for _ in range(2):
        model = network()
        training.train(model, DataLoader(images, 32, shuffle=True), QUICK)
        states.append(model.state_dict())
    assert equal_states(*states)


def test_batches_without_a_length_are_refused():
    with pytest.raises(TypeError, match=r"batches must have a length.*got generator"):
        training.train(network(), (batch for batch in batches()), QUICK)
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        training.train(network(), [], QUICK)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.full((4, 1, 6, 6), 2.0), torch.zeros(4, dtype=torch.int64), r"images must lie in \[0, 1\]"),
        (torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64), "images must be finite"),
        (torch.zeros(4, 1, 6, 6), torch.zeros(3, dtype=torch.int64), "one label per image"),
        (torch.zeros(4, 1, 6, 6, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "must be a floating point"),
    ],
)
@pytest.mark.parametrize("objective", ["natural", "fgsm", "free"])
def test_a_wrong_batch_is_refused_with_its_reason(images, labels, message, objective):
    with pytest.raises((ValueError, TypeError), match=message):
        training.train(network(), [(images, labels)], replace(QUICK, objective=objective))


def test_a_clipped_gradient_limits_the_step():
    moved = []
    for clip in (0.0, 1e-3):
        model = network()
        start = copy.deepcopy(model.state_dict())
        training.train(model, batches(96), replace(QUICK, epochs=1, max_grad_norm=clip, momentum=0.0, weight_decay=0.0))
        step = [model.state_dict()[name] - start[name] for name, _ in model.named_parameters()]
        moved.append(torch.cat([part.flatten() for part in step]).norm().item())
    assert moved[1] == pytest.approx(0.1 * 1e-3, rel=1e-3) and moved[0] > 10 * moved[1]


def test_the_moving_average_has_the_weights_of_its_decay():
    model, steps = network(), []
    run = training.Training(model, batches(), replace(QUICK, epochs=1, ema_decay=0.5))
    list(run.epochs(on_step=lambda _: steps.append(model[0].weight.detach().clone())))
    average = steps[0]
    for updates in (1, 2):
        decay = updates / (updates + 9)  # below 0.5 until update 9
        average = decay * average + (1 - decay) * steps[updates]
    assert torch.allclose(run.evaluated[0].weight, average, atol=1e-6)
    assert run.evaluated is not model


def test_bfloat16_training_keeps_float32_weights():
    model = network()
    records = training.train(model, batches(), replace(QUICK, precision="bfloat16", objective="pgd"), validation=TEST)
    assert records[-1].clean_accuracy > 0.9
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(FloatingPointError, match="diverged in epoch 1"):
        training.train(network(), batches(), replace(QUICK, lr=1e30))


class Poisoned(torch.nn.Sequential):
    """Its last backward pass of two epochs gives the weights before it NaN."""

    passes = 0

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            if self.passes == 6:
                x = x.detach().requires_grad_()
                logits = super().forward(x)
                logits.register_hook(lambda gradient: gradient * torch.nan)
                return logits
        return super().forward(x)


def test_weights_that_are_not_finite_end_the_run_and_are_not_saved(tmp_path):
    config = replace(QUICK, epochs=2)
    with pytest.raises(FloatingPointError, match="diverged in epoch 2: weights are not finite"):
        training.train(Poisoned(*network()), batches(), config, folder=tmp_path)
    assert all(tensor.isfinite().all() for tensor in checkpoint.read_weights(tmp_path / runs.LAST)[0].values())


class Watched:
    """Batches that are yielded inside a context, except the first of the run: an epoch without its start and end."""

    def __init__(self, watch) -> None:
        self.batches, self.watch, self.seen = batches(augment=True), watch, 0

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)

    def __iter__(self):
        iterator = iter(self.batches)
        if not self.seen:
            yield next(iterator)
        self.seen += 1
        with self.watch():
            yield from iterator


@pytest.mark.parametrize(
    ("objective", "graphs"),
    [*((objective, attacks.Graphs) for objective in training.OBJECTIVES), ("n-fgsm", CpuGraphs), ("free", CpuGraphs)],
)
def test_the_host_never_waits_for_the_device_within_an_epoch(objective, graphs, monkeypatch):
    monkeypatch.setattr(loop, "reads_at_once", lambda device: False)
    monkeypatch.setattr(loop, "Graphs", graphs)
    config = replace(WITH_ENGINE, objective=objective, epochs=2, ema_decay=0.5, max_grad_norm=1.0, replays=2)
    # Without monitor, which would repeat an epoch of a network that has learnt so little.
    config = replace(config, overfitting_monitor=False, label_smoothing=0.1)
    given = Watched(no_synchronisation)
    training.train(network(), given, config, validation=VALIDATION)
    assert given.seen == 2


def test_a_wait_within_an_epoch_is_detected():
    with pytest.raises(RuntimeError, match="the host reads"):
        training.train(network(), Watched(no_synchronisation), QUICK)  # on a CPU batches are checked at once


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_the_host_never_waits_for_cuda_within_an_epoch(objective, precision):
    config = replace(WITH_ENGINE, objective=objective, epochs=4, ema_decay=0.5, max_grad_norm=1.0, replays=2)
    # Without monitor, which would repeat an epoch of a network that has learnt so little.
    config = replace(config, precision=precision, overfitting_monitor=False)
    model, given = network().cuda(), Watched(waiting_is_an_error)
    sparsify(model, masks.prune(model, density=0.5))
    given.batches.split = TRAIN.to("cuda")
    records = training.train(model, given, config, validation=VALIDATION.to("cuda"))
    assert given.seen == len(records) == 4


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_cuda_graphs_give_the_same_bits(objective, monkeypatch):
    """Of a sparse network in bfloat16; test_captured.py has dense ones in float32."""
    config = replace(WITH_ENGINE, objective=objective, ema_decay=0.9, precision="bfloat16", replays=2)
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: False)
    results = []
    for graphs in (attacks.Graphs, CpuGraphs):
        monkeypatch.setattr(loop, "Graphs", graphs)
        model = network()
        sparsify(model, masks.prune(model, density=0.5))
        run = training.Training(model, batches(40), config, validation=VALIDATION)
        records = [without_seconds(record) for record in run.epochs()]
        results.append((records, run.evaluated.state_dict()))
    assert results[0][0] == results[1][0] and equal_states(results[0][1], results[1][1])
    captures, replays = run.graphs.counts
    assert captures and replays


def without_seconds(record: EpochRecord) -> dict:
    return {name: value for name, value in flatten(to_json(record)) if "seconds" not in name}


WRONG = {
    "bright": (
        (torch.full((4, 1, 6, 6), 2.0), torch.zeros(4, dtype=torch.int64)),
        r"images must lie in \[0, 1\].* to 2:",
    ),
    "nan": ((torch.full((4, 1, 6, 6), math.nan), torch.zeros(4, dtype=torch.int64)), "images must be finite"),
    "large label": ((torch.zeros(4, 1, 6, 6), torch.full((4,), 2)), r"labels must lie in \[0, 1\], .*, got 0 to 2"),
    "ignored": ((torch.zeros(4, 1, 6, 6), torch.full((4,), -100)), r"labels must lie in \[0, 1\], .*, got -100 to 1"),
}


@pytest.mark.parametrize(
    ("objective", "name", "at_once"),
    [
        (objective, name, (i + j) % 2 == 0)  # each objective and each value meets both
        for i, objective in enumerate(training.OBJECTIVES)
        for j, name in enumerate(WRONG)
    ],
)
def test_wrong_values_in_a_later_batch_are_refused_at_the_end_of_the_epoch_or_before(
    objective, name, at_once, monkeypatch, tmp_path
):
    wrong, message = WRONG[name]
    monkeypatch.setattr(loop, "reads_at_once", lambda device: at_once)
    good = next(iter(batches()))
    if at_once:  # then the range is that of one batch, else of all batches
        message = message.replace("got 0", "got 2").replace(" to 1", " to -100")
    with pytest.raises(ValueError, match=message):
        training.train(network(), [good, wrong, good], replace(QUICK, objective=objective), folder=tmp_path)
    assert not (tmp_path / runs.STATE).exists()


def test_channels_last_training_learns_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    config = replace(QUICK, objective="pgd", precision="bfloat16", ema_decay=0.5)
    options = {"validation": VALIDATION}
    monkeypatch.setattr(update, "wants_channels_last", lambda device, precision: True)
    whole, stopped, other = network(channels=8), network(channels=8), network(channels=8)
    records = training.train(whole, batches(), config, folder=tmp_path / "whole", **options)
    for folder in ("stopped", "other"):
        training.train(network(channels=8), batches(), config, folder=tmp_path / folder, on_epoch=stop, **options)
    training.train(stopped, batches(), config, folder=tmp_path / "stopped", **options)
    assert records[-1].clean_accuracy > 0.9 and equal_states(whole.state_dict(), stopped.state_dict())
    assert whole[3].weight.is_contiguous(memory_format=torch.channels_last) and whole[3].weight.dtype == torch.float32
    monkeypatch.undo()
    training.train(other, batches(), config, folder=tmp_path / "other", **options)
    assert other[3].weight.is_contiguous() and other.state_dict().keys() == whole.state_dict().keys()
    for name, weights in checkpoint.read_weights(tmp_path / "whole" / runs.LAST)[0].items():
        assert weights.is_contiguous() and weights.shape == network(channels=8).state_dict()[name].shape


def stop(record: EpochRecord) -> bool:
    return True


ONE_IMAGE = r"more than one image in each batch, also in the last, .* drop_last=True"


def with_one_value_per_channel():
    return torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(36, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


@pytest.mark.parametrize(("images", "size"), [(1, 8), (6, 1)])
def test_batches_of_one_image_are_refused_where_batch_norm_cannot_take_them(images, size):
    few = data.Split(TRAIN.images[:images], TRAIN.labels[:images])
    with pytest.raises(ValueError, match=ONE_IMAGE):
        training.train(with_one_value_per_channel(), data.Batches(few, size), QUICK)
    training.train(network(), data.Batches(few, size), replace(QUICK, epochs=1))


@pytest.mark.parametrize("as_list", [True, False])
def test_a_last_batch_of_one_image_is_refused_before_the_first_update_where_batch_norm_cannot_take_it(as_list):
    images, labels = data.to_unit(TRAIN.images[:5]), TRAIN.labels[:5]
    loader = DataLoader(TensorDataset(images, labels), 2)
    batches = list(loader) if as_list else loader
    model = with_one_value_per_channel()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=ONE_IMAGE):
        training.train(model, batches, QUICK)
    assert equal_states(model.state_dict(), before)
    training.train(model, batches[:2] if as_list else DataLoader(loader.dataset, 2, drop_last=True), QUICK)
    assert len(training.train(network(), batches, QUICK)) == 3  # with 36 values in each channel


class Stream(IterableDataset):
    def __init__(self, images, length):
        self.images = images
        if length:
            self.__class__ = type("Sized", (Stream,), {"__len__": lambda self: len(self.images.labels)})

    def __iter__(self):
        yield from zip(data.to_unit(self.images.images), self.images.labels, strict=True)


@pytest.mark.parametrize("length", [True, False])
def test_loaders_of_streams_and_of_whole_batches_keep_a_folder(tmp_path, length):
    streamed = DataLoader(Stream(VALIDATION, length), 5)
    whole = DataLoader(
        TensorDataset(data.to_unit(TRAIN.images), TRAIN.labels),
        batch_size=None,
        sampler=BatchSampler(SequentialSampler(range(96)), 32, drop_last=False),
    )
    records = training.train(network(), whole, QUICK, validation=streamed, folder=tmp_path)
    assert len(records) == 3 and records[-1].robust_accuracy is not None
