"""The machine code of `pgd_step`'s Triton kernels; no GPU is needed. interpreted/ tests their numbers."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, Kernel, compiled

from sparse_adv.kernels.pgd_step import pgd_step

F64, F32, B16 = torch.float64, torch.float32, torch.bfloat16
IN_REGISTERS, STREAMED = (2, 3, 32, 20), (2, 3, 64, 64)


def step(capability: int, norm: str, shape: tuple[int, ...], dtype: torch.dtype, grad_dtype: torch.dtype) -> Kernel:
    adv, clean = torch.empty(2, *shape, dtype=dtype, device="meta")
    grad = torch.empty(shape, dtype=grad_dtype, device="meta")
    (kernel,) = compiled(capability, lambda: pgd_step(adv, grad, clean, 0.1, 0.2, norm == "l2", 0.0, 1.0))
    return kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "grad_dtype"), [(F32, F32), (F32, B16), (B16, B16), (F64, F32)])
@pytest.mark.parametrize(("norm", "shape"), [("linf", IN_REGISTERS), ("l2", IN_REGISTERS), ("l2", STREAMED)])
def test_it_compiles_and_spills_nothing(norm, shape, dtype, grad_dtype, capability):
    kernel = step(capability, norm, shape, dtype, grad_dtype)
    assert kernel.stack == 0
    # So 64 K registers are enough for two images of 16 warps, or as many threads in smaller blocks.
    assert kernel.registers <= 80


@pytest.mark.parametrize(("norm", "dtype"), [("linf", F32), ("linf", B16), ("l2", F32)])
def test_memory_moves_16_bytes_at_a_time(norm, dtype):
    kernel = step(90, norm, IN_REGISTERS, dtype, dtype)
    accesses = {name for name in kernel.instructions if name.startswith(("LDG", "STG"))}
    assert accesses == {"LDG.E.128", "STG.E.128"}


def test_an_image_that_fits_in_registers_is_read_once():
    assert step(90, "l2", IN_REGISTERS, F32, F32).ttgir.count("tt.load ") == 3
    assert step(90, "l2", STREAMED, F32, F32).ttgir.count("tt.load ") == 7  # gradient, all, all


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_numbers_arrive_in_float64(norm):
    signature = step(90, norm, IN_REGISTERS, F64, F64).signature
    assert {signature[name] for name in ("alpha", "eps", "lo", "hi")} == {"fp64"}


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bfloat16_is_rounded_to_nearest(norm):
    """Tested here because the interpreter truncates."""
    ptx = step(90, norm, IN_REGISTERS, B16, F32).ptx
    assert "cvt.rn.bf16" in ptx and "cvt.rz.bf16" not in ptx


@pytest.mark.parametrize(("norm", "shape"), [("linf", (2**32, 2)), ("l2", (2, 2**32))])
def test_sizes_beyond_32_bits_compile(norm, shape):
    kernel = step(90, norm, shape, B16, B16)
    assert kernel.signature["count"] == "i64" and kernel.stack == 0
