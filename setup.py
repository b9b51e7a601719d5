"""Builds the native parts with CMake and Ninja; everything else about the package is in pyproject.toml."""

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "8.0 9.0+PTX"
STEPS = (
    'run `pip install "torch>=2.10" "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13"`, '
    "then `pip install --no-build-isolation .`"
)
LACKING = {
    r"No CMAKE_CXX_COMPILER could|The CMAKE_CXX_COMPILER:|environment variable CXX:": (
        "no C++ compiler was found: install one that knows C++20, such as g++, or name it in the variable CXX"
    ),
    r"Could NOT find Python \(missing:": (
        f"the headers of {sys.executable} were not found: install them (Debian: python3-dev, Fedora: python3-devel)"
    ),
}
"""What CMake says at length where something is missing on the machine, and the sentence that is printed instead."""

# Packages are put together in a temporary folder: nothing left over from an earlier build gets into one, and a checkout
# that cannot be written can be installed. Only CMake's folder stays, so that a second build compiles what changed.
SCRATCH = tempfile.TemporaryDirectory(prefix="sparse_adv-")
WRITABLE = os.access(ROOT, os.W_OK)
CMAKE_FOLDER = (ROOT / "build" if WRITABLE else Path(SCRATCH.name)) / f"cmake-{sys.implementation.cache_tag}"


def torch_dir() -> Path:
    """The folder of the installed torch, found without importing it (that takes seconds)."""
    return Path(importlib.util.find_spec("torch").origin).parent


def torch_facts() -> dict[str, str | None]:
    """What the installed torch says of itself: `__version__`, and `cuda` where it has CUDA."""
    return runpy.run_path(str(torch_dir() / "version.py"))


def check_environment(path: str) -> None:
    """End with one sentence where a package or a program that the build needs is missing or too old."""
    missing = [
        module for module in ("torch", "pybind11") if not getattr(importlib.util.find_spec(module), "origin", None)
    ]
    missing += [program for program in ("cmake", "ninja") if shutil.which(program, path=path) is None]
    if missing:
        sys.exit(
            "sparse_adv is built against the torch you run, and this build environment has no "
            f"{', no '.join(missing)}: {STEPS}"
        )
    found = torch_facts()["__version__"]
    if tuple(map(int, found.split(".")[:2])) < (2, 10):
        sys.exit(f"sparse_adv is built against torch 2.10 or newer, and this environment has {found}: {STEPS}")


def cuda_options(wanted: str | None) -> list[str]:
    """What CMake needs to build the CUDA ops for torch's CUDA: nothing where it has none, or no compiler fits it."""
    if wanted is None:
        return []
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next((found for home in homes if (found := shutil.which("nvcc", path=Path(home) / "bin"))), None)
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    instead = "the CUDA ops are not built, Triton kernels take their place"
    if nvcc is None:
        print(f"sparse_adv: no nvcc in CUDA_HOME or on PATH: {instead}")
        return []
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+\.\d+)", told)
    if release is None or release[1].split(".")[0] != wanted.split(".")[0]:
        print(f"sparse_adv: torch has CUDA {wanted}, {nvcc} is {release[1] if release else 'unknown'}: {instead}")
        return []
    archs = re.sub("[; ,]+", " ", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()) or CUDA_ARCHS
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DSPARSE_ADV_CUDA_ARCHS={archs}"]


class NativeFirst(build):
    """The native part before the Python files: where it cannot be built, no list of files hides the reason."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class CMakeBuild(build_ext):
    """One CMake project builds the Python module `_host` and the op libraries `_ops_*`, beside the Python files."""

    def run(self) -> None:
        if self.inplace and not WRITABLE:
            sys.exit(f"{ROOT} cannot be written, so nothing can be built in place: install it without -e instead")
        # The environment's own cmake and ninja come first, also where it is not activated.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        check_environment(path)
        self.tools = os.environ | {"PATH": path}
        self.cuda = cuda_options(torch_facts().get("cuda"))
        if not self.cuda:
            self.extensions = [extension for extension in self.extensions if extension is not OPS_CUDA]
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        # An op library knows nothing of Python: torch.ops.load_library loads it, so it carries no interpreter's tag.
        if fullname.rpartition(".")[2].startswith("_ops_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import pybind11

        configure = [
            *("cmake", f"-S{ROOT}", f"-B{CMAKE_FOLDER}", "-GNinja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={CMAKE_FOLDER}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={torch_dir()}",
            *(self.cuda or ["-DSPARSE_ADV_CUDA_ARCHS="]),
            f"-DSPARSE_ADV_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        forget_other_settings([*configure, *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CUDAHOSTCXX"))])
        ran = subprocess.run(configure, env=self.tools, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            sentence = next((LACKING[said] for said in LACKING if re.search(said, ran.stdout)), None)
            sys.exit(f"sparse_adv cannot be built: {sentence}" if sentence else ran.stdout + failure(configure))
        jobs = os.environ.get("MAX_JOBS")
        compile = ["cmake", "--build", str(CMAKE_FOLDER), *(["-j", jobs] if jobs else [])]
        if subprocess.run(compile, env=self.tools).returncode:
            sys.exit(failure(compile))
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            put_in_place(CMAKE_FOLDER / target.name, target)


def put_in_place(built: Path, target: Path) -> None:
    """Replace a library by a new file: a process that has the old one loaded would crash if that was written to."""
    copy = target.with_name(target.name + ".new")
    shutil.copy(built, copy)
    copy.replace(target)


def forget_other_settings(settings: list[str]) -> None:
    """Delete CMake's folder if it was made with other settings, of which CMake would keep some without a word."""
    made_with, text = CMAKE_FOLDER / "settings.txt", "\n".join(settings)
    if not made_with.exists() or made_with.read_text() != text:
        shutil.rmtree(CMAKE_FOLDER, ignore_errors=True)
        CMAKE_FOLDER.mkdir(parents=True)
        made_with.write_text(text)


def failure(command: list[str]) -> str:
    return f"building sparse_adv's native part failed: {shlex.join(command)}"


if int(setuptools.__version__.split(".")[0]) < 77:
    found = setuptools.__version__
    sys.exit(f"sparse_adv is built with setuptools 77 or newer, and this environment has {found}: {STEPS}")
OPS_CUDA = Extension("sparse_adv._ops_cuda", sources=[])
setup(
    ext_modules=[Extension("sparse_adv._host", sources=[]), Extension("sparse_adv._ops_cpu", sources=[]), OPS_CUDA],
    cmdclass={"build": NativeFirst, "build_ext": CMakeBuild},
    options={"build": {"build_base": SCRATCH.name}} | ({} if WRITABLE else {"egg_info": {"egg_base": SCRATCH.name}}),
)
