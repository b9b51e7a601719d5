"""A run folder belongs to one thread at a time, and a run writes only to the folder that it began in."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.forked import CONTEXT
from helpers.small_runs import QUICK, TEST, VALIDATION, batches, network

from sparse_adv import experiment, runs, tickets, training
from sparse_adv.config import PruneConfig
from sparse_adv.training.folder_lock import hold

SECONDS = 120


def hold_until_told(folder, connection):
    lock = hold(folder)
    connection.send(os.getpid())
    connection.recv()
    lock.check()


@pytest.fixture
def other_process(tmp_path):
    """Another process that holds the lock, and the connection on which it waits."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold_until_told, args=(tmp_path, there))
    process.start()
    assert here.poll(SECONDS) and here.recv() == process.pid
    yield process
    process.kill()
    process.join()


def run(folder, **more):
    return training.train(network(), batches(), QUICK, folder=folder, **more)


def search(folder, **more):
    return tickets.search(network(), batches(), QUICK, PruneConfig(0.5), folder=folder, **more)


@pytest.mark.parametrize("begin", [run, search])
def test_a_folder_that_another_process_writes_to_is_refused_until_it_ends(tmp_path, other_process, begin):
    refusal = rf"{tmp_path} is being written by another process \(pid {other_process.pid} on "
    with pytest.raises(BlockingIOError, match=refusal):
        begin(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [runs.LOCK]
    other_process.kill()
    other_process.join()
    begin(tmp_path)


@pytest.mark.parametrize("begin", [run, search])
def test_a_folder_that_another_thread_writes_to_is_refused_until_it_ends(tmp_path, begin):
    errors, folder = [], tmp_path / "run"

    def begin_too(record):
        with pytest.raises(BlockingIOError, match=f"{folder} is being written by another thread of this process"):
            begin(folder)
        errors.append(record.epoch)

    def in_another_thread(record):
        thread = threading.Thread(target=begin_too, args=(record,))
        thread.start()
        thread.join()

    begin(folder, on_epoch=in_another_thread)
    assert errors
    thread = threading.Thread(target=begin, args=(folder,))  # it returns what is there
    thread.start()
    thread.join()


@pytest.mark.parametrize("begin", [run, search])
def test_a_run_stays_in_its_folder_where_the_working_directory_changes(tmp_path, monkeypatch, begin):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    begin("run", on_epoch=lambda record: os.chdir(tmp_path / "elsewhere"))
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "run" / runs.INFO).exists()


def test_all_ranks_share_the_folder_that_rank_0_has_locked(tmp_path, other_process, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    hold(tmp_path).check()
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(BlockingIOError, match="is being written by another process"):
        hold(tmp_path)


def replace_folder(folder):
    shutil.rmtree(folder)
    runs.begin(folder, runs.RunInfo("train", replace(QUICK, seed=5)))
    return hold(folder)


@pytest.mark.parametrize("begin", [run, search])
@pytest.mark.parametrize("change", [shutil.rmtree, replace_folder])
def test_a_run_ends_when_its_folder_was_deleted_or_replaced(tmp_path, begin, change):
    folder, trained, kept = tmp_path / "run", [], []

    def on_epoch(record):
        trained.append(record.epoch)
        if len(trained) == 1:
            kept.append(change(folder))

    with pytest.raises(FileNotFoundError, match="was deleted or replaced while its run went on"):
        begin(folder, on_epoch=on_epoch)
    assert trained == [1]
    written = {file.name for file in folder.iterdir()} if folder.exists() else set()
    assert written == (set() if change is shutil.rmtree else {runs.INFO, runs.LOCK})


def test_the_final_test_is_not_written_to_a_folder_that_was_replaced(tmp_path, monkeypatch):
    folder, model = tmp_path / "run", network()
    records = training.train(model, batches(), QUICK, folder=folder, validation=VALIDATION)
    kept = []

    def fgsm_accuracy(*arguments, **options):
        kept.append(replace_folder(folder))
        return training.fgsm_accuracy(*arguments, **options)

    monkeypatch.setattr("sparse_adv.training.result.fgsm_accuracy", fgsm_accuracy)
    with pytest.raises(FileNotFoundError, match="was deleted or replaced"):
        training.final_test(model, folder, records, QUICK, TEST)
    assert not (folder / runs.RESULT).exists()


def test_a_forked_process_does_not_hold_the_lock_of_its_parent(tmp_path):
    lock = hold(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(SECONDS,))
    child.start()
    try:
        del lock
        here, there = CONTEXT.Pipe()
        other = CONTEXT.Process(target=hold_until_told, args=(tmp_path, there))
        other.start()
        assert here.poll(SECONDS) and here.recv() == other.pid
        here.send("end")
        other.join()
        assert other.exitcode == 0
    finally:
        child.kill()


def test_a_file_system_without_locks_is_written_without_one(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert len(run(tmp_path)) == QUICK.epochs


def test_a_result_that_appears_in_the_folder_of_a_run_is_not_returned_as_its_own(tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    images, net = experiment.DataConfig("digits", limit=60), experiment.NetworkConfig("digits_cnn", width=4)
    config = replace(QUICK, epochs=1)
    cpu = torch.device("cpu")
    dataset = experiment.load_data(images, 0, cpu)
    first, second = (
        experiment.TrainRun(tmp_path / name, replace(config, seed=seed), images, net, dataset, cpu)
        for seed, name in enumerate("ab")
    )
    for made in (first, second):
        list(made.epochs())
    other = first.finish()
    shutil.copy(tmp_path / "a" / runs.RESULT, tmp_path / "b")
    own = second.finish()
    assert own != other and runs.read(tmp_path / "b").result == own


def test_what_a_killed_process_has_half_written_is_deleted_with_the_lock(tmp_path):
    kept = "mine.txt", ".123.notes.txt", f".draft.{runs.STATE}"
    for name in (f".123.{runs.STATE}", f".4567.{runs.LAST}", *kept):
        (tmp_path / name).touch()
    lock = hold(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {*kept, runs.LOCK}
    lock.check()
