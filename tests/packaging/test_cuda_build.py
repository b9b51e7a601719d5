"""The CUDA sources compile for every GPU that is built for, with neither a GPU nor a CUDA torch; and how they load."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch

from sparse_adv.ops import _library, cuda_ops

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_it_compiles_for_sm_80_and_sm_90a_without_spilling(source, tmp_path):
    command = [
        *("nvcc", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--resource-usage"),
        *("-Xcompiler", "-fPIC,-Wall,-Wextra,-Wno-maybe-uninitialized,-Werror", "-Werror", "all-warnings"),
        *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"),
        *("-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")),
        *("-c", str(source), "-o", str(tmp_path / "object.o")),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spilled = [int(found) for found in re.findall(r"(\d+) bytes spill", run.stdout + run.stderr)]
    assert spilled and max(spilled) == 0


def test_there_are_cuda_sources():
    assert {source.stem for source in SOURCES} == {"pgd_step", "pgd_step_normalized", "random_start"}


@pytest.mark.parametrize(
    ("arch", "runs", "fails"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0+PTX", [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        ("9.0a", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("9.0a+PTX", [(9, 0)], [(8, 9), (9, 1), (10, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_on_which_gpus_code_for_a_capability_runs(arch, runs, fails):
    assert all(_library._runs_on(arch, *gpu) for gpu in runs)
    assert not any(_library._runs_on(arch, *gpu) for gpu in fails)


def test_a_torch_without_cuda_loads_no_cuda_library(monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    assert _library._load_cuda_ops(None) == "torch has no CUDA"


def test_another_cuda_major_is_told_and_not_loaded(monkeypatch):
    monkeypatch.setattr(_library.host, "cuda", "13.0.88")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"loaded {path}"))
    with pytest.warns(UserWarning, match=r"built with CUDA 13\.0\.88, torch has CUDA 12\.8\); build sparse_adv again"):
        _library._load_cuda_ops("12.8")


def test_a_library_that_does_not_load_is_told(monkeypatch):
    def fail(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(_library.host, "cuda", "13.0.88")
    monkeypatch.setattr(torch.ops, "load_library", fail)
    with pytest.warns(UserWarning, match="cannot be loaded \\(undefined symbol\\)"):
        assert _library._load_cuda_ops("13.1") == "undefined symbol"


def test_a_gpu_that_the_ops_were_not_built_for_is_told(monkeypatch):
    monkeypatch.setattr(_library.host, "cuda_archs", "8.0 9.0+PTX")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"capability 8\.0 9\.0\+PTX, Tesla T4 has 7\.5: set TORCH_CUDA_ARCH_LIST"):
        _library._check_capability.__wrapped__(0)


def test_what_computes_on_cuda_is_said():
    expected = "Triton kernels" if _library._why_no_cuda_ops else "CUDA C++"
    assert cuda_ops().startswith(expected)


@pytest.fixture
def options(monkeypatch, tmp_path):
    """`setup.cuda_options` for a torch with this CUDA and an nvcc of that release."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))

    def options(torch_cuda, nvcc_release):
        compiler = tmp_path / "bin" / "nvcc"
        compiler.parent.mkdir(exist_ok=True)
        compiler.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {nvcc_release}, V0'\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return setup["cuda_options"](torch_cuda)

    return options


def test_a_torch_without_cuda_builds_no_cuda_ops(options):
    assert options(None, "13.0") == []


def test_an_nvcc_of_another_major_builds_no_cuda_ops_and_says_so(options, capfd):
    assert options("12.8", "13.0") == []
    assert "torch has CUDA 12.8" in capfd.readouterr().out


@pytest.mark.parametrize(("wanted", "given"), [("", "8.0 9.0+PTX"), ("8.6;9.0a", "8.6 9.0a"), ("9.0", "9.0")])
def test_the_architectures_are_torchs_variable(options, monkeypatch, wanted, given):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert f"-DSPARSE_ADV_CUDA_ARCHS={given}" in options("13.2", "13.0")
