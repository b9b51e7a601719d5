"""Flying Bird+: its density follows the gap between training and validation accuracy, and the validation loss."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small_runs import QUICK, TRAIN, VALIDATION, Batches, Stop, equal_states, network
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv import runs, training
from sparse_adv.methods import Adaptation, MethodConfig, Schedule, SparseTraining, selection
from sparse_adv.runs import Cost, EpochRecord
from sparse_adv.training import checkpoint

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=6)
"""18 updates."""
PLUS = MethodConfig("flying-bird-plus", density=0.4, block=(2, 1), interval=2, adapt_from=0.5)


def record(epoch=1, train=None, robust=None, loss=None) -> EpochRecord:
    values = {"train_accuracy": train, "robust_accuracy": robust, "robust_loss": loss}
    return EpochRecord(epoch, 3, 0.1, 1.0, 96, "cpu", Cost(), Cost(), Cost(), Cost(), **values)


@pytest.mark.parametrize(
    ("gaps", "losses", "expected"),
    [
        ([], [], (0.0, 0.0)),
        ([0.3], [2.0], (0.0, 0.0)),
        ([0.3, 0.4], [2.0, 1.0], (0.4, 0.0)),
        ([0.1, 0.2, 0.1, 0.2, 0.1], [1, 2, 3, 4, 5], (0.4, 0.05)),
        ([0.5, 0.4, 0.3, 0.4, 0.3], [5, 4, 3, 2, 3], (0.0, 0.0)),
        ([0.5, 0.4, 0.3, 0.2, 0.1], [1, 2, 3, 2, 1], (0.0, 0.05)),
        ([0.1, 0.9, 0.8, 0.7, 0.6, 0.5], [1, 2, 3, 2, 1, 0.5], (0.0, 0.0)),  # the first changes are no longer in it
        ([0.2, 0.2, 0.2], [1, 1, 1], (0.0, 0.0)),
    ],
)
def test_at_least_half_of_the_last_four_changes_must_rise(gaps, losses, expected):
    adaptation = Adaptation()
    for gap, loss in zip(gaps, losses, strict=True):
        adaptation.observe(record(train=0.1 + gap, robust=0.1, loss=loss))
        adaptation.observe(record())  # an epoch without evaluation
    assert (adaptation.more_dropped, adaptation.more_grown) == expected
    continued = Adaptation()
    continued.load_state_dict(adaptation.state_dict())
    assert (continued.more_dropped, continued.more_grown) == expected


@settings(deadline=None, max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    density=st.floats(0, 1),
    fraction=st.floats(0, 1),
    more=st.tuples(st.sampled_from([0.0, 0.4, 3.0]), st.sampled_from([0.0, 0.05, 3.0])),
    joint=st.booleans(),
    seed=st.integers(0, 9),
)
def test_more_blocks_are_dropped_and_grown(sizes, density, fraction, more, joint, seed):
    random = np.random.default_rng(seed)
    names = [str(i) for i in range(len(sizes))]
    grids = {n: torch.from_numpy(random.random(size) < density) for n, size in zip(names, sizes, strict=True)}
    drop, grow = (
        {n: torch.from_numpy(random.random(size)) for n, size in zip(names, sizes, strict=True)} for _ in "dg"
    )
    groups = [tuple(names)] if joint else [(name,) for name in names]
    new = selection.drop_and_grow(grids, drop, lambda: grow, groups, fraction, *more)
    for group in groups:
        before = torch.cat([grids[n] for n in group])
        after = torch.cat([new.get(n, grids[n]) for n in group])
        live, total = int(before.sum()), len(before)
        replaced = math.ceil(fraction * live)
        if live in (0, total) or not replaced:
            assert after.equal(before)
            continue
        dropped = min(live, replaced + round(more[0] * fraction * live))
        grown = min(total - live + dropped, replaced + round(more[1] * fraction * live))
        assert int(after.sum()) == live - dropped + grown >= 1
        order = torch.cat([drop[n] for n in group]).masked_fill(~before, 2).argsort()
        rest = before.clone()
        rest[order[:dropped]] = False
        assert (after | ~rest).all()  # what is not dropped is kept


def test_the_density_adapts_after_a_fraction_of_the_updates():
    schedule = Schedule(replace(PLUS, adapt_from=0.25), epochs=4, steps_per_epoch=10)
    assert [step for step in range(41) if schedule.adapts(step)] == list(range(11, 41))
    assert not any(Schedule(replace(PLUS, adapt_from=1), 4, 10).adapts(step) for step in range(41))
    assert not any(Schedule(MethodConfig("flying-bird"), 4, 10).adapts(step) for step in range(41))


class Observed(SparseTraining):
    """Remembers masks after each change; with `trend`, the values of epochs are replaced by made ones."""

    def __init__(self, config, trend=None):
        super().__init__(config)
        self.trend, self.seen = trend, {}

    def after_update(self, step, gradients):
        changed = super().after_update(step, gradients)
        if changed:
            self.seen[step] = {name: mask.clone() for name, mask in self.masks().items()}
        return changed

    def after_epoch(self, record):
        assert record.train_accuracy is not None
        if self.trend is not None:
            gap, loss = (sign * record.epoch for sign in self.trend)
            values = {"train_accuracy": 0.5 + 0.05 * gap, "robust_accuracy": 0.1, "robust_loss": 10.0 + loss}
            record = replace(record, **values)
        super().after_epoch(record)


def run(hook, config=CONFIG, model=None, **options):
    model = model or network(channels=8)
    records = training.train(model, Batches(TRAIN, 32), config, validation=VALIDATION, hook=hook, **options)
    return model, records


def counts(masks):
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_without_a_rise_it_is_flying_bird():
    plus, plain = Observed(PLUS, trend=(-1, -1)), Observed(replace(PLUS, method="flying-bird", adapt_from=None))
    (model, records), (expected, plain_records) = run(plus), run(plain)
    assert equal_states(model.state_dict(), expected.state_dict()) and plus.changes == plain.changes > 4
    assert records[-1].robust_loss is not None and plain_records[-1].robust_loss is None


@pytest.mark.parametrize("trend", [(1, -1), (-1, 1), (1, 1)])
def test_each_layer_follows_the_trend_from_the_middle_on(trend):
    plus, plain = Observed(PLUS, trend), Observed(replace(PLUS, method="flying-bird", adapt_from=None))
    _, records = run(plus)
    run(plain)
    more_dropped, more_grown = 0.4 * (trend[0] > 0), 0.05 * (trend[1] > 0)
    steps = sorted(plus.seen)
    assert steps == sorted(plain.seen) and sum(step > 9 for step in steps) >= 3
    for before, step in zip([None, *steps], steps, strict=False):
        if step <= 9:
            assert all(plus.seen[step][name].equal(mask) for name, mask in plain.seen[step].items())
            continue
        old, new = counts(plus.seen[before]), counts(plus.seen[step])
        for name, mask in plus.seen[step].items():
            size = 2  # of every block
            live, total = old[name] // size, mask.numel() // size
            fraction = plus.schedule.drop_fraction(step)
            replaced = math.ceil(fraction * live) if live < total else 0
            dropped = min(live, replaced + round(more_dropped * fraction * live)) if replaced else 0
            grown = min(total - live + dropped, replaced + round(more_grown * fraction * live)) if replaced else 0
            assert new[name] == size * (live - dropped + grown)
    densities = [record.density.weights for record in records]
    assert densities[0] == pytest.approx(0.4, abs=0.01) and len(set(densities[:3])) == 1
    if trend[0] > 0:
        assert densities[3] < densities[2] and densities[-1] < 0.9 * densities[0]
    else:
        assert densities[-1] >= densities[0]


def test_the_weights_left_out_are_zero_and_the_records_have_what_decided():
    hook = Observed(replace(PLUS, adapt_from=0), trend=(1, 1))
    model, records = run(hook, replace(CONFIG, ema_decay=0.5))
    for name, mask in hook.masks().items():
        layer = model.get_submodule(name)
        momentum = hook.updater.optimizer.state[layer.weight]["momentum_buffer"]
        average = hook.updater.ema.module.get_submodule(name)
        assert average.weight_mask.equal(mask)
        assert not layer.weight[~mask].any() and not momentum[~mask].any() and not average.weight[~mask].any()
    assert all(0 <= each.train_accuracy <= 1 and each.robust_loss > 0 for each in records)


STOPPED = replace(PLUS, adapt_from=0.2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights, records and folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    model, records = run(SparseTraining(STOPPED), folder=folder)
    assert len({each.density.weights for each in records}) > 2
    return model.state_dict(), records, folder


@pytest.mark.parametrize(("stop_at", "in_batch"), [(1, True), (3, False), (5, True)])
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, whole, stop_at, in_batch):
    expected, records, folder = whole

    def stop(value):
        if value == (3 * stop_at + 2 if in_batch else stop_at):
            raise Stop

    stopping = {"on_step": stop} if in_batch else {"on_epoch": lambda each: stop(each.epoch)}
    with pytest.raises(Stop):
        run(SparseTraining(STOPPED), folder=tmp_path, **stopping)
    hook = SparseTraining(STOPPED)
    model, continued = run(hook, folder=tmp_path)
    assert equal_states(model.state_dict(), expected) and len(hook.adaptation.gaps) == 5
    assert equal_states(*(checkpoint.read_weights(run / runs.LAST)[0] for run in (folder, tmp_path)))
    for first, second in zip(records, continued, strict=True):
        assert (first.density, first.robust_loss, first.train_accuracy) == (
            second.density,
            second.robust_loss,
            second.train_accuracy,
        )


def test_an_undone_epoch_does_not_count(monkeypatch):
    undone = iter([False, True, False, False, False, False, False])
    monkeypatch.setattr(training.loop.OverfittingMonitor, "must_undo", lambda *arguments: next(undone))
    hook = Observed(replace(PLUS, adapt_from=0))
    _, records = run(hook)
    assert records[1].undone_accuracy is not None
    gaps = [each.train_accuracy - each.robust_accuracy for each in records]
    assert hook.adaptation.gaps == gaps[-5:]


def test_epochs_without_evaluation_are_left_out():
    hook = SparseTraining(PLUS)
    _, records = run(hook, replace(CONFIG, evaluate_every=2))
    assert hook.adaptation.losses == [each.robust_loss for each in records if each.epoch % 2 == 0]


def test_it_needs_validation_images_and_an_attack():
    with pytest.raises(ValueError, match="validation must have images, because the method follows the loss on them"):
        training.train(network(), Batches(TRAIN, 32), CONFIG, hook=SparseTraining(PLUS))
    with pytest.raises(ValueError, match="objective must have an attack for method 'flying-bird-plus', got 'natural'"):
        run(SparseTraining(PLUS), QUICK)
    with pytest.raises(ValueError, match="adapt_from is a setting of method 'flying-bird-plus', got method 'rigl'"):
        MethodConfig("rigl", adapt_from=0.3)
    with pytest.raises(ValueError, match=r"adapt_from must be in \[0, 1\], got 2"):
        MethodConfig("flying-bird-plus", adapt_from=2)
