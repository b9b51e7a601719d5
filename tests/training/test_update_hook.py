"""A hook of the user: its state belongs to the run, and is saved, continued and undone with it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import report, runs, sparsify, training
from sparse_adv.config import MethodConfig
from sparse_adv.masks import prune
from sparse_adv.methods import SparseTraining
from sparse_adv.training.overfitting import OverfittingMonitor

CONFIG = replace(QUICK, objective="fgsm-rs", epochs=4)


class Counting(training.UpdateHook):
    def __init__(self):
        self.updates, self.began = 0, 0

    def begin(self, updater):
        self.began += 1

    def after_update(self, step, gradients):
        self.updates += 1
        return False

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


class Empty(Counting):
    """Like a container of results that is empty as yet."""

    def __len__(self):
        return 0


def train(folder=None, hook=None, config=CONFIG, **options):
    hook = Counting() if hook is None else hook
    training.train(network(), batches(), config, folder=folder, hook=hook, **options)
    return hook


@pytest.mark.parametrize("hook", [Counting, Empty])
def test_a_stopped_run_continues_with_the_state_of_its_hook(tmp_path, hook):
    assert train(tmp_path, hook(), on_epoch=lambda record: record.epoch == 2).updates == 6
    assert train(tmp_path, hook()).updates == 12


def test_an_undone_epoch_is_undone_for_the_hook_too(monkeypatch):
    accuracies = iter([0.5, 0.0, 0.5, 0.5, 0.5])
    measure = OverfittingMonitor.measure
    monkeypatch.setattr(
        OverfittingMonitor, "measure", lambda self, model: replace(measure(self, model), fraction=next(accuracies))
    )
    assert train(validation=VALIDATION).updates == 12


def test_a_hook_without_a_truth_value_of_true_is_called():
    hook = train(hook=Empty())
    assert hook.began == 1 and hook.updates == 12


def test_the_state_of_one_hook_is_not_given_to_another(tmp_path):
    train(tmp_path / "with", config=replace(CONFIG, epochs=1))
    with pytest.raises(ValueError, match="hook must be of class Counting, as before, got UpdateHook"):
        training.Training(network(), batches(), CONFIG, folder=tmp_path / "with")
    training.train(network(), batches(), replace(CONFIG, epochs=1), folder=tmp_path / "without")
    with pytest.raises(ValueError, match="hook must be of class UpdateHook, as before, got Counting"):
        training.Training(network(), batches(), CONFIG, folder=tmp_path / "without", hook=Counting())


@dataclass(frozen=True)
class Settings:
    every: int = 3
    sizes: tuple[int, ...] = (1, 2)


class Mine(training.UpdateHook):
    def __init__(self, config=None):
        self.config = config


class Other(Mine):
    pass


@pytest.mark.parametrize("settings", [Settings, lambda every=3: {"every": every, "of": None}])
def test_a_hook_is_recognised_by_its_class_and_its_settings(tmp_path, settings):
    train(tmp_path, Mine(settings()), config=replace(CONFIG, epochs=1))
    train(tmp_path, Mine(settings()), on_epoch=lambda record: record.epoch == 2)
    for hook, said in (
        (Mine(settings(every=50)), r"hook\.settings\.every 3, now 50"),
        (Mine(), r"hook\.settings\.every 3, now None"),
        (Other(settings()), r"hook\.name 'Mine', now 'Other'"),
        (training.UpdateHook(), r"hook\.name 'Mine', now 'UpdateHook'"),
        (SparseTraining(MethodConfig("rigl")), r"hook\.name 'Mine', now None"),
    ):
        with pytest.raises(ValueError, match=rf"other settings \(.*{said}"):
            train(tmp_path, hook)
    with pytest.raises(ValueError, match=r"hook\.name 'Mine', now None"):
        training.train(network(), batches(), CONFIG, folder=tmp_path)
    info = runs.read(tmp_path).info
    assert info.hook.name == "Mine" and info.hook.settings["every"] == 3 and info.method is None
    train(tmp_path, Mine(settings()))
    assert "hook.settings.every" in report.report([tmp_path], tmp_path / "report")


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ({"mask": torch.ones(2)}, ValueError, "hook.config must hold only what run.json can: Object of type Tensor"),
        ({"rate": float("inf")}, ValueError, "hook.config must hold only what run.json can: Out of range float"),
        (Settings, TypeError, "hook.config must be a dataclass or a dict, got <class"),
        (3, TypeError, "hook.config must be a dataclass or a dict, got 3"),
    ],
)
def test_settings_that_a_file_cannot_hold_are_refused_before_training(tmp_path, config, error, said):
    with pytest.raises(error, match=said):
        train(tmp_path, Mine(config))
    assert not (tmp_path / runs.INFO).exists()
    train(hook=Mine(config), config=replace(CONFIG, epochs=1))  # which writes no file


@pytest.mark.parametrize(
    ("result", "epochs"), [(np.bool_(True), 1), (True, 1), (1, 4), (np.bool_(False), 4), (None, 4)]
)
def test_training_ends_where_on_epoch_returns_true(result, epochs):
    assert len(training.train(network(), batches(), CONFIG, on_epoch=lambda record: result)) == epochs


class Changing(training.UpdateHook):
    """Does something to the model after its second update."""

    def __init__(self, change):
        self.change = change

    def begin(self, updater):
        self.updater = updater

    def after_update(self, step, gradients):
        if step == 2:
            self.change(self.updater.model)
        return False


def test_masks_that_a_hook_sets_between_epochs_are_counted_also_in_a_run_that_was_stopped(tmp_path):
    class Pruning(training.UpdateHook):
        def begin(self, updater):
            self.model = updater.model
            sparsify(self.model, prune(self.model, 1.0, linear=True))

        def after_epoch(self, record):
            if record.epoch == 2:
                sparsify(self.model, prune(self.model, 0.5, linear=True))

    found = []
    for stops in (None, 2):
        for last in (stops, None) if stops else (None,):
            records = training.train(
                network(),
                batches(),
                CONFIG,
                folder=tmp_path / str(stops),
                hook=Pruning(),
                on_epoch=lambda record, last=last: record.epoch == last,
            )
        found.append([(record.density, record.update.macs) for record in records])
    assert found[0] == found[1]
    assert [density.weights for density, _ in found[0]] == pytest.approx([1, 1, 0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("engine", [True, False])
def test_a_layer_may_be_unfrozen_in_the_course_of_training(engine):
    model = network()
    frozen = model[3].weight.requires_grad_(False)
    before = frozen.clone()
    hook = Changing(lambda model: model[3].weight.requires_grad_())
    training.train(model, batches(), replace(CONFIG, epochs=2, engine=engine), hook=hook)
    assert not frozen.equal(before)


def test_a_module_that_a_hook_sets_to_eval_mode_stays_in_it_after_a_stop_too(tmp_path):
    model, again = network(), network()

    def ends(record):
        return True

    for stopped, trained in ((True, model), (False, again)):
        hook = Changing(lambda model: model[1].eval())
        training.train(trained, batches(), CONFIG, folder=tmp_path, hook=hook, on_epoch=[None, ends][stopped])
        assert trained[1].num_batches_tracked == 2 and trained[4].num_batches_tracked == (3 if stopped else 12)


def test_a_model_whose_layer_a_hook_froze_may_be_trained_on(tmp_path):
    model = network()
    for epochs in (2, 4):
        hook = Changing(lambda model: model[0].weight.requires_grad_(False))
        records = training.train(model, batches(), replace(CONFIG, epochs=epochs), folder=tmp_path, hook=hook)
        assert len(records) == epochs


def test_what_a_hook_keeps_must_be_read_again(tmp_path):
    class Keeping(training.UpdateHook):
        def state_dict(self):
            return {"best": np.float64(0.5)}

    with pytest.raises(TypeError, match=r"the state of 'hook' must be tensors, .* and contains numpy.*scalar$"):
        train(tmp_path, Keeping())
    assert not (tmp_path / "state.pt").exists()


def test_what_a_hook_keeps_later_leaves_the_last_good_state(tmp_path):
    class Keeping(training.UpdateHook):
        best = 0.0

        def after_epoch(self, record):
            self.best = np.float64(0.5) if record.epoch == 2 and not hasattr(self, "plain") else self.best + 1

        def state_dict(self):
            return {"best": self.best}

        def load_state_dict(self, state):
            self.best, self.plain = state["best"], True

    with pytest.raises(TypeError, match="the state of 'hook' must be tensors"):
        train(tmp_path, Keeping())
    hook = Keeping()
    train(tmp_path, hook)
    assert hook.best == CONFIG.epochs
