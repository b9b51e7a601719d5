"""Which device a process gets, and which backend the process group has."""

import os

import pytest
import torch
import torch.distributed as dist

from sparse_adv.training import distributed

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """A function that imitates a machine with so many GPUs, and the environment that torchrun gives a rank."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def become(gpus: int, rank: int | None = None, processes: int = 1, machines: int = 1) -> list:
        calls: list = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", calls.append)
        monkeypatch.setattr(dist, "init_process_group", calls.append)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        if rank is not None:
            local = processes // machines
            numbers = (rank, rank % local, processes, local, machines)
            for name, number in zip(LAUNCHED, numbers, strict=True):
                monkeypatch.setenv(name, str(number))
        return calls

    return become


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_what_torchrun_has_not_set_is_named(machine, monkeypatch, name):
    machine(0, 0, 1)
    monkeypatch.setenv(name, "one")
    said = f"the environment variable {name} must be a number, .* got 'one'"
    with pytest.raises(ValueError, match=said), distributed.group("cpu"):
        pass


CPU, GPU_0, GPU_1 = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("gpus", "launched", "name", "device", "backend"),
    [
        (0, (), "auto", CPU, None),
        (2, (), "auto", GPU_0, None),
        (2, (), "cpu", CPU, None),
        (2, (), "cuda:1", GPU_1, None),
        (2, (), GPU_1, GPU_1, None),
        (0, (1, 2), "auto", CPU, "gloo"),
        (1, (1, 2), "cpu", CPU, "gloo"),
        (2, (0, 2), "auto", GPU_0, "nccl"),
        (2, (1, 2), "cuda", GPU_1, "nccl"),
        (2, (3, 4, 2), "cuda", GPU_1, "nccl"),
        (1, (0, 1), "cuda:0", GPU_0, "nccl"),
        (1, (0, 2), "cuda:0", GPU_0, "gloo"),
        (2, (0, 2), "cuda:1", GPU_1, "gloo"),
        (2, (1, 2), "cuda:1", GPU_1, "gloo"),
        (1, (1, 2, 2), "cuda:0", GPU_0, "nccl"),
        (1, (3, 4, 2), "cuda:0", GPU_0, "gloo"),
    ],
)
def test_each_process_gets_its_own_gpu_or_the_one_that_is_named(machine, gpus, launched, name, device, backend):
    calls = machine(gpus, *launched)
    with distributed.group(name) as own:
        assert own == device
    assert calls == [*([device] if device.type == "cuda" else []), *([backend] if backend else [])]


@pytest.mark.parametrize(
    ("gpus", "launched", "name", "message"),
    [
        (1, (0, 2), "auto", r"'cuda' gives each process a GPU of its own, got 2 processes and 1 GPU: start at most 1 "),
        (2, (3, 4), "cuda", r"got 4 processes and 2 GPUs: start at most 2 \(--nproc-per-node 2\), take device cpu, or"),
        (1, (), "cuda:1", r"'cuda:1' is not available: this torch has 1 GPU, numbered from 0"),
        (0, (), "cuda", r"'cuda' is not available: this torch has no CUDA GPU"),
        (1, (), "cuda:x", r"device must be auto, cpu, cuda or a GPU such as cuda:0, got 'cuda:x'"),
        (1, (), "meta", r"got 'meta'"),
    ],
)
def test_an_unavailable_device_is_refused_before_a_group_is_created(machine, gpus, launched, name, message):
    calls = machine(gpus, *launched)
    with pytest.raises(ValueError, match=message), distributed.group(name):
        raise AssertionError("the block was entered")
    assert calls == []


def test_an_existing_group_is_used(machine, monkeypatch):
    calls = machine(0, 0, 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with distributed.group("cpu") as own:
        assert own == CPU and os.environ["WORLD_SIZE"] == "2"
    assert calls == []
