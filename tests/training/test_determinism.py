"""With deterministic algorithms, training repeats bit for bit on every device."""

import os
import sys
from dataclasses import replace

import pytest
import torch
from helpers.refusal import refused
from helpers.small_runs import TRAIN, VALIDATION, WITH_ENGINE, Batches, bars, batches, equal_states, network

from sparse_adv import data, masks, models, runs, sparsify, training
from sparse_adv.__main__ import main
from sparse_adv.ops.cudnn_benchmark import fastest_convolutions
from sparse_adv.training import deterministic, loop

WORKSPACE, COMPILER = "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_DETERMINISTIC"


def settings() -> tuple:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_deterministic_sets_the_options_of_pytorch_and_restores_them(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with pytest.raises(KeyError), deterministic():
        assert settings() == (True, False, False, False) and os.environ[WORKSPACE] == ":4096:8"
        raise KeyError
    assert settings() == before
    with deterministic(False):
        assert settings() == before


@pytest.mark.parametrize("mode", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("flags", [(True, False), (False, True)])
def test_what_the_caller_had_set_is_restored(monkeypatch, mode, flags):
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", flags[0])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", flags[1])
    try:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        with deterministic():
            assert settings() == (True, False, False, False)
        assert settings() == (*mode, *flags)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("before", [None, "0"])
def test_the_compiler_is_deterministic_too_whether_it_is_imported_or_will_be(monkeypatch, before):
    from torch._inductor import config

    monkeypatch.delenv(COMPILER, raising=False)
    if before:
        monkeypatch.setenv(COMPILER, before)
    with deterministic():
        assert config.deterministic and os.environ[COMPILER] == "1"
    assert not config.deterministic and os.environ.get(COMPILER) == before
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "torch._inductor.config")
        with deterministic():
            assert settings()[:2] == (True, False) and os.environ[COMPILER] == "1"
            assert not config.deterministic  # it was not imported
        assert settings()[:2] == (False, False)


def test_a_cublas_workspace_that_is_not_deterministic_is_refused(monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    before = settings()
    with pytest.raises(ValueError, match=f"{WORKSPACE} must be :4096:8 or :16:8 .*, got ':0:0'"), deterministic():
        raise AssertionError("the block was entered")
    assert settings() == before


@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        *((arch, "bfloat16") for arch in ("vgg16", "resnet18", "preact_resnet18", "wrn-10-1", "digits_cnn")),
        *((arch, "float32") for arch in ("vgg16", "resnet18")),  # the others have no other kinds of layers
    ],
)
def test_training_of_every_network_repeats_bit_for_bit(device, arch, precision):
    """On a GPU an operation without a deterministic algorithm would raise an error."""
    split = images(16).to(device)
    config = replace(WITH_ENGINE, objective="pgd", precision=precision, epochs=2, evaluate_every=2)
    with deterministic():
        states = []
        for _ in range(2):
            model = models.build(arch, 0, width=8, classes=2, input_shape=(3, 16, 16)).to(device)
            batches = Batches(split, 8, augment=True)
            training.train(model, batches, config, validation=split)
            states.append(model.state_dict())
    assert equal_states(*states)


def images(count: int) -> data.Split:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, 16, 16)
    return data.Split(torch.randint(256, shape, generator=generator, dtype=torch.uint8), torch.arange(count) % 2)


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_no_uninitialised_memory_is_read(device, objective):
    """PyTorch can fill new memory with NaN, which must not change the results."""
    config = replace(WITH_ENGINE, objective=objective, replays=2, ema_decay=0.9, max_grad_norm=1.0, epochs=2)
    states = []
    for fill in (False, True):
        with deterministic():
            torch.utils.deterministic.fill_uninitialized_memory = fill
            model = network(channels=32 if device.type == "cuda" else 4).to(device)
            sparsify(model, masks.prune(model, density=0.5, block=(32, 32) if device.type == "cuda" else (1, 1)))
            training.train(model, Batches(TRAIN.to(device), 32), config, validation=VALIDATION.to(device))
        states.append(model.state_dict())
    assert equal_states(*states)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_run_records_its_device_and_whether_it_is_deterministic(device, enabled, tmp_path):
    with deterministic(enabled):
        model = network().to(device)
        batches = Batches(bars(8, 0).to(device), 8)
        (record,) = training.train(model, batches, replace(WITH_ENGINE, epochs=1), folder=tmp_path)
    assert torch.device(record.device).type == device.type
    assert runs.read(tmp_path).info.deterministic is enabled


def test_a_deterministic_run_is_not_continued_without_determinism(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    run = ("train", "--arch", "digits_cnn", "--width", "8", "--limit", "200", "--epochs", "1", "--objective", "natural")
    assert main([*run, "--deterministic", "--out", str(tmp_path)]) == 0
    assert runs.read(tmp_path).info.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert "deterministic True, now False" in refused(capsys, *run, "--out", str(tmp_path))


def test_a_first_step_that_overflows_leaves_no_uninitialised_momentum():
    """PyTorch's fused SGD makes new memory the momentum in its first step, also if it skips the step."""
    model, scales = network(), []
    with deterministic():
        torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
        run = training.Training(model, batches(), replace(WITH_ENGINE, epochs=1, precision="float16"))
        run.updater.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        for _ in run.epochs(lambda _: scales.append(run.updater.scaler.get_scale())):
            pass
    assert scales == [2.0**10] * 3  # the first step was skipped, and no other
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not equal_states(model.state_dict(), network().state_dict())


@pytest.mark.parametrize("before", [False, True])
def test_training_on_cuda_lets_cudnn_choose_and_leaves_the_flag_as_it_was(monkeypatch, before):
    cudnn, cuda = torch.backends.cudnn, torch.device("cuda")
    monkeypatch.setattr(cudnn, "benchmark", before)
    for device in (cuda, torch.device("cpu")):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "fastest_convolutions", lambda _, device=device: fastest_convolutions(device))
            seen = []
            run = training.Training(network(), batches(), replace(WITH_ENGINE, epochs=2), validation=VALIDATION)
            for _ in run.epochs(lambda _, seen=seen: seen.append(cudnn.benchmark)):
                assert cudnn.benchmark is before
            assert seen == [before or device == cuda] * 6
    with pytest.raises(KeyError), fastest_convolutions(cuda):
        raise KeyError
    assert cudnn.benchmark is before


def test_cudnn_does_not_choose_where_deterministic_algorithms_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    cuda = torch.device("cuda")
    with deterministic(), fastest_convolutions(cuda):
        assert not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with fastest_convolutions(cuda):
        assert not torch.backends.cudnn.benchmark
