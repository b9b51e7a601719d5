"""The best epoch of a run whose method prunes is one of those after its last pruning."""

from dataclasses import replace

import pytest
from helpers.small_runs import TEST, VALIDATION, equal_states
from helpers.sparse_runs import CONFIG, odd_network, run

from sparse_adv import json_files, masks, runs
from sparse_adv.methods import MethodConfig, SparseTraining
from sparse_adv.runs import EpochRecord
from sparse_adv.training import checkpoint, final_test, loop
from sparse_adv.training.evaluation import Accuracy
from sparse_adv.training.overfitting import OverfittingMonitor

FALLING = replace(CONFIG, overfitting_monitor=False)


def _ends_after(epoch):
    return lambda record: record.epoch == epoch


@pytest.fixture
def worse_each_epoch(monkeypatch):
    """Each evaluation of a run measures a lower accuracy than the one before, so the first epoch seems the best."""
    left = iter(range(100, 0, -1))
    monkeypatch.setattr(loop, "robust_accuracy", lambda *args, **settings: Accuracy(next(left) / 100, 40, 0, 0, 1.0))


@pytest.mark.parametrize(
    ("method", "first"),
    [
        (MethodConfig("gmp", density=0.2, interval=2, change_until=0.75), 3),  # after update 9 of 12
        (MethodConfig("static", density=0.2, dense_epochs=1.5), 2),
        (MethodConfig("rigl", density=0.2, interval=2), 1),
        (MethodConfig("flying-bird-plus", density=0.2, interval=1, adapt_from=0.0, dense_epochs=1), 1),
        (None, 1),
    ],
)
def test_the_best_weights_have_been_pruned(tmp_path, worse_each_epoch, method, first):
    hook = None if method is None else SparseTraining(method)
    model, records = run(hook, config=FALLING, folder=tmp_path, validation=VALIDATION)
    assert [record.may_be_result for record in records] == [record.epoch >= first for record in records]
    best = runs.best(records, FALLING)
    assert best.epoch == first
    result = final_test(model, tmp_path, records, FALLING, TEST)
    assert (result.tested, result.tested_epoch) == ("best", first)
    if method is not None:
        assert masks.density(masks.load_pruned(tmp_path / runs.BEST).masks) == best.density.weights < 0.25


def test_without_a_pruned_epoch_the_last_weights_are_tested(tmp_path):
    method, options = MethodConfig("gmp", density=0.2, interval=2, change_until=1.0), {"validation": VALIDATION}
    for epochs, tested in ((3, "last"), (4, "best")):  # stopped before its end, and not
        model, folder = odd_network(), tmp_path / str(epochs)
        hook = SparseTraining(method)
        _, records = run(hook, model, FALLING, folder=folder, on_epoch=_ends_after(epochs), **options)
        assert [record.may_be_result for record in records] == [False, False, False, True][:epochs]
        assert (folder / runs.BEST).exists() == (tested == "best")
        result = final_test(model, folder, records, FALLING, TEST)
        assert (result.tested, result.tested_epoch) == (tested, epochs)


def test_a_run_that_is_stopped_before_its_pruning_has_the_same_best_epoch(tmp_path):
    method = MethodConfig("gmp", density=0.2, interval=2, change_until=0.5)
    for folder, stops in (("whole", (4,)), ("stopped", (1, 2, 4))):
        for stop in stops:
            options = {"validation": VALIDATION, "on_epoch": _ends_after(stop)}
            run(SparseTraining(method), config=FALLING, folder=tmp_path / folder, **options)
    whole, stopped = (runs.read(tmp_path / folder) for folder in ("whole", "stopped"))
    counting = [[record.may_be_result for record in each.records] for each in (whole, stopped)]
    assert counting == [[False, True, True, True]] * 2
    assert equal_states(*(checkpoint.read_weights(each.folder / runs.BEST)[0] for each in (whole, stopped)))


def test_an_undone_epoch_that_pruned_does_not_count_as_pruned(monkeypatch):
    """The second epoch, in which the method prunes, is repeated: what the first attempt reached is undone."""
    seen, undone = [], iter([False, True, False, False, False])
    monkeypatch.setattr(OverfittingMonitor, "must_undo", lambda *arguments: next(undone))
    hook = SparseTraining(MethodConfig("static", density=0.2, dense_epochs=1.3))
    loaded = hook.load_state_dict
    monkeypatch.setattr(hook, "load_state_dict", lambda state: loaded(state) or seen.append(hook.may_be_result()))
    _, records = run(hook, validation=VALIDATION)
    assert seen == [False] and [record.may_be_result for record in records] == [False, True, True, True]
    assert records[1].undone_accuracy is not None


def test_the_record_of_an_earlier_version_counts(tmp_path):
    _, records = run(None, config=replace(CONFIG, epochs=1))
    old = json_files.to_json(records[0])
    del old["may_be_result"]
    assert json_files.from_json(EpochRecord, old, "an old run") == records[0] and records[0].may_be_result


@pytest.fixture
def robust_while_dense(monkeypatch):
    """A measurement of the overfitting monitor: 0.9 of a dense network, 0.2 of a pruned one, then 0.4."""
    measure = OverfittingMonitor.measure

    def measured(self, model):
        pruned = not model[3].weight_mask.all()
        accuracy = 0.9 if not pruned else 0.2 if self.best in (0.0, 0.9) else 0.4
        return replace(measure(self, model), fraction=accuracy)

    monkeypatch.setattr(OverfittingMonitor, "measure", measured)


@pytest.mark.parametrize("stop", [None, 1, 2])
def test_an_epoch_that_prunes_is_not_repeated_with_pgd(tmp_path, robust_while_dense, stop):
    method, options = MethodConfig("rigl", density=0.1, interval=2, dense_epochs=1.5), {"validation": VALIDATION}
    if stop is not None:
        run(SparseTraining(method), folder=tmp_path, on_epoch=_ends_after(stop), **options)
    _, records = run(SparseTraining(method), folder=tmp_path, **options)
    assert [record.monitor_accuracy for record in records] == [0.9, 0.2, 0.4, 0.4]
    assert [record.undone_accuracy for record in records] == [None] * 4
    assert max(record.attack.macs for record in records) == records[0].attack.macs  # of one step each, as FGSM has
