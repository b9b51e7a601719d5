"""Triton kernels compiled as their launchers compile them; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from tempfile import NamedTemporaryFile

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITIES = (80, 90)


@dataclass(frozen=True, repr=False)
class Kernel:
    """A compiled kernel: Triton's type of each argument, intermediate code and machine code."""

    signature: dict[str, str]
    ttgir: str
    ptx: str
    cubin: bytes
    shared: int
    """Bytes of shared memory of a program."""

    @property
    def registers(self) -> int:
        """Of each thread."""
        return self._usage("REG")

    @property
    def stack(self) -> int:
        """Bytes of each thread, to which registers are spilled."""
        return self._usage("STACK")

    @cached_property
    def instructions(self) -> list[str]:
        """The machine instructions, without predicates and operands."""
        return re.findall(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", self._dump("-sass"), re.MULTILINE)

    def _usage(self, resource: str) -> int:
        return int(re.search(rf"\b{resource}:(\d+)", self._dump("-res-usage"))[1])

    def _dump(self, flag: str) -> str:
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, flag, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compiled(capability: int, launch: Callable[[], object]) -> list[Kernel]:
    """Compile, without launching them, the kernels that `launch()` launches on a GPU of this compute capability."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        asm, shared = kernel.asm, kernel.metadata.shared
        kernels.append(Kernel(kernel.src.signature, asm["ttgir"], asm["ptx"], asm["cubin"], shared))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(driver, "_active", _AbsentGpu(capability))
        launch()
    return kernels


def arguments(launch: Callable[[], object]) -> list[dict[str, object]]:
    """The arguments that have a name, of the kernels that `launch()` launches on a GPU; compiles none of them."""
    launched: list[dict[str, object]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda self, *args, **named: launched.append(named))
        launch()
    return launched


class _AbsentGpu:
    """The part of a driver that Triton calls before a launch."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0
