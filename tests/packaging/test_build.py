"""Building: what a user reads when the environment is not fit for it."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_a_build_without_torch_ends_with_one_clear_sentence():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install --no-build-isolation" in run.stderr and "Traceback" not in run.stderr


def test_every_dependency_is_pinned():
    """`make` installs nothing whose version is left to the day."""
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += [name for extra in project["project"]["optional-dependencies"].values() for name in extra]
    names = {name.partition(">=")[0].strip().lower().replace("-", "_") for name in wanted}
    assert names <= {pin.lower().replace("-", "_") for pin in pins}
