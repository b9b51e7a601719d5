"""Updates as CUDA graphs: a run with graphs equals one without, bit for bit, and what cannot be captured says so.

Graphs are those of helpers/cpu_graphs.py, which runs none of the update's Python code in a replay, as CUDA does.
"""

import itertools
import random
import warnings
from dataclasses import replace

import pytest
import torch
from helpers.cpu_graphs import CpuGraphs
from helpers.small_runs import VALIDATION, WITH_ENGINE, Batches, bars, batches, equal_states, network
from torch import nn

from sparse_adv import masks, sparsify, training
from sparse_adv.attacks import Graphs
from sparse_adv.config import MethodConfig
from sparse_adv.json_files import flatten, to_json
from sparse_adv.methods import SparseTraining
from sparse_adv.training import evaluation, loop, overfitting
from sparse_adv.training.captured import CapturedUpdates
from sparse_adv.training.hook import UpdateHook

CONFIG = replace(WITH_ENGINE, objective="n-fgsm", epochs=3, overfitting_monitor=False)


@pytest.fixture(autouse=True)
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(loop, "Graphs", CpuGraphs)
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: False)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def counts(cache):
    capturers = cache.capturers.values()
    return sum(each.captures for each in capturers), sum(each.replays for each in capturers)


@pytest.fixture
def updates(monkeypatch):
    """How each update was made: "eager", "replayed", or "captured", which is run and then captured."""
    made = []
    run = CapturedUpdates.run

    def counted(self, *args):
        before = counts(self._cache)
        result = run(self, *args)
        captures, replays = (now - then for now, then in zip(counts(self._cache), before, strict=True))
        made.append("replayed" if replays else "captured" if captures else "eager")
        return result

    monkeypatch.setattr(CapturedUpdates, "run", counted)
    return made


def trained(config, model=None, given=None, hook=None, folder=None, validation=VALIDATION):
    """The records without seconds, the weights that are evaluated, and all the state of a run."""
    run = training.Training(
        model or network(), given or batches(13), config, validation=validation, hook=hook, folder=folder
    )
    records = [
        {name: value for name, value in flatten(to_json(record)) if "seconds" not in name} for record in run.epochs()
    ]
    state = run.updater.state_dict()
    momentum = {str(k): v["momentum_buffer"] for k, v in state["optimizer"]["state"].items()}
    objective = {f"objective {name}": value for name, value in state["objective"].items()}
    return records, run.evaluated.state_dict() | momentum | objective


def assert_equal_runs(first, second):
    assert first[0] == second[0]
    assert equal_states(first[1], second[1])


def assert_graphs_change_nothing(config, updates, make=network, make_hook=lambda: None):
    with_graphs = trained(config, make(), hook=make_hook())
    assert "replayed" in updates
    assert_equal_runs(with_graphs, trained(replace(config, graphs=False), make(), hook=make_hook()))
    return with_graphs


def sparse(density=0.5):
    model = network()
    sparsify(model, masks.prune(model, density=density))
    return model


CONFIGS = {
    **{name: {"objective": name, "replays": 2} for name in training.OBJECTIVES},
    "average": {"ema_decay": 0.5},
    "clipping": {"max_grad_norm": 0.1},
    "cyclic": {"schedule": "cyclic", "warmup_epochs": 1.0},
    "onecycle": {"schedule": "onecycle", "epochs": 6},
    "no momentum": {"momentum": 0.0},
    "bfloat16": {"precision": "bfloat16", "ema_decay": 0.9},
    "without engine": {"engine": False},
    "perturbed weights": {"awp_gamma": 0.01, "objective": "pgd"},
    "perturbed weights after a warm-up": {"awp_gamma": 0.1, "awp_warmup_epochs": 1.5, "objective": "pgd"},
    "l2": {"norm": "l2", "eps": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "smooth convergence": {"objective": "fgsm-rs-cs", "epochs": 7},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_with_graphs_equals_one_without(name, updates, monkeypatch):
    config = replace(CONFIG, **CONFIGS[name])
    # Three batches of 13 and one of 6: graphs of both shapes are replayed. Updates of nu-at alternate: more of them.
    given = batches(13) if name == "nu-at" else Batches(bars(45, 0), 13)
    with_graphs = trained(config, sparse(), given)
    assert "replayed" in updates
    if name == "onecycle":  # the momentum is a tensor where graphs could be, and is multiplied beforehand
        config = replace(config, graphs=False)
    else:
        monkeypatch.setattr(loop, "Graphs", Graphs)
    assert_equal_runs(with_graphs, trained(config, sparse(), given))


def test_from_the_third_update_of_a_shape_on_all_are_replayed(updates):
    trained(CONFIG)
    # Seven batches of 13 and one of 5 in each of three epochs.
    first, second = ["eager", "captured"], ["replayed"] * 7
    assert updates == first + ["replayed"] * 5 + ["eager"] + second + ["captured"] + second + ["replayed"]


@pytest.mark.parametrize(("objective", "kinds"), [("nu-at", 2), ("fgsm-rs-cs", 2)])
def test_each_kind_of_update_is_captured_once_for_all_epochs(objective, kinds, updates):
    # With and without the term that compares outputs; its weight, or the loss that it compares with, changes.
    trained(replace(CONFIG, objective=objective, epochs=6), given=batches(16))
    assert updates.count("captured") == kinds
    assert updates[-12:] == ["replayed"] * 12


def test_replays_count_as_attack_and_update(updates):
    run = training.Training(network(), batches(16), CONFIG)
    *_, last = run.epochs()
    assert updates[-6:] == ["replayed"] * 6
    assert last.attack.seconds > 0 and last.update.seconds > 0


@pytest.mark.parametrize("schedule", ["constant", "onecycle"])
def test_masked_weights_stay_zero(schedule, updates):
    config = replace(CONFIG, weight_decay=0.01, schedule=schedule)
    _, state = assert_graphs_change_nothing(config, updates, sparse)
    assert all(not state[f"{name}.weight"][~state[f"{name}.weight_mask"]].any() for name in "03")


@pytest.mark.parametrize("method", ["flying-bird", "rigl", "set", "gmp"])
def test_masks_may_change_and_old_graphs_are_deleted(method, updates):
    dense = MethodConfig(method, density=0.5, interval=6)
    config = replace(CONFIG, ema_decay=0.5)
    hooks = []

    class Watching(SparseTraining):
        def after_update(self, step, gradients):
            changed = super().after_update(step, gradients)
            hooks.append((changed, sum(bool(call.replays) for call in self.updater.captured._cache.calls.values())))
            return changed

    assert_graphs_change_nothing(config, updates, make_hook=lambda: Watching(dense))
    assert sum(changed for changed, _ in hooks) >= 2
    after = [later for (changed, _), (_, later) in itertools.pairwise(hooks) if changed]
    # The first update with new masks finds no graph and is captured; the second half is the run without graphs.
    assert after and after == [1] * (len(after) // 2) + [0] * (len(after) // 2)


def test_a_run_may_be_continued(updates, tmp_path):
    config = replace(CONFIG, objective="fgsm-rs-cs", epochs=4, ema_decay=0.5, schedule="cyclic")

    def stopped(folder, wanted):
        for epochs in (1, 2):
            run = training.Training(
                network(),
                batches(13),
                replace(wanted, graphs=wanted.graphs != (epochs == 1)),
                validation=VALIDATION,
                folder=folder,
            )
            for record in run.epochs():
                if record.epoch == epochs:
                    break
        return trained(wanted, folder=folder)

    expected = trained(replace(config, graphs=False))
    assert_equal_states(stopped(tmp_path / "with", config), expected)
    assert "replayed" in updates
    assert_equal_states(stopped(tmp_path / "without", replace(config, graphs=False)), expected)


def test_whether_there_are_graphs_is_no_part_of_what_a_folder_holds(tmp_path):
    folder = tmp_path / "run"
    config = replace(CONFIG, epochs=1)
    records = training.train(network(), batches(13), config, folder=folder)
    again = training.train(network(), batches(13), replace(config, graphs=False), folder=folder)
    assert again == records
    assert len(training.train(network(), batches(13), replace(config, graphs=False, epochs=2), folder=folder)) == 2


def assert_equal_states(first, second):
    assert equal_states(first[1], second[1])


def test_an_epoch_may_be_undone_and_repeated_with_another_objective(updates, monkeypatch):
    """The monitor finds catastrophic overfitting after the second epoch."""
    config = replace(CONFIG, epochs=4, overfitting_monitor=True)

    def must_undo(monitor, accuracy, density):
        monitor.calls = getattr(monitor, "calls", 0) + 1
        monitor.pgd_epochs = int(monitor.calls == 2)
        return monitor.calls == 2

    monkeypatch.setattr(overfitting.OverfittingMonitor, "must_undo", must_undo)
    records, _ = assert_graphs_change_nothing(config, updates, sparse)
    assert [record["undone_accuracy"] is not None for record in records] == [False, True, False, False]


def with_dropout():
    return nn.Sequential(network(), nn.Dropout(0.2))


def test_layers_draw_the_same_random_numbers(updates):
    assert_graphs_change_nothing(CONFIG, updates, with_dropout)


@pytest.mark.parametrize("change", ["dropout", "requires_grad", "mode", "momentum"])
def test_a_change_of_the_model_takes_effect(change, updates):
    """The callback changes what no hook reports, in the middle of an epoch."""

    def run(config):
        model = with_dropout()
        training_run = training.Training(model, batches(13), config)

        def on_step(step):
            if step == 12 and change == "dropout":
                model[1].p = 0.5
            elif step == 12 and change == "requires_grad":
                model[0][0].weight.requires_grad_(False)
            elif step == 12 and change == "mode":
                model[0][1].eval()
            elif step == 12:
                model[0][1].momentum = 0.5

        assert len(list(training_run.epochs(on_step))) == 3
        return model.state_dict()

    assert equal_states(run(CONFIG), run(replace(CONFIG, graphs=False)))
    assert updates[:24].count("replayed") > 10


def test_an_update_leaves_no_gradient_in_the_memory_of_graphs(updates):
    """Nor one of an earlier update, such as those by which masks grow, which are made without a graph."""
    seen = []

    class Watching(SparseTraining):
        def after_update(self, step, gradients):
            seen.append((bool(gradients), any(p.grad is not None for p in self.model.parameters())))
            return super().after_update(step, gradients)

    trained(CONFIG, hook=Watching(MethodConfig("rigl", density=0.5, interval=6)))
    assert "replayed" in updates and any(collected for collected, _ in seen)
    assert all(collected == left for collected, left in seen)


class Synchronising(nn.Module):
    def forward(self, x):
        return x * (2.0 if float(x.detach().sum()) > 1e9 else 1.0)


class DrawingOnTheHost(nn.Module):
    def forward(self, x):
        return x * (2.0 if random.random() < 0.5 else 1.0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x


class Reading(UpdateHook):
    def __init__(self):
        self.seen = 0

    def begin(self, updater):
        self.model = updater.model

    def after_update(self, step, gradients):
        self.seen += all(parameter.grad is not None for parameter in self.model.parameters())
        return False


def with_a_forward_hook():
    model = network()
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def with_a_gradient_hook():
    model = sparse()
    model[0].weight.register_hook(lambda gradient: None)
    return model


def with_gaps():
    model = network()
    model[0].weight = nn.Parameter(torch.cat([model[0].weight.detach()] * 2, 3)[..., ::2])
    return model


REFUSED = {
    "synchronises": (lambda: nn.Sequential(network(), Synchronising()), {}, "the host reads a value"),
    "draws": (lambda: nn.Sequential(network(), DrawingOnTheHost()), {}, "it draws random numbers on the CPU"),
    "changes": (lambda: nn.Sequential(network(), Counting()), {}, "each of 16 updates differs from all before"),
    "forward hook": (with_a_forward_hook, {}, "module '0' has hooks"),
    "gradient hook": (with_a_gradient_hook, {}, "parameter '0.weight' has hooks"),
    "gaps": (with_gaps, {}, "a parameter has gaps in its memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_runs_as_before_and_one_warning_says_why(name, updates):
    make, others, reason = REFUSED[name]
    config = replace(CONFIG, objective="natural", engine=False, **others)
    with pytest.warns(UserWarning, match=f"updates of this Sequential run step by step .*: {reason}") as warned:
        result = trained(config, make(), validation=None)
    own = [str(warning.message) for warning in warned if "updates of" in str(warning.message)]
    assert len(own) == 1 and "replayed" not in updates
    assert_equal_runs(result, trained(replace(config, graphs=False), make(), validation=None))


def test_hooks_of_all_modules_run_in_every_update(updates):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match="there are hooks for all modules"):
            trained(replace(CONFIG, objective="natural", engine=False), model := network(), validation=None)
    finally:
        handle.remove()
    assert "replayed" not in updates and seen.count(model[0]) >= len(updates)


def test_a_hook_that_may_read_gradients_finds_them(updates):
    hook = Reading()
    with pytest.warns(
        UserWarning, match="Reading.after_update may read gradients; if not, set its attribute"
    ) as warned:
        trained(CONFIG, hook=hook)
    assert hook.seen == 24 and len(warned) == 1 and "replayed" not in updates
    hook.reads_gradients = False
    trained(CONFIG, hook=hook)
    assert "replayed" in updates


def test_without_graphs_no_update_is_captured(updates):
    trained(replace(CONFIG, graphs=False))
    assert updates == ["eager"] * 24


def test_a_capture_that_ends_in_the_middle_of_a_step_leaves_the_loss_scale_usable():
    """The optimiser has been given the scale of the loss, and reads a value in the step that is captured."""
    config = replace(CONFIG, objective="natural", precision="float16", engine=False)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    run = training.Training(model, batches(13), config)
    scale = run.updater.scaler.get_scale()

    def read(optimizer, args, kwargs):
        float(optimizer.found_inf)

    run.updater.optimizer.register_step_pre_hook(read)
    with pytest.warns(UserWarning, match="updates of this Sequential run step by step .*: the host reads a value"):
        records = list(run.epochs())
    assert len(records) == 3 and run.updater.scaler.get_scale() == scale
    assert not hasattr(run.updater.optimizer, "found_inf")
