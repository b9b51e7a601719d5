"""Building and packing: what a source distribution holds, what a user reads where it cannot be built, versions."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import setuptools
import torch

import sparse_adv
from sparse_adv import recipes

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
SETUP = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
IN_PLACE = ("--quiet", "build_ext", "--inplace")


def python(
    code: str, *arguments: str | Path, folder: Path, before: str = "", within: tuple = (), **variables: str
) -> subprocess.CompletedProcess:
    """Run code in a folder as build tools do, after code that changes the environment, within another command."""
    unwanted = {"CXX", "CMAKE_ARGS", "PYTHONPATH"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted} | variables
    command = [*within, sys.executable, "-c", f"{before}\n{code}", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def without(module: str) -> str:
    return f"import sys; sys.modules[{module!r}] = None"


def tracked() -> list[str]:
    """The files that are in git or about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, which a source distribution could be compared with")
    listing = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """A source distribution, made without torch from a checkout in which something was built and run before."""
    checkout = tmp_path_factory.mktemp("a") / "path with spaces"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for built in ("sparse_adv/_ops_cpu.so", "tests/__pycache__/conftest.cpython-311.pyc", "build/x", ".venv/x"):
        (checkout / built).parent.mkdir(exist_ok=True)
        (checkout / built).write_text("")
    run = python(HOOK, "build_sdist", checkout / "dist", folder=checkout, before=without("torch"))
    assert run.returncode == 0, run.stderr
    return checkout / "dist" / run.stdout.splitlines()[-1]


@pytest.fixture
def unpacked(sdist, tmp_path) -> Path:
    """An unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    return folder.rename(tmp_path / "path with spaces")


@pytest.fixture
def no_compiler(tmp_path_factory) -> str:
    """A PATH on which CMake and Ninja are, and nothing else."""
    folder = tmp_path_factory.mktemp("bin")
    for program in ("cmake", "ninja"):
        found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert found, f"{program} is missing: the native part could not have been built without it"
        (folder / program).symlink_to(found)
    return str(folder)


@pytest.fixture
def read_only() -> tuple:
    """What a command is started with so that its folder cannot be written, by root neither."""
    mounts = 'mount --bind . . && mount -o remount,ro,bind . && cd "$PWD" && exec "$@"'
    within = ("unshare", "--mount", "--map-root-user", "sh", "-c", mounts, "sh")
    if not shutil.which("unshare"):
        pytest.skip("no folder can be made read-only here: there is no unshare")
    tried = subprocess.run([*within, "true"], cwd=ROOT, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no folder can be made read-only here: {tried.stderr.strip()}")
    return within


def test_a_source_distribution_holds_what_git_tracks_and_no_more(sdist):
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {name for name in packed if name in ("PKG-INFO", "setup.cfg") or name.startswith("sparse_adv.egg-info/")}
    left_out = re.compile(r"\.gitignore|\.pre-commit-config\.yaml|\.github/")
    assert packed - made == {name for name in tracked() if not left_out.match(name)}


def test_a_wheel_holds_the_recipes(unpacked, tmp_path):
    """The Python part of a wheel, which needs no compiler."""
    run = python(SETUP, "--quiet", "build_py", "--build-lib", tmp_path / "lib", folder=unpacked)
    assert run.returncode == 0, run.stderr
    built = {path.name for path in (tmp_path / "lib" / "sparse_adv" / "recipes").iterdir()}
    assert built == {"__init__.py", *(f"{name}.yaml" for name in recipes.names())}


def test_metadata_need_no_torch(unpacked):
    run = python(HOOK, "prepare_metadata_for_build_wheel", unpacked, folder=unpacked, before=without("torch"))
    assert run.returncode == 0, run.stderr
    assert "Requires-Dist: torch>=2.10" in (unpacked / run.stdout.splitlines()[-1] / "METADATA").read_text()


def ends_with(run: subprocess.CompletedProcess, *parts: str) -> bool:
    """Whether a command failed with a sentence that has these parts, and with no traceback or message of CMake."""
    assert run.returncode == 1
    assert not re.search("Traceback|CMake", run.stdout + run.stderr)
    return all(part in run.stderr.splitlines()[-1] for part in parts)


def test_a_build_without_a_package_ends_with_one_sentence(unpacked):
    for module in ("torch", "pybind11"):
        run = python(SETUP, *IN_PLACE, folder=unpacked, before=without(module))
        assert ends_with(run, f"has no {module}: run `pip install", "`pip install --no-build-isolation .`")


def test_a_build_with_an_old_package_ends_with_one_sentence(unpacked):
    older = "import setuptools; setuptools.__version__ = '65.5.0'"
    assert ends_with(python(SETUP, *IN_PLACE, folder=unpacked, before=older), "has 65.5.0: run `pip install")
    older_torch = unpacked / "older" / "torch"
    older_torch.mkdir(parents=True)
    (older_torch / "__init__.py").write_text("")
    (older_torch / "version.py").write_text("__version__ = '2.9.1+cu128'\ncuda = '12.8'\n")
    run = python(SETUP, *IN_PLACE, folder=unpacked, PYTHONPATH=str(older_torch.parent))
    assert ends_with(run, "torch 2.10 or newer", "has 2.9.1+cu128: run `pip install")


def test_a_build_without_a_compiler_ends_with_one_sentence(unpacked, no_compiler):
    wanted = ("no C++ compiler was found", "variable CXX")
    assert ends_with(python(SETUP, *IN_PLACE, folder=unpacked, PATH=no_compiler), *wanted)
    assert ends_with(python(SETUP, *IN_PLACE, folder=unpacked, CXX="no-such-compiler"), *wanted)


def test_a_build_without_the_headers_of_python_ends_with_one_sentence(unpacked):
    run = python(SETUP, *IN_PLACE, folder=unpacked, CMAKE_ARGS="-DPython_INCLUDE_DIR=/no/such/folder")
    assert ends_with(run, f"headers of {sys.executable}", "python3-dev")


def test_a_read_only_checkout_is_built_elsewhere_and_never_in_place(unpacked, tmp_path, no_compiler, read_only):
    """The build gets as far as the missing compiler, which spares its time."""
    before = sorted(unpacked.rglob("*"))
    arguments = ("build_wheel", str(tmp_path / "wheel"))
    wheel = python(HOOK, *arguments, folder=unpacked, within=(*read_only, "env", f"PATH={no_compiler}"))
    assert ends_with(wheel, "no C++ compiler was found")
    in_place = python(SETUP, *IN_PLACE, folder=unpacked, within=read_only)
    assert ends_with(in_place, f"{unpacked} cannot be written")
    assert sorted(unpacked.rglob("*")) == before


def test_a_built_library_names_no_folder_of_torch():
    """It is loaded where torch is already; in a wheel such a folder would be that of another machine."""
    library = Path(sparse_adv.__file__).parent / "_ops_cpu.so"
    assert str(Path(torch.__file__).parent).encode() not in library.read_bytes()


def test_a_process_keeps_the_library_that_it_has_loaded_while_another_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    put_in_place = runpy.run_path(str(ROOT / "setup.py"))["put_in_place"]
    built, target = tmp_path / "built.so", tmp_path / "target.so"
    built.write_text("new")
    target.write_text("old")
    with target.open() as loaded:
        put_in_place(built, target)
        assert loaded.read() == "old" and target.read_text() == "new"
    assert sorted(tmp_path.iterdir()) == [built, target]


def test_the_steps_of_the_readme_are_those_that_a_failed_build_names():
    readme = (ROOT / "README.md").read_text().split("## Installing")[1].split("```")[1]
    (needed,) = [shlex.split(line)[2:] for line in readme.splitlines() if "torch" in line]
    (named,) = re.findall(r"run `pip install (.*)`, ", (ROOT / "setup.py").read_text())
    dependency = [name for name in PYPROJECT["project"]["dependencies"] if name.startswith("torch")]
    assert needed == shlex.split(named) == [*dependency, *PYPROJECT["build-system"]["requires"]]


def test_every_dependency_is_pinned():
    """`make` installs nothing whose version is left to the day."""
    pins = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"]]
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted += [name for extra in extras if extra != "integration" for name in extras[extra]]
    names = {name.partition(">=")[0].partition("[")[0].strip().lower().replace("-", "_") for name in wanted}
    assert names <= {pin.lower().replace("-", "_") for pin in pins}


def test_nothing_newer_than_the_oldest_allowed_torch_is_compiled_in():
    (oldest,) = re.findall(r"torch>=(\d+)\.(\d+)\b", (ROOT / "pyproject.toml").read_text())
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w{2})(\w{2})0{12}\b", (ROOT / "CMakeLists.txt").read_text())
    assert [int(number, 16) for number in target] == [int(number) for number in oldest]
