"""A run that was stopped at any moment continues, and ends with the same weights, bit for bit.

On a GPU that is promised of deterministic algorithms only.
"""

import contextlib
import io
import os
import random
import time
from dataclasses import replace

import pytest
import torch
from helpers.forked import run_command, start_command
from helpers.small_runs import QUICK, TRAIN, VALIDATION, WITH_ENGINE, Batches, Stop, equal_states, network
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import data, json_files, masks, models, runs, training
from sparse_adv.nn import sparsify
from sparse_adv.training import checkpoint, deterministic

CONFIG = replace(WITH_ENGINE, objective="free", replays=2, epochs=4, ema_decay=0.9, schedule="cosine", evaluate_every=2)


def train(folder, stop_at=None, config=CONFIG, in_batch=False, device="cpu"):
    """A sparse network's run; stops after that epoch, or in the middle of the next one."""
    model, images = network().to(device), Batches(TRAIN.to(device), 32)
    sparsify(model, masks.prune(model, density=0.5))

    def on_epoch(record):
        if record.epoch == stop_at and not in_batch:
            raise Stop

    updates = len(images) * (config.replays if config.objective == "free" else 1)

    def on_step(step):
        if in_batch and step == stop_at * updates + 2:
            raise Stop

    watch = {"validation": VALIDATION.to(device), "on_epoch": on_epoch, "on_step": on_step}
    with deterministic(torch.device(device).type == "cuda"):
        training.train(model, images, config, folder=folder, **watch)
    return model


def assert_same_weights_files(first, second):
    for name in (runs.LAST, runs.BEST):
        ends = [checkpoint.read_weights(run / name) for run in (first, second)]
        assert equal_states(ends[0][0], ends[1][0]) and ends[0][1]["epoch"] == ends[1][1]["epoch"]


def assert_best_weights_are_those_of_the_best_epoch(folder):
    run = runs.read(folder)
    assert checkpoint.read_weights(folder / runs.BEST)[1] == json_files.to_json(runs.best(run.records, run.info.train))


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"objective": "pgd", "precision": "bfloat16"},
        {"objective": "fgsm-uap", "awp_gamma": 0.01, "schedule": "onecycle"},
        {"objective": "fgsm-rs-cs", "label_smoothing": 0.3},
        {"objective": "nu-at", "label_smoothing": 0.3, "awp_gamma": 0.01},
    ],
    ids=lambda more: more.get("objective", "free"),
)
def whole(request, device, tmp_path_factory):
    """A run that was not stopped: what it was given, its weights and its folder."""
    run, folder = {"config": replace(CONFIG, **request.param), "device": device}, tmp_path_factory.mktemp("run")
    return run, train(folder / "whole", **run).state_dict(), folder / "whole"


def test_a_run_that_is_stopped_again_and_again_ends_as_an_uninterrupted_one(tmp_path, whole):
    run, expected, folder = whole
    for stop_at in range(1, run["config"].epochs):
        for in_batch in (False, True):
            with pytest.raises(Stop):
                train(tmp_path, stop_at, in_batch=in_batch, **run)
    model = train(tmp_path, **run)
    assert equal_states(model.state_dict(), expected)
    assert_same_weights_files(folder, tmp_path)
    records = [runs.read(run).records for run in (folder, tmp_path)]
    assert [record.loss for record in records[0]] == [record.loss for record in records[1]]
    assert [record.total.macs for record in records[0]] == [record.total.macs for record in records[1]]
    assert [record.density for record in records[0]] == [record.density for record in records[1]]


def test_a_run_that_ends_between_any_two_files_continues_to_the_same_files(tmp_path, monkeypatch):
    config = replace(QUICK, epochs=2, ema_decay=0.9, lr=0.005)  # so slow that epoch 2 is the best
    rename = os.replace
    renamed = []
    monkeypatch.setattr(os, "replace", lambda *paths: renamed.append(rename(*paths)))
    expected = train(tmp_path / "whole", config=config).state_dict()
    assert len(renamed) >= 3 * config.epochs
    for moment in range(len(renamed)):
        folder, left = tmp_path / str(moment), iter(range(moment))

        def rename_some(*paths, left=left):
            if next(left, None) is None:
                raise Stop
            rename(*paths)

        monkeypatch.setattr(os, "replace", rename_some)
        with pytest.raises(Stop):
            train(folder, config=config)
        monkeypatch.setattr(os, "replace", rename)
        with pytest.raises(Stop):
            train(folder, 1, config=config)
        assert_best_weights_are_those_of_the_best_epoch(folder)
        assert equal_states(train(folder, config=config).state_dict(), expected)
        assert_same_weights_files(tmp_path / "whole", folder)


def test_a_finished_run_returns_without_training(tmp_path):
    expected = train(tmp_path)
    seen = []
    model = network()
    sparsify(model, masks.prune(model, density=0.5))
    images = Batches(TRAIN, 32)
    training.train(model, images, CONFIG, validation=VALIDATION, folder=tmp_path, on_epoch=seen.append)
    assert images.epoch == 0
    assert [record.epoch for record in seen] == [1, 2, 3, 4] and equal_states(model.state_dict(), expected.state_dict())


def test_a_damaged_epochs_file_is_rewritten_from_the_state(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, 2)
    written = (tmp_path / runs.EPOCHS).read_text()
    (tmp_path / runs.EPOCHS).write_text(written + '{"epoch": 3}\n{"half of a li')
    (tmp_path / runs.LAST).unlink()
    train(tmp_path)
    assert [record.epoch for record in runs.read(tmp_path).records] == [1, 2, 3, 4]


def test_a_folder_with_a_run_of_another_configuration_is_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(train.lr 0.1, now 0.2\)"):
        train(tmp_path, config=replace(CONFIG, lr=0.2))
    info = runs.read(tmp_path).info
    json_files.write(tmp_path / runs.INFO, replace(info, train=replace(CONFIG, lr=0.2)))
    with pytest.raises(ValueError, match="another configuration"):
        train(tmp_path, config=replace(CONFIG, lr=0.2))
    (tmp_path / runs.INFO).unlink()
    with pytest.raises(FileNotFoundError, match=r"but not the run\.json of its run"):
        train(tmp_path)


def test_a_call_that_was_refused_does_not_bind_the_next_one(tmp_path):
    with pytest.raises(ValueError, match="images"):
        training.train(network(), [(torch.full((2, 1, 6, 6), 2.0), torch.tensor([0, 1]))], CONFIG, folder=tmp_path)
    assert (tmp_path / runs.INFO).exists()
    train(tmp_path, config=replace(QUICK, lr=0.2))
    assert runs.read(tmp_path).info.train.lr == 0.2


@pytest.mark.parametrize("stop_at", [2, None])
@pytest.mark.parametrize("epochs", [4, 6])
def test_a_run_that_has_lost_its_state_is_not_begun_anew(tmp_path, stop_at, epochs):
    with contextlib.suppress(Stop):
        train(tmp_path, stop_at, config=replace(QUICK, epochs=4))
    (tmp_path / runs.STATE).unlink()
    written = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} has epochs\.jsonl, but not the state\.pt "):
        train(tmp_path, config=replace(QUICK, epochs=epochs))
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == written


def with_states(*changes: dict):
    """Contents of state.pt in which some entries have another value."""

    def changed(change):
        def damage(content: bytes) -> bytes:
            state = torch.load(io.BytesIO(content), weights_only=True)
            file = io.BytesIO()
            torch.save(state | change if change else [], file)
            return file.getvalue()

        return damage

    return [changed(change) for change in changes]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"no state",
        *with_states(
            {"records": []},
            {"model": None},
            {"optimizer": {}},
            {"identity": [{}]},
            {"objective": []},
            {"environment": 1},
        ),
    ],
)
def test_a_damaged_state_is_refused_and_not_overwritten(tmp_path, damage):
    with pytest.raises(Stop):
        train(tmp_path, 1)
    path = tmp_path / runs.STATE
    path.write_bytes(damage(path.read_bytes()))
    written = path.read_bytes()
    with pytest.raises(ValueError, match=r"state\.pt' is damaged"):
        train(tmp_path)
    assert path.read_bytes() == written


def test_a_run_continues_with_the_same_number_of_processes_only(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, 1)
    state = torch.load(tmp_path / runs.STATE, weights_only=True)
    torch.save(state | {"identity": 2 * state["identity"]}, tmp_path / runs.STATE)
    with pytest.raises(ValueError, match="holds a run of 2 processes, got 1: start as many"):
        train(tmp_path)


def test_a_state_holds_tensors_and_plain_data_only(tmp_path):
    train(tmp_path)
    state = torch.load(tmp_path / runs.STATE, weights_only=True)
    assert state["records"][-1]["epoch"] == 4 and state["optimizer"]["state"]


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    kill_9("--device", "cpu", "--width", "8", "--objective", "n-fgsm", folder=tmp_path)


def test_a_killed_run_ends_with_the_same_bits_of_a_deterministic_run(tmp_path, device):
    """A network under a mask of blocks, for which a GPU has kernels of its own; images moved and mirrored."""
    model = models.build("digits_cnn", width=32)
    kept = masks.prune(model, density=0.5, block=(32, 32), exclude=["conv1"])
    ticket = masks.Ticket(kept, model.state_dict(), {"arch": "digits_cnn", "width": 32})
    masks.save_ticket(tmp_path / "ticket", ticket)
    flags = ("--device", device.type, "--deterministic", "--ticket", str(tmp_path / "ticket"), "--augment")
    precision = "bfloat16" if device.type == "cuda" else "float32"
    kill_9(*flags, "--objective", "pgd", "--precision", precision, folder=tmp_path)
    killed = runs.read(tmp_path / "killed")
    assert killed.info.deterministic
    assert all(torch.device(record.device).type == device.type for record in killed.records)


def kill_9(*flags: str, folder) -> None:
    """Compare an uninterrupted run of the command line with one that was killed three times."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    recipe = ["train", "--arch", "digits_cnn", "--limit", "256", "--eps", "0.1", "--epochs", "6", "--steps", "2"]
    whole, killed = ([*recipe, *flags, "--out", str(folder / name)] for name in ("whole", "killed"))
    run_command(*whole)
    delays = random.Random(0)
    for _ in range(3):
        process, output = start_command(*killed)
        with output:
            output.readline()  # an epoch is saved: kill at some moment after it
            time.sleep(delays.random() * 0.3)
            process.kill()
            process.join()
    run_command(*killed)
    whole, killed = (runs.read(folder / run) for run in ("whole", "killed"))
    assert killed.result.test == whole.result.test
    assert equal_states(*(checkpoint.read_weights(run.folder / runs.LAST)[0] for run in (whole, killed)))


class Noisy(torch.nn.Sequential):
    """Draws numbers in eval mode too."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


def shuffled_loader():
    return DataLoader(TensorDataset(data.to_unit(VALIDATION.images), VALIDATION.labels), 7, shuffle=True)


@pytest.mark.parametrize("make", [shuffled_loader, lambda: Batches(VALIDATION, 7)], ids=["DataLoader", "Batches"])
def test_a_continued_run_measures_the_same_with_noise_and_shuffled_validation(tmp_path, make):
    config, results = replace(QUICK, objective="fgsm-rs", overfitting_monitor=False), []
    for name, stops in (("whole", [3]), ("parts", [1, 2, 3])):
        for stop in stops:
            torch.manual_seed(stop)
            model, state = Noisy(*network()), torch.get_rng_state()
            records = training.train(
                model,
                Batches(TRAIN, 32),
                config,
                validation=make(),
                folder=tmp_path / name,
                on_epoch=lambda record, stop=stop: record.epoch >= stop,
            )
            assert torch.get_rng_state().equal(state)
        measured = [(record.loss, record.clean_accuracy, record.robust_accuracy) for record in records]
        results.append((measured, model.state_dict()))
    assert len(results[0][0]) == 3 and results[0][0] == results[1][0]
    assert equal_states(results[0][1], results[1][1])


def test_too_little_memory_is_no_damage(tmp_path):
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("x"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert checkpoint.damaged(tmp_path, error) is error
    assert "delete its folder to start anew (KeyError: 'x')" in str(checkpoint.damaged(tmp_path, KeyError("x")))
