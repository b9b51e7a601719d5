"""The report of a GPU check: made of whatever parts and rows are there, also where a part failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROW = {
    "op": "pgd_step linf",
    "shape": [128, 3, 32, 32],
    "seconds": {
        "ours": {"median": 2e-6, "q20": 1e-6, "q80": 3e-6},
        "eager": {"median": 8e-6, "q20": 7e-6, "q80": 9e-6},
    },
    "ratios": {"eager": 4.0},
    "of_copy_bandwidth": 0.91,
}


def test_parts_and_rows_become_a_file_and_a_table(tmp_path):
    (tmp_path / "parts.tsv").write_text("build\t0\t40\nmemcheck\t127\t1\n")
    (tmp_path / "pgd_step.jsonl").write_text(json.dumps(ROW) + "\n")
    command = [sys.executable, BENCHMARKS / "gpu_report.py", tmp_path]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "| memcheck | 127 | 1 |" in printed and "| build | ok | 40 |" in printed
    assert "| pgd_step linf | [128, 3, 32, 32] | 2.0 (1.0-3.0) | eager 4.00 | 91% |" in printed
    assert (tmp_path / "gpu_check.md").read_text() + "\n" == printed
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found["rows"] == [ROW] and found["parts"][1] == {"part": "memcheck", "status": 127, "seconds": 1}


def test_a_failing_part_fails_the_check_and_the_next_ones_still_run(tmp_path):
    """With an interpreter that does nothing but fail."""
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\ncase "$1" in *gpu_report.py) exec {sys.executable} "$@";; esac\nexit 3\n')
    broken.chmod(0o755)
    out = tmp_path / "out"
    environment = os.environ | {"PYTHON": str(broken)}
    run = subprocess.run([BENCHMARKS / "gpu_check.sh", out], env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    failed = {part["part"]: part["status"] for part in json.loads((out / "gpu_check.json").read_text())["parts"]}
    assert failed["build"] == failed["shrink"] == 3
    assert "=== build FAILED with status 3" in (out / "log.txt").read_text()
