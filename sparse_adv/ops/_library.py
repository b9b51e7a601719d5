"""Loads the native op libraries and the host module; everything else in `ops` imports them from here."""

from __future__ import annotations

import ctypes
import logging
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

log = logging.getLogger(__name__)

_OPS_CPU, _OPS_CUDA = (Path(__file__).parent.parent / f"_ops_{device}.so" for device in ("cpu", "cuda"))

try:
    from sparse_adv import _host as host
except ImportError as error:
    raise ImportError(
        f"sparse_adv's native part cannot be loaded ({error}); build it with "
        f"`pip install --no-build-isolation .` under this Python and torch {torch.__version__}"
    ) from error


def _load(path: Path) -> ctypes.CDLL:
    """Load an op library and return it; warn if it was linked with its own unwinder.

    Its errors reach Python all the same (csrc/common/errors.h): none leaves the library as a C++ exception.
    """
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    if library.sparse_adv_has_own_unwinder():
        warnings.warn(
            f"{path.name} was linked with -static-libgcc, so that two unwinders are in this process; build sparse_adv "
            "with -shared-libgcc to have one",
            stacklevel=2,
        )
    return library


try:
    _ops_cpu = _load(_OPS_CPU)
except OSError as error:
    raise ImportError(
        f"{_OPS_CPU.name} cannot be loaded under torch {torch.__version__} ({error}); it needs torch 2.10 or newer"
    ) from error


def _load_cuda_ops(torch_cuda: str | None) -> str:
    """Load the CUDA ops; return why they are not available, or "" if they are."""
    if torch_cuda is None:
        return "torch has no CUDA"
    if not host.cuda:
        return "they were not built; building them needs nvcc and a torch with CUDA"
    if host.cuda.split(".")[0] != torch_cuda.split(".")[0]:
        reason = f"they were built with CUDA {host.cuda}, torch has CUDA {torch_cuda}"
        warnings.warn(f"sparse_adv's CUDA ops cannot be loaded ({reason}); build sparse_adv again", stacklevel=2)
        return reason
    try:
        _load(_OPS_CUDA)
    except OSError as error:
        warnings.warn(f"sparse_adv's CUDA ops cannot be loaded ({error}); build sparse_adv again", stacklevel=2)
        return str(error)
    return ""


_why_no_cuda_ops = _load_cuda_ops(torch.version.cuda)
IMPLEMENTATIONS = torch.library.Library("sparse_adv", "IMPL")
"""The library that implementations in Python are registered with."""


def cuda_stand_in(op: str) -> Callable[[Callable[..., object]], None]:
    """Decorate a function that implements an op on CUDA where the CUDA ops could not be loaded."""

    def register(function: Callable[..., object]) -> None:
        if _why_no_cuda_ops:
            IMPLEMENTATIONS.impl(op, function, "CUDA")

    return register


def cuda_ops() -> str:
    """Say which implementation of the ops of an attack runs on CUDA, and for which GPUs it was built.

    Returns:
        A description, such as "CUDA C++ (13.0, for 8.0 9.0)".

    Examples:
        >>> cuda_ops().startswith(("CUDA C++", "Triton kernels"))
        True
    """
    if _why_no_cuda_ops:
        return f"Triton kernels (no CUDA C++: {_why_no_cuda_ops})"
    return f"CUDA C++ ({host.cuda}, for {host.cuda_archs})"


def check_capability(device: torch.device) -> None:
    """Raises RuntimeError if this is a GPU that the CUDA ops were not built for."""
    if device.type == "cuda" and not _why_no_cuda_ops and not torch.compiler.is_compiling():
        _check_capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _check_capability(index: int) -> None:
    major, minor = torch.cuda.get_device_capability(index)
    if not any(_runs_on(arch, major, minor) for arch in host.cuda_archs.split()):
        raise RuntimeError(
            f"sparse_adv's CUDA ops were built for compute capability {host.cuda_archs}, "
            f"{torch.cuda.get_device_name(index)} has {major}.{minor}: set TORCH_CUDA_ARCH_LIST and build again"
        )


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for an entry of TORCH_CUDA_ARCH_LIST runs on a GPU of this compute capability.

    "8.0" runs on 8.x; with "+PTX" on all later ones, too; "9.0a" on 9.0 alone; "10.0f" on 10.x.

    Examples:
        >>> [_runs_on(arch, 9, 0) for arch in ("8.0", "8.0+PTX", "9.0a", "10.0+PTX")]
        [False, True, True, False]
    """
    number = arch.removesuffix("+PTX")
    built = tuple(map(int, number.rstrip("af").split(".")))
    if number.endswith("a"):
        return built == (major, minor)
    is_portable = arch.endswith("+PTX") and not number.endswith("f")
    return built <= (major, minor) and (is_portable or built[0] == major)


def cpu_capability() -> str:
    """The instruction set that the CPU kernels use: "avx512", "avx2" or "portable".

    The environment variable `ATEN_CPU_CAPABILITY` (avx512, avx2, default) lowers it; it is read at the first call.

    Returns:
        The name of the instruction set.

    Examples:
        >>> cpu_capability() in ("avx512", "avx2", "portable")
        True
    """
    # Ask the library with the kernels, so that both go by the value that the variable had at the first call.
    function = _ops_cpu.sparse_adv_cpu_capability
    function.restype = ctypes.c_char_p
    return function().decode()


def build_facts() -> dict[str, str]:
    """The version of the library and the compiler that built its native part.

    Returns:
        A dict with the keys "version" and "compiler".

    Examples:
        >>> sorted(build_facts())
        ['compiler', 'version']
    """
    return {"version": host.version, "compiler": host.compiler}


@cache
def has_triton() -> bool:
    """Whether Triton can be imported; if not, a warning is logged once. It is imported when first needed."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        log.warning("PyTorch's own kernels are used on CUDA: Triton cannot be imported (%s)", error)
        return False
    return True
