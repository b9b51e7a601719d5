"""Builds the native parts with CMake and Ninja; everything else about the package is in pyproject.toml."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def torch_dir() -> Path:
    """The folder of the installed torch, found without importing it (that takes seconds)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit(
            "sparse_adv is built against the torch you run, and this build environment has none: install torch, "
            "setuptools, cmake, ninja and pybind11, then run `pip install --no-build-isolation .`"
        )
    return Path(spec.origin).parent


class CMakeBuild(build_ext):
    """One CMake project builds the Python module `_host` and the op library `_ops_cpu`, beside the Python files."""

    def get_ext_filename(self, fullname: str) -> str:
        # The op library knows nothing of Python: torch.ops.load_library loads it, so it carries no interpreter's tag.
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
            f"-DSPARSE_ADV_VERSION={self.distribution.get_version()}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = os.environ.get("MAX_JOBS")
        for command in (configure, ["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])]):
            if subprocess.run(command).returncode:
                sys.exit(f"building sparse_adv's native part failed: {' '.join(command)}")


setup(
    ext_modules=[Extension("sparse_adv._host", sources=[]), Extension("sparse_adv._ops_cpu", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
