"""Runs interpreted/: Triton kernels on the CPU, in a process of their own, since TRITON_INTERPRET must be set before
Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

FOLDER = Path(__file__).parent / "interpreted"


def obstacle() -> str:
    """Why Triton cannot interpret here, empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    import triton

    # Before 3.7 it makes an int of an array of one element for the bounds of a loop, which NumPy refuses from 2.4 on.
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        return f"Triton {triton.__version__} cannot interpret loops with NumPy {numpy.__version__}, only before 2.4"
    return ""


@pytest.mark.skipif(bool(obstacle()), reason=obstacle())
def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
