"""What importing the package costs, and that one module alone loads native code; `lint-imports` checks the layers."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import sparse_adv
from sparse_adv.facts import software

PACKAGE = Path(__file__).resolve().parents[2] / "sparse_adv"


def test_only_one_module_touches_the_native_files():
    """So that there is one place where loading can fail, with one message."""
    native = re.compile(r"\b(_host|_ops_cpu|_ops_cuda)\b")
    touching = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if native.search(path.read_text())}
    assert touching == {"ops/_library.py"}


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import sparse_adv\n"
        "heavy = {'matplotlib', 'sklearn', 'tqdm', 'rich', 'scipy', 'pandas', 'torch._inductor', 'torch._dynamo'}\n"
        "found = heavy & (set(sys.modules) - before)\n"
        "sys.exit(f'imported {found}' if found else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_public_names_are_reachable_from_the_package():
    assert sparse_adv.nn.MaskedConv2d and sparse_adv.ops.pgd_step and sparse_adv.attacks.pgd and sparse_adv.masks.prune
    assert sparse_adv.sparsify is sparse_adv.nn.sparsify


def test_the_version_is_the_one_that_pyproject_names():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    assert sparse_adv.__version__ == software().sparse_adv == project["version"]
