"""The machine code of `batch_norm_act`'s Triton kernels; no GPU is needed. interpreted/ tests their numbers."""

from functools import cache

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, Kernel, compiled

from sparse_adv.ops import batch_norm_act_cuda

F64, F32, F16, B16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
LAYER = (128, 64, 32, 32)
NAMES = ("sums", "statistics", "forward", "sums of gradients", "gradients of vectors", "backward")


@cache  # each kernel is disassembled once, which takes half a second
def kernels(
    capability: int, dtype: torch.dtype, shape=LAYER, format=torch.channels_last, residual=True
) -> dict[str, Kernel]:
    """Those of both passes."""
    x, grad = (torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format) for _ in range(2))
    vector = torch.empty(shape[1], dtype=torch.promote_types(dtype, F32), device="meta")

    def launch() -> None:
        added = x if residual else None
        _, mean, var, gate = batch_norm_act_cuda.batch_norm_act(x, added, vector, vector, 1e-5, True)
        batch_norm_act_cuda.batch_norm_act_grad(grad, x, vector, mean, var, gate, 1e-5, residual)

    return dict(zip(NAMES, compiled(capability, launch), strict=True))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "format"), [(B16, torch.channels_last), (F32, torch.contiguous_format)])
def test_they_compile_and_spill_nothing(dtype, format, capability):
    for name, kernel in kernels(capability, dtype, format=format).items():
        assert kernel.stack == 0, name
        # So 64 K registers are enough for two programs of 8 warps, and for more in most kernels.
        assert kernel.registers <= 128, name


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [B16, F16, F32])
def test_images_move_16_bytes_at_a_time(dtype, residual):
    made = kernels(90, dtype, residual=residual)
    for name in ("sums", "forward", "sums of gradients", "backward"):
        narrow = {code for code in made[name].instructions if code.startswith(("LDG", "STG")) and "128" not in code}
        bytes_of_gate = {"LDG.E.U8", "STG.E.U8"}
        assert narrow - bytes_of_gate <= ({"STG.E"} if "sums" in name else set()), name  # two sums of each channel
    assert "STG.E.U8" in made["forward"].instructions and "LDG.E.U8" in made["backward"].instructions


def test_nothing_is_read_twice_by_a_kernel():
    """Loads of a thread with 16 elements of each bfloat16 tensor, and 8 channels of each float32 vector."""
    made = kernels(90, B16, residual=True)

    def loads(name: str) -> int:
        return made[name].instructions.count("LDG.E.128")

    assert loads("sums") == 2 + 1  # the input; the first value of each channel
    assert loads("forward") == 2 * 2 + 2 * 4  # input and residual; mean, var, weight, bias
    assert loads("sums of gradients") == 2 * 2 + 2  # gradient and input; mean
    assert loads("backward") == 2 * 2 + 2 * 5  # the same; mean, var, weight and the two gradients


def test_a_gate_is_packed_without_shared_memory():
    """A thread has whole bytes of it."""
    made = kernels(90, B16, residual=True)
    for name in ("forward", "backward"):
        assert made[name].shared == 0 and not any(code.startswith("SHFL") for code in made[name].instructions)


def test_bfloat16_is_rounded_to_nearest():
    """Tested here because the interpreter truncates."""
    made = kernels(90, B16, residual=True)
    for name in ("forward", "backward"):
        assert "cvt.rn.bf16" in made[name].ptx and "cvt.rz.bf16" not in made[name].ptx


def test_other_shapes_compile():
    for shape, format, dtype in (
        ((128, 512, 4, 4), torch.channels_last, B16),
        ((64, 160, 32, 32), torch.channels_last, B16),
        ((4, 37, 7, 7), torch.channels_last, F64),
        ((4, 37, 7, 7), torch.contiguous_format, F64),
        ((2**16, 256, 16, 16), torch.channels_last, B16),  # offsets of 64 bits
    ):
        assert all(kernel.stack == 0 for kernel in kernels(90, dtype, shape, format).values())
