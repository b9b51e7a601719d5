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
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_ARCHS = "8.0 9.0+PTX"


def torch_dir() -> Path:
    """The folder of the installed torch, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "sparse_adv is built against the torch you run, and this build environment has none: install torch, "
            "setuptools, cmake, ninja and pybind11, then run `pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent


def cuda_options(torch: Path) -> list[str]:
    """What CMake needs to build the CUDA ops: nothing where torch has no CUDA or there is no compiler that fits it."""
    wanted = runpy.run_path(str(torch / "version.py")).get("cuda")
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


class CMakeBuild(build_ext):
    """One CMake project builds the Python module `_host` and the op libraries `_ops_*`, beside the Python files."""

    def finalize_options(self) -> None:
        self.cuda = cuda_options(torch_dir())
        if self.cuda:
            self.distribution.ext_modules.append(Extension("sparse_adv._ops_cuda", sources=[]))
        super().finalize_options()

    def get_ext_filename(self, fullname: str) -> str:
        # An op library knows nothing of Python: torch.ops.load_library loads it, so it carries no interpreter's tag.
        if fullname.rpartition(".")[2].startswith("_ops_"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import pybind11

        out = Path(self.get_ext_fullpath(self.extensions[0].name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTORCH_DIR={torch_dir()}",
            *(self.cuda or ["-DSPARSE_ADV_CUDA_ARCHS="]),
            f"-DSPARSE_ADV_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # The environment's own cmake and ninja come first, also where it is not activated.
        tools = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        jobs = os.environ.get("MAX_JOBS")
        for command in (configure, ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])]):
            if subprocess.run(command, env=tools).returncode:
                sys.exit(f"building sparse_adv's native part failed: {' '.join(command)}")


setup(
    ext_modules=[Extension("sparse_adv._host", sources=[]), Extension("sparse_adv._ops_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
