"""Several processes train as one: with the same batches, repeatably; a lost process costs one epoch at most."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from sparse_adv import masks, models, runs
from sparse_adv.training import checkpoint

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


def torchrun(out, *more: str, processes: int = 2, program: tuple[str, ...] = ("-m", "sparse_adv")) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *program, "train", *FLAGS, "--out", str(out), *more]


def run(command: list[str]) -> list[dict]:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(records(done.stdout.splitlines()))


def records(lines: Iterable[str]) -> Iterator[dict]:
    """Without the lines, or pieces of lines, in which Gloo of torch 2.10 says which ranks it has connected."""
    return (json.loads(line) for line in lines if "[Gloo]" not in line and "connected peer ranks" not in line)


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


def test_the_same_command_gives_the_same_weights(whole, tmp_path, ticket):
    run(torchrun(tmp_path / "again", "--ticket", str(ticket)))
    assert last(tmp_path / "again") == last(whole[0])


def test_two_processes_learn_like_one(tmp_path):
    """Each half of a batch has its own BatchNorm statistics, so the losses are close but not equal."""
    run(torchrun(tmp_path / "two"))
    alone = [sys.executable, "-m", "sparse_adv", "train", *FLAGS, "--out", str(tmp_path / "one")]
    run(alone)
    two, one = (runs.read(tmp_path / name) for name in ("two", "one"))
    assert [record.step for record in two.records] == [record.step for record in one.records]
    assert two.records[-1].loss == pytest.approx(one.records[-1].loss, rel=0.2)
    assert two.result.total.macs == pytest.approx(one.result.total.macs, rel=0.01)


def test_a_lost_process_ends_the_job_with_one_message_and_the_run_continues(whole, tmp_path, ticket):
    out = tmp_path / "killed"
    kill_and_continue(torchrun(out, "--ticket", str(ticket)), out)
    assert last(out) == last(whole[0])


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("free", ("--replays", "2")),
        ("fgsm-uap", ("--awp-gamma", "0.01", "--ema-decay", "0.9")),
        ("fgsm-rs-cs", ("--epochs", "5", "--ema-decay", "0.9", "--schedule", "onecycle")),
    ],
)
def test_a_run_of_three_that_lost_a_process_ends_with_the_same_weights(tmp_path, objective, more):
    """The sum of three gradients depends on their order, and each process has perturbations of its own."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--batch-size", "63", "--objective", objective, *more)
    run(torchrun(whole, *more, processes=3))
    kill_and_continue(torchrun(killed, *more, processes=3), killed)
    assert last(killed) == last(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_processes_that_share_a_gpu_continue_bit_for_bit(tmp_path, ticket):
    more = ("--device", "cuda:0", "--deterministic", "--ticket", str(ticket))
    lines = run(torchrun(tmp_path / "whole", *more))
    assert lines[0]["device"] == "cuda:0" and lines[0]["images"] == 270
    kill_and_continue(torchrun(tmp_path / "killed", *more), tmp_path / "killed")
    assert last(tmp_path / "killed") == last(tmp_path / "whole")


def kill_and_continue(command: list[str], out: Path) -> None:
    """Kill a process of the job after its first epoch; then finish the run."""
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert next(records(job.stdout))["epoch"] == 1
    os.kill(_worker(job.pid, rank=1), signal.SIGKILL)
    _, errors = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "start the same command again" in errors and errors.count("sparse-adv: ") == 1
    assert runs.read(out).result is None
    run(command)


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch-size", "63"), "batch_size must be a positive multiple of world_size (2), got 63"),
        (("--device", "auto"), "got 2 processes and 1 GPU: start at most 1 (--nproc-per-node 1), take device cpu, "),
    ],
)
def test_a_refusal_is_printed_by_one_of_the_processes(tmp_path, more, message):
    command = torchrun(tmp_path / "run", *more, program=(str(Path(__file__).parents[1] / "helpers" / "one_gpu.py"),))
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert done.returncode != 0 and not (tmp_path / "run").exists()
    printed = [line for line in done.stderr.splitlines() if line.startswith("sparse-adv: ")]
    assert len(printed) == 1 and printed[0].startswith("sparse-adv: error: ") and message in printed[0]
    assert "exitcode  : 2 " in done.stderr and "invalid device" not in done.stderr
