"""The machine code of `random_start`'s Triton kernels; no GPU is needed. interpreted/ tests their numbers."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, Kernel, compiled

from sparse_adv.kernels.random_start import random_start

F64, F32, B16 = torch.float64, torch.float32, torch.bfloat16
IN_REGISTERS, STREAMED = (2, 3, 32, 32), (2, 3, 64, 64)


def start(capability: int, norm: str, shape: tuple[int, ...], dtype: torch.dtype) -> Kernel:
    clean = torch.empty(shape, dtype=dtype, device="meta")
    seed = torch.empty(2, dtype=torch.int64, device="meta")
    (kernel,) = compiled(capability, lambda: random_start(clean, seed, 0.2, norm == "l2", 0.0, 1.0))
    return kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("norm", "shape", "registers"), [("linf", IN_REGISTERS, 40), ("l2", IN_REGISTERS, 80), ("l2", STREAMED, 128)]
)
def test_it_compiles_and_spills_nothing(norm, shape, registers, dtype, capability):
    kernel = start(capability, norm, shape, dtype)
    assert kernel.stack == 0
    assert kernel.registers <= registers


@pytest.mark.parametrize("dtype", [F32, B16])
def test_linf_moves_16_bytes_at_a_time(dtype):
    kernel = start(90, "linf", IN_REGISTERS, dtype)
    wide = [name for name in kernel.instructions if name in ("LDG.E.128", "STG.E.128")]
    others = [name for name in kernel.instructions if name.startswith(("LDG", "STG")) and name not in wide]
    assert set(wide) == {"LDG.E.128", "STG.E.128"} and others == ["LDG.E.64"] * 2  # key and offset


def test_noise_that_fits_in_registers_is_drawn_once():
    in_registers, streamed = (start(90, "l2", shape, F32).ttgir.count("math.log") for shape in (IN_REGISTERS, STREAMED))
    assert (in_registers, streamed) == (2 + 1, 2 * 2 + 1)  # two of each block, and one of the radius


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_numbers_arrive_in_float64(norm):
    signature = start(90, norm, IN_REGISTERS, F64).signature
    assert {signature[name] for name in ("eps", "lo", "hi")} == {"fp64"}


@pytest.mark.parametrize(("norm", "shape"), [("linf", (2**32, 2)), ("l2", (2, 2**32))])
def test_sizes_beyond_32_bits_compile(norm, shape):
    kernel = start(90, norm, shape, B16)
    assert kernel.signature["count"] == "i64" and kernel.stack == 0
