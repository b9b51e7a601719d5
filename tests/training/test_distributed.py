"""Several processes train as one: with the same batches, repeatably; a lost process costs one epoch at most."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.forked import run_command, run_command_by_rank
from helpers.process_group import results_by_rank
from helpers.small_runs import QUICK, TRAIN, VALIDATION, WITH_ENGINE, Batches, equal_states, network

from sparse_adv import masks, models, runs, training
from sparse_adv.training import checkpoint
from sparse_adv.training.distributed import own_seed
from sparse_adv.training.random_numbers import Stream
from sparse_adv.training.update import Updater

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

FLAGS = [
    "--device",
    "cpu",
    "--arch",
    "digits_cnn",
    "--width",
    "8",
    "--limit",
    "300",
    "--batch-size",
    "64",
    "--epochs",
    "3",
    "--objective",
    "fgsm-rs",
    "--eps",
    "0.1",
    "--evaluation-steps",
    "2",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def torchrun(out, *more: str, program: tuple[str, ...] = ("-m", "sparse_adv")) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, *program, "train", *FLAGS, "--out", str(out), *more]


def run(command: list[str]) -> list[dict]:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(records(done.stdout.splitlines()))


def records(lines: Iterable[str]) -> Iterator[dict]:
    """Without the lines, or pieces of lines, in which Gloo of torch 2.10 says which ranks it has connected."""
    told = (line for line in lines if "[Gloo]" not in line and "connected peer ranks" not in line)
    return (json.loads(line) for line in told if line)  # two processes of torch 2.10 may end their lines together


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    path = tmp_path_factory.mktemp("ticket") / "ticket.safetensors"
    model = models.build("digits_cnn", width=8)
    pruned = masks.prune(model, density=0.1, linear=True)
    masks.save_ticket(path, masks.Ticket(pruned, model.state_dict(), {"arch": "digits_cnn", "width": 8}))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ticket):
    out = tmp_path_factory.mktemp("distributed") / "whole"
    return out, run(torchrun(out, "--ticket", str(ticket)))


def test_one_process_prints_and_each_image_is_used_once(whole):
    out, lines = whole
    assert [line.get("epoch") for line in lines] == [1, 2, 3, None]
    assert [record.images for record in runs.read(out).records] == [270] * 3
    assert lines[-1]["test"].keys() == {"clean", "fgsm", "pgd-20"}


def test_gradients_of_pruned_weights_are_not_sent(whole, ticket):
    record = whole[1][2]
    model = models.build("digits_cnn", width=8)
    total = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(int((~mask).count_nonzero()) for mask in masks.load_ticket(ticket).masks.values())
    assert record["bytes_dense"] == 4 * total * record["step"]
    assert record["bytes_sent"] == 4 * (total - pruned) * record["step"]


def test_two_processes_learn_like_one(whole, tmp_path, ticket):
    """Each half of a batch has its own BatchNorm statistics, so the losses are close but not equal."""
    run_command("train", *FLAGS, "--ticket", str(ticket), "--out", str(tmp_path / "one"))
    two, one = (runs.read(folder) for folder in (whole[0], tmp_path / "one"))
    assert [record.step for record in two.records] == [record.step for record in one.records]
    assert two.records[-1].loss == pytest.approx(one.records[-1].loss, rel=0.2)


def test_a_lost_process_ends_the_job_with_one_message_and_the_run_continues(whole, tmp_path, ticket):
    out = tmp_path / "killed"
    kill_and_continue(out, "--ticket", str(ticket))
    assert last(out) == last(whole[0])


THREE = {
    "free": replace(WITH_ENGINE, objective="free", replays=2),
    "fgsm-uap": replace(WITH_ENGINE, objective="fgsm-uap", awp_gamma=0.01, ema_decay=0.9),
    "fgsm-rs-cs": replace(WITH_ENGINE, objective="fgsm-rs-cs", epochs=5, ema_decay=0.9, schedule="onecycle"),
}
"""Objectives with a state of their own in each process."""


def train_in_three(rank, folder):
    """For each objective the weights of a whole run, and of one that was stopped after an epoch and continued.

    "evaluated" are the networks that this process evaluated.
    """
    seeds = [own_seed(7, Stream.BATCHES, epoch) for epoch in range(3)]
    results, end_epoch = {"evaluated": [], "seeds": seeds}, Updater.end_epoch

    def end_and_keep(self, epoch):
        end_epoch(self, epoch)
        results["evaluated"].append({name: tensor.clone() for name, tensor in self.evaluated.state_dict().items()})

    Updater.end_epoch = end_and_keep
    for name, config in THREE.items():
        whole = train(config, rank, folder / name)
        train(config, rank, folder / f"{name}_stopped", stop_at=1)
        results[name] = whole, train(config, rank, folder / f"{name}_stopped")
    return results


def train(config, rank, folder, stop_at=None):
    model, batches = network(), Batches(TRAIN, 24, rank=rank, world_size=3)
    if config.objective == "free":  # a list of its own in each process, which has its own identity
        batches = list(batches)
    watch = {"validation": VALIDATION, "on_epoch": lambda record: record.epoch == stop_at}
    training.train(model, batches, config, folder=folder, **watch)
    return model.state_dict()


class Freezing(training.UpdateHook):
    def begin(self, updater):
        self.model = updater.model

    def after_update(self, step, gradients):
        self.model[0].weight.requires_grad_(step != 2)
        return False


def differ(rank, folder):
    """What two processes say that are not alike, and where they end."""

    def outcome(batches=2, hook=None, on_epoch=None, model=None, **changes):
        model, given = model or network(), list(Batches(TRAIN, 24, rank=rank, world_size=2))[:batches]
        config = replace(QUICK, **changes)
        try:
            return len(training.train(model, given, config, hook=hook, on_epoch=on_epoch))
        except ValueError as error:
            return str(error)

    wide = network().double()
    images = [(x.double(), y) for x, y in Batches(TRAIN, 24, rank=rank, world_size=2)]
    training.train(wide, images, replace(QUICK, epochs=1))
    statistics = wide[1].running_mean
    return {
        "config": outcome(lr=0.1 + rank),
        "epochs": outcome(epochs=2 + rank),
        "batches": outcome(batches=1 + rank),
        "frozen": outcome(hook=Freezing()),
        "stopped by one": outcome(on_epoch=lambda record: rank == 1 and record.epoch == 2),
        "bits of float64": not statistics.equal(statistics.float().double()),
    }


def test_processes_that_are_not_alike_are_told_so_and_end_together(tmp_path):
    ends = results_by_rank(differ, tmp_path)
    assert ends[0] == ends[1]
    end = ends[0]
    assert end["config"] == "lr must be the same in all processes, got 0.1, 1.1 by rank"
    assert end["epochs"] == "epochs must be the same in all processes, got 2, 3 by rank"
    assert end["batches"] == "len(batches) must be the same in all processes, got 1, 2 by rank"
    assert end["frozen"].startswith("hook must not freeze or unfreeze parameters in a run of several processes, as it ")
    assert end["stopped by one"] == 2 and end["bits of float64"] is True


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return results_by_rank(train_in_three, tmp_path_factory.mktemp("three"), 3)


def test_all_processes_evaluate_the_same_network(three):
    """Weights, statistics of BatchNorm and their moving averages."""
    first, *others = (rank["evaluated"] for rank in three)
    assert len(first) > 2 * len(THREE)
    for evaluated in others:
        assert all(equal_states(*pair) for pair in zip(first, evaluated, strict=True))


def test_each_process_draws_numbers_of_its_own(three):
    seeds = [seed for rank in three for seed in rank["seeds"]]
    assert len(set(seeds)) == len(seeds) == 9


@pytest.mark.parametrize("name", THREE)
def test_a_stopped_run_of_three_ends_with_the_same_weights(three, name):
    """The sum of three gradients depends on their order, and each process has perturbations of its own."""
    assert all(equal_states(*rank[name]) for rank in three)
    for key, weight in three[0][name][0].items():
        assert "running" in key or all(torch.equal(rank[name][0][key], weight) for rank in three)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_processes_that_share_a_gpu_continue_bit_for_bit(tmp_path, ticket):
    more = ("--device", "cuda:0", "--deterministic", "--ticket", str(ticket))
    lines = run(torchrun(tmp_path / "whole", *more))
    assert lines[0]["device"] == "cuda:0" and lines[0]["images"] == 270
    kill_and_continue(tmp_path / "killed", *more)
    assert last(tmp_path / "killed") == last(tmp_path / "whole")


def kill_and_continue(out: Path, *more: str) -> None:
    """Kill a process of the job after its first epoch; then finish the run."""
    job = subprocess.Popen(
        torchrun(out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert next(records(job.stdout))["epoch"] == 1
    os.kill(_worker(job.pid, rank=1), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "start the same command again" in errors and errors.count("sparse-adv: ") == 1
    assert runs.read(out).result is None
    ends = run_command_by_rank(out.parent, "train", *FLAGS, "--out", str(out), *more)
    assert [code for code, _ in ends] == [0, 0], ends


def last(out: Path) -> dict[str, bytes]:
    """The bytes of the last weights of a run."""
    return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.read_weights(out / runs.LAST)[0].items()}


def _worker(parent: int, rank: int) -> int:
    """The process of a rank among torchrun's children."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with open(f"/proc/{child}/environ", "rb") as variables:
                if f"RANK={rank}".encode() in variables.read().split(b"\0"):
                    return int(child)
        time.sleep(0.05)
    raise AssertionError(f"torchrun started no process of rank {rank}")


def assert_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    printed = [line for line in lines if line.startswith("sparse-adv: ")]
    assert len(printed) == 1 and printed[0].startswith("sparse-adv: error: ") and message in printed[0]
    assert not (tmp_path / "run").exists()


def test_a_refusal_before_there_is_a_group_is_printed_by_one_of_the_processes(tmp_path):
    one_gpu = str(Path(__file__).parents[1] / "helpers" / "one_gpu.py")
    command = torchrun(tmp_path / "run", "--device", "auto", program=(one_gpu,))
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    message = "got 2 processes and 1 GPU: start at most 1 (--nproc-per-node 1), take device cpu, "
    assert_refused(tmp_path, done.stderr.splitlines(), message)
    assert done.returncode != 0 and "exitcode  : 2 " in done.stderr and "invalid device" not in done.stderr


def test_a_refusal_within_the_group_is_printed_by_one_of_the_processes(tmp_path):
    ends = run_command_by_rank(tmp_path, "train", *FLAGS, "--batch-size", "63", "--out", str(tmp_path / "run"))
    assert [code for code, _ in ends] == [2, 2]
    message = "--batch-size must be a positive multiple of world_size (2), got 63"
    assert_refused(tmp_path, [line for _, lines in ends for line in lines], message)
