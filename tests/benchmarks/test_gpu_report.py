"""The check of a GPU: which tests its parts run, how long they may take, and the report, also where a part failed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
from harness import write_records

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
"""Options for the run of these tests are not for the ones that they start."""
BENCHMARKS = ROOT / "benchmarks"
ROW = {
    "op": "pgd_step linf",
    "shape": "128x3x32x32",
    "dtype": "float32",
    "ours_ms": 2e-3,
    "eager_ms": 8e-3,
    "bound_ms": 1.82e-3,
    "ratio": 4.0,
    "spread": 0.07,
}
FAILING = """\
import ctypes, pytest
def test_fine(): pass
def test_wrong(): assert 2 + 2 == 5
@pytest.mark.parametrize("name", ["other", "two words"])
def test_ends_the_process(name):
    if name == "two words": ctypes.string_at(0)
"""
ENDS = "test_it.py::test_ends_the_process"


@pytest.fixture
def reported(tmp_path, monkeypatch, capsys):
    """Makes the report of the test's folder; returns what is printed."""

    def run() -> str:
        gpu_report.main([str(tmp_path)])
        return capsys.readouterr().out

    return run


def test_parts_and_rows_become_a_file_and_a_table(tmp_path, reported, monkeypatch):
    monkeypatch.setenv("COMMIT", "abc")
    (tmp_path / "parts.tsv").write_text("build\t0\t40\t75\t\npgd_step\t0\t20\t30\tno l2\nmemcheck\t127\t1\t45\t\n")
    write_records(tmp_path / "pgd_step.csv", [ROW], {"commit": "abc"})
    (tmp_path / "memcheck.log").write_text("no such tool\n")
    (tmp_path / "of_an_earlier_check.csv").write_text("op\nother\n")
    printed = reported()
    assert "| build | ok | 40 | 75 |  |" in printed and "| pgd_step | ok | 20 | 30 | no l2 |" in printed
    assert "| memcheck | **127** | 1 | 45 |  |" in printed and "```\nno such tool\n```" in printed
    assert "| pgd_step linf, 128x3x32x32, float32 | 2.0 | eager 4.00 | 91% | 7% |" in printed
    assert (tmp_path / "gpu_check.md").read_text() + "\n" == printed
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["rows"] == [ROW] and found["commit"] == "abc"
    assert found["parts"][2]["status"] == 127 and found["parts"][2]["last_lines"] == ["no such tool"]


@pytest.mark.parametrize(
    ("chosen", "named"),
    [
        ("not two", ["test_it.py::test_wrong - assert (2 + 2) == 5"]),
        ("test", ["test_it.py::test_wrong", f"{ENDS}[two words] - Fatal Python error: Segmentation fault"]),
    ],
)
def test_failing_tests_are_named(tmp_path, reported, chosen, named):
    (tmp_path / "test_it.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", "-k", chosen, "test_it.py"]
    with (tmp_path / "tests.log").open("w") as log:
        status = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log).returncode
    (tmp_path / "parts.tsv").write_text(f"tests\t{status}\t2\t135\t\n")
    printed = reported()
    assert all(f"- `{test}`" in printed for test in named) and "test_fine" not in printed
    assert json.loads((tmp_path / "gpu_check.json").read_text())["parts"][0]["failed"] == named


def test_failing_tests_of_several_processes_are_named(tmp_path, reported):
    """As pytest-xdist tells of them, in a run that was stopped."""
    (tmp_path / "tests.log").write_text(
        "tests/test_a.py::test_slow \n"
        "[gw0] [  1%] PASSED tests/test_a.py::test_fine \n"
        "[gw11] [ 33%] FAILED tests/test_a.py::test_wrong[two words] \n"
        "[gw1] [ 50%] FAILED tests/test_b.py::test_worse Fatal Python error: Segmentation fault\n"
        "[gw1] [100%] ERROR tests/test_b.py::test_worse \n"
    )
    (tmp_path / "parts.tsv").write_text("tests\t124\t135\t135\t\n")
    assert "failed with status 124 (its limit of 135 s)" in reported()
    (part,) = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert part["failed"] == ["tests/test_a.py::test_wrong[two words]", "tests/test_b.py::test_worse"]


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Runs a check in which only the report works, since other commands print their arguments: folder and result."""
    tools, own = tmp_path_factory.mktemp("tools"), shlex.quote(sys.executable)
    for name in ("python", "nvidia-smi", "compute-sanitizer"):
        report = f'case "$1" in *gpu_report.py) exec {own} "$@";; esac\n' if name == "python" else ""
        (tools / name).write_text(f'#!/bin/sh\n{report}echo $PYTHONPATH\nprintf "%s\\n" "$@"\nexit 3\n')
        (tools / name).chmod(0o755)
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": ":".join([*sys.path, "/elsewhere"])}
    variables = os.environ | paths | {"PYTHON": str(tools / "python")}

    def run(*chosen: str) -> tuple[Path, subprocess.CompletedProcess]:
        out = tmp_path_factory.mktemp("out")
        command = [BENCHMARKS / "gpu_check.sh", out, *chosen]
        return out, subprocess.run(command, env=variables, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def checked(check):
    return check()


def test_a_failing_part_fails_the_check_and_the_next_ones_still_run(checked):
    out, run = checked
    assert run.returncode == 1 and "=== build FAILED with status 3" in run.stdout
    parts = json.loads((out / "gpu_check.json").read_text())["parts"]
    assert {part["part"] for part in parts} >= {"build", "native_errors", "tests", "memcheck", "attack_wrn", "shrink"}
    assert {part["status"] for part in parts} == {3}
    assert sum(part["limit"] for part in parts) <= 1181
    assert "## shrink failed with status 3" in run.stdout and "without pytest-xdist" in run.stdout


def test_chosen_parts_run_alone_and_others_are_unknown(check):
    out, run = check("build", "attack")
    assert [part["part"] for part in json.loads((out / "gpu_check.json").read_text())["parts"]] == ["build", "attack"]
    out, run = check("attack", "atack")
    assert run.returncode == 2 and "no part 'atack', only machine build" in run.stdout and not list(out.iterdir())


def test_this_library_comes_before_what_else_is_on_the_path(checked):
    path = (checked[0] / "build.log").read_text().splitlines()[0].split(":")
    assert path[0] == str(ROOT) and path[-1] == "/elsewhere"


NATIVE_ERRORS = (
    "test_tampered_patterns_are_refused[too few values]",
    "test_ops_refuse_arguments_that_do_not_fit_the_pattern[stride]",
    "test_an_ic_block_that_overflows_is_refused",
    "test_no_pattern_crashes_the_process",
    "test_the_raw_op_refuses_unsafe_arguments[tensors0]",
    "test_native_ops_refuse_unsafe_arguments[cuda-a short seed]",
)
UNDER_MEMCHECK = (
    "test_the_step_takes_any_layout[cuda-contiguous-permuted-l2]",
    "test_the_normalised_step[cuda-grad_dtype0-sliced]",
    "test_the_start_gives_the_numbers_of_the_cpu[cuda-every other-dtype0-l2]",
    "test_blocks_with_triton_kernels[cuda-torch.bfloat16-strided, with an epilogue]",
    "test_batch_norm_act_equals_the_reference[cuda-odd-torch.bfloat16-channels_last]",
    "test_batch_norm_act_equals_the_reference[cuda-odd-torch.bfloat16-contiguous]",
    "test_max_pooling[cuda-shape1-channels_last]",
    "test_blocks_give_the_gradients_of_autograd[cuda]",
)


ON_A_GPU = (
    *UNDER_MEMCHECK,
    "test_no_uninitialised_memory_is_read[cuda-fgsm-uap]",
    "test_the_host_never_waits_for_cuda_within_an_epoch[trades-float32]",
    "test_on_a_gpu_a_replay_computes_what_the_loop_computes[targeted-False-dtype0]",
    "test_the_start[linf-torch.float64-every other-streamed]",
)
TWO_PROCESSES = "test_processes_that_share_a_gpu_continue_bit_for_bit"


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("native_errors", NATIVE_ERRORS),
        ("memcheck", UNDER_MEMCHECK),
        ("tests", ON_A_GPU),
        ("shared_gpu", (TWO_PROCESSES,)),
    ],
)
def test_the_parts_that_choose_tests_choose_those_they_are_for(checked, part, names):
    _, _, arguments = (checked[0] / f"{part}.log").read_text().partition("-m\npytest\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *arguments.splitlines()]
    chosen = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT).stdout
    found = {name for line in chosen.splitlines() for name in re.findall(r"::(.+)$", line)}
    assert found >= set(names)
    assert part != "memcheck" or all("[cuda" in name for name in found)
    assert (TWO_PROCESSES in found) == (part == "shared_gpu")
