"""The machine code of max pooling's Triton kernels; no GPU is needed. interpreted/ tests their numbers."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, Kernel, arguments, compiled

from sparse_adv.kernels import max_pool2d
from sparse_adv.ops import empty_gate

F32, B16 = torch.float32, torch.bfloat16


def kernels(
    capability: int, dtype: torch.dtype, format=torch.channels_last, bits=False, shape=(128, 64, 32, 32)
) -> list[Kernel]:
    """Those of both passes; the second adds a residual and applies a gate."""
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=format)
    out = torch.empty(*shape[:2], shape[2] // 2, shape[3] // 2, dtype=dtype, device="meta").to(memory_format=format)
    index = torch.empty_like(out, dtype=torch.uint8)

    def launch() -> None:
        max_pool2d.forward(x, (2, 2), out, index)
        max_pool2d.backward(out, index, (2, 2), x, empty_gate(x) if bits else x, x)

    return compiled(capability, launch)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("bits", [False, True])
def test_they_compile_and_spill_nothing(bits, format, capability):
    for kernel in kernels(capability, F32, format, bits):
        assert kernel.stack == 0
        assert kernel.registers <= (128 if format == torch.channels_last else 160)


def test_images_move_16_bytes_at_a_time():
    for kernel in kernels(90, B16):
        accesses = {code for code in kernel.instructions if code.startswith(("LDG", "STG"))}
        assert accesses <= {"LDG.E.128", "STG.E.128", "LDG.E.64", "STG.E.64"}  # an index has 8 bits


def test_sizes_beyond_32_bits_compile():
    assert all(kernel.stack == 0 for kernel in kernels(90, B16, shape=(2**17, 64, 32, 32)))


@pytest.mark.parametrize(("elements", "wide"), [(2**31 - 2048, False), (2**31 - 1000, True), (2**31, True)])
@pytest.mark.parametrize("size", [(1, 1), (2, 1)])
def test_the_windows_of_the_last_program_have_numbers_of_enough_bits(elements, wide, size):
    """Those that do not exist, too: a number beyond 32 bits would be negative and seem to exist."""
    x = torch.empty(1, 1, elements, 1, dtype=B16, device="meta")
    out = torch.empty(1, 1, elements // size[0], 1, dtype=B16, device="meta")
    index = torch.empty_like(out, dtype=torch.uint8)

    def launch() -> None:
        max_pool2d.forward(x, size, out, index)
        max_pool2d.backward(out, index, size, None, None, x)

    assert [named["WIDE"] for named in arguments(launch)] == [wide, wide]
