"""Which device a process of a run takes, and over which backend the processes talk."""

import os

import pytest
import torch
import torch.distributed as dist

from sparse_adv.training import distributed

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")


@pytest.fixture
def machine(monkeypatch):
    """Call it for a machine of so many GPUs, and as torchrun would for a rank of so many processes on some machines."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)

    def become(gpus: int, rank: int | None = None, processes: int = 1, machines: int = 1) -> list:
        done: list = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", done.append)
        monkeypatch.setattr(dist, "init_process_group", done.append)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
        if rank is not None:
            local = processes // machines
            numbers = (rank, rank % local, processes, local, machines)
            for name, number in zip(LAUNCHED, numbers, strict=True):
                monkeypatch.setenv(name, str(number))
        return done

    return become


CPU, GPU_0, GPU_1 = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


@pytest.mark.parametrize(
    ("gpus", "launched", "asked", "device", "backend"),
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
def test_each_process_takes_its_gpu_or_the_one_that_was_named(machine, gpus, launched, asked, device, backend):
    done = machine(gpus, *launched)
    with distributed.group(asked) as own:
        assert own == device
    assert done == [*([device] if device.type == "cuda" else []), *([backend] if backend else [])]


@pytest.mark.parametrize(
    ("gpus", "launched", "asked", "said"),
    [
        (1, (0, 2), "auto", r"'cuda' gives each process a GPU of its own, got 2 processes and 1 GPU: start at most 1 "),
        (2, (3, 4), "cuda", r"got 4 processes and 2 GPUs: start at most 2 \(--nproc-per-node 2\), take device cpu, or"),
        (1, (), "cuda:1", r"'cuda:1' is not available: this torch has 1 GPU, numbered from 0"),
        (0, (), "cuda", r"'cuda' is not available: this torch has no CUDA GPU"),
        (1, (), "cuda:x", r"device must be auto, cpu, cuda or a GPU such as cuda:0, got 'cuda:x'"),
        (1, (), "meta", r"got 'meta'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_begun(machine, gpus, launched, asked, said):
    done = machine(gpus, *launched)
    with pytest.raises(ValueError, match=said), distributed.group(asked):
        raise AssertionError("the context began")
    assert done == []


def test_a_group_that_is_there_is_left_alone(machine, monkeypatch):
    done = machine(0, 0, 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with distributed.group("cpu") as own:
        assert own == CPU and os.environ["WORLD_SIZE"] == "2"
    assert done == []
