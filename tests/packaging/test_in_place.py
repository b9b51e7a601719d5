"""The command line where the package was built in place and is found through PYTHONPATH: it has no metadata there."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

import sparse_adv
from sparse_adv import masks, runs


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Run Python in a folder that holds links to the package and to all that is installed, but not to its metadata."""
    folder = tmp_path_factory.mktemp("in_place")
    (folder / "sparse_adv").symlink_to(Path(sparse_adv.__file__).parent)
    needed = ("torch", "dacite", "jsonargparse")
    for installed in {Path(metadata.distribution(name).locate_file("")) for name in needed}:
        for path in installed.iterdir():
            if "sparse_adv" not in path.name and not (folder / path.name).is_symlink():
                (folder / path.name).symlink_to(path)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-S", *arguments]  # -S: without site-packages
        environment = os.environ | {"PYTHONPATH": str(folder)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


def test_the_version_is_known_without_metadata(python):
    asked = python("-c", "from importlib import metadata; metadata.version('sparse_adv')")
    assert "PackageNotFoundError" in asked.stderr
    assert python("-m", "sparse_adv", "--version").stdout == f"sparse_adv {sparse_adv.__version__}\n"
    doctor = python("-m", "sparse_adv", "doctor")
    assert doctor.returncode == 0 and sparse_adv.__version__ in doctor.stdout, doctor.stderr


def test_a_search_names_the_version_in_its_run_and_its_ticket(python, tmp_path):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    quick = ("--epochs", "1", "--objective", "natural", "--limit", "200")
    network = ("--arch", "digits_cnn", "--width", "8", "--density", "0.2")
    search = python("-m", "sparse_adv", "search", *network, *quick, "--out", str(tmp_path))
    assert search.returncode == 0, search.stderr
    assert runs.read(tmp_path).info.software.sparse_adv == sparse_adv.__version__
    assert masks.load_ticket(tmp_path / runs.TICKET).provenance["sparse_adv"] == sparse_adv.__version__
