"""The machine code of the pointwise Triton kernel; no GPU is needed. interpreted/test_epilogue.py tests its numbers."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, compiled

from sparse_adv.kernels.pointwise import pointwise

X = torch.empty(128, 64, 32, 32, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
VECTOR = torch.empty(64, device="meta")
BITS = torch.empty(128, 32, 32, 8, dtype=torch.uint8, device="meta")
CASES = {
    "bias": {"bias": VECTOR},
    "all, gate written": {"scale": VECTOR, "bias": VECTOR, "residual": X, "relu": True, "gate_out": BITS},
    "gate of bits": {"residual": X, "gate": BITS},
    "gate of values": {"residual": X, "gate": X},
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_images_move_16_bytes_at_a_time_and_no_number_of_64_bits_is_divided(name, capability):
    (kernel,) = compiled(capability, lambda: pointwise(X, **CASES[name]))
    moves = [code for code in kernel.instructions if code.startswith(("LDG", "STG"))]
    assert kernel.stack == 0 and set(moves) <= {"LDG.E.128", "STG.E.128", "LDG.E.U8", "STG.E.U8"}
    # A division of 64 bits is a call.
    assert not any(code.startswith("CALL") for code in kernel.instructions)
    bytes_of_gate = [code for code in moves if code.endswith("U8")]
    assert bytes_of_gate == {"all, gate written": ["STG.E.U8"] * 2, "gate of bits": ["LDG.E.U8"] * 2}.get(name, [])
