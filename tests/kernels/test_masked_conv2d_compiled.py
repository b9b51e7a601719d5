"""The machine code of the convolution's Triton kernels; no GPU is needed. interpreted/ tests their numbers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton, whose compiler is needed, is not installed")

from helpers.compiled_kernels import CAPABILITIES, Kernel, arguments, compiled

from sparse_adv.kernels.masked_conv2d import forward, grad_input
from sparse_adv.kernels.masked_conv2d_grad_weight import grad_weight
from sparse_adv.kernels.masked_conv2d_pack import pack
from sparse_adv.kernels.masked_conv2d_phases import select_phases

F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # that one program may have
LIVE = 40
WGMMA, MMA = "wgmma.mma_async", "mma.sync"
LAYERS = {"fills a GPU": (512, 256, 8), "does not": (4, 256, 8)}  # images, channels, pixels a side


def empty(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def images(layer: str, dtype: torch.dtype) -> Tensor:
    batch, channels, size = LAYERS[layer]
    return empty(batch, channels, size, size, dtype=dtype).to(memory_format=torch.channels_last)


def passes(layer: str, block: tuple[int, int], dtype: torch.dtype, precision: str) -> dict:
    """A launch of each pass of a 3x3 layer."""
    x, channels = images(layer, dtype), LAYERS[layer][1]
    weight = (channels, channels, 3, 3)
    blocks, order, values = empty(LIVE, 4), empty(LIVE), empty(LIVE, *block, dtype=dtype)
    rows, grad_rows = (empty(channels // size, 3) for size in block)
    vector, same = empty(channels, dtype=dtype), ((1, 1), (1, 1), (1, 1))
    lists = (blocks, grad_rows, order)
    return {
        "forward": lambda: forward(x, values, blocks, rows, weight, None, *same, precision=precision),
        "forward, fused": lambda: forward(
            x, values, blocks, rows, weight, vector, *same, vector, x, True, precision=precision
        ),
        "grad_input": lambda: grad_input(x, values, *lists, x.shape, *same, precision=precision),
        "grad_weight": lambda: grad_weight(x, x, blocks, block, weight, *same, 1, precision),
    }


def kernel_of(capability: int, name: str, *case: object) -> Kernel:
    """The kernel that multiplies."""
    return compiled(capability, passes(*case)[name])[0]


def products(kernel: Kernel) -> set[str]:
    """The instructions of tensor cores, as PTX names them: to disassemble the machine code takes half a second."""
    return {name for name in (WGMMA, MMA) if f"{name}." in kernel.ptx}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["forward", "forward, fused", "grad_input", "grad_weight"])
@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 32), (32, 64)], ids=str)
def test_bfloat16_runs_on_tensor_cores_and_spills_nothing(block, name, capability):
    for layer in LAYERS:
        kernel = kernel_of(capability, name, layer, block, B16, "tf32")
        assert kernel.stack == 0 and kernel.registers <= 255
        assert kernel.shared <= SHARED[capability]
        # wgmma needs 64 rows, and the weight gradient of a 32 x 32 block has 32.
        assert products(kernel) == {WGMMA if capability == 90 and (name != "grad_weight" or 64 in block) else MMA}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", [(64, 64), (32, 32)], ids=str)
def test_gates_of_bits_move_a_byte_for_16_bytes_of_images(block, capability):
    x, channels = images("fills a GPU", B16), 256
    lists, same = (empty(LIVE, *block, dtype=B16), empty(LIVE, 4)), ((1, 1), (1, 1), (1, 1))
    rows, grad_rows = (empty(channels // size, 3) for size in block)
    gate = torch.empty(512, 8, 8, channels // 8, dtype=torch.uint8, device="meta")
    weight = channels, channels, 3, 3
    for launch, code in (
        (lambda: forward(x, *lists, rows, weight, None, *same, None, x, True, "tf32", gate), "STG.E.U8"),
        (lambda: grad_input(x, *lists, grad_rows, empty(LIVE), x.shape, *same, x, gate, "tf32"), "LDG.E.U8"),
    ):
        (kernel,) = compiled(capability, launch)
        assert kernel.stack == 0
        assert kernel.instructions.count(code) == kernel.instructions.count("STG.E.128") > 0
        assert not any(instruction.startswith("SHFL") for instruction in kernel.instructions)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("name", ["forward", "grad_input", "grad_weight"])
def test_float32_runs_on_tensor_cores(name, precision, capability):
    kernel = kernel_of(capability, name, "fills a GPU", (64, 64), F32, precision)
    assert kernel.stack == 0 and kernel.shared <= SHARED[capability]
    assert products(kernel)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", [(64, 64), (32, 32)], ids=str)
def test_shares_of_the_weight_gradient_are_loaded_16_bytes_at_a_time(block, capability):
    _, adds = compiled(capability, passes("fills a GPU", block, B16, "tf32")["grad_weight"])
    assert adds.stack == 0 and adds.registers <= 128 and "LDG.E.128" in adds.instructions


def test_float16_runs_on_tensor_cores_too():
    kernel = kernel_of(90, "forward", "fills a GPU", (64, 64), F16, "tf32")
    assert kernel.stack == 0 and products(kernel) == {WGMMA}


@pytest.mark.parametrize("dtype", [B16, F32])
def test_packing_moves_whole_lines_of_a_channels_last_weight(dtype):
    weight = empty(256, 256, 3, 3, dtype=F32).to(memory_format=torch.channels_last)
    for scale in (None, empty(256, dtype=F32)):
        (kernel,) = compiled(90, lambda scale=scale: pack(weight, empty(LIVE, 4), (64, 64), 1, dtype, scale))
        assert dtype == F32 or "cvt.rn.bf16" in kernel.ptx
        assert kernel.stack == 0 and any(instruction.startswith("STG.E.128") for instruction in kernel.instructions)


def test_a_strided_gradient_selects_its_phases_on_the_gpu():
    x = empty(512, 256, 4, 4, dtype=B16).to(memory_format=torch.channels_last)
    values, blocks, geometry = empty(LIVE, 64, 64, dtype=B16), empty(LIVE, 4), ((2, 2), (1, 1), (1, 1))

    def launch() -> None:
        lists = select_phases(blocks, empty(4, 3), empty(LIVE), *geometry)
        grad_input(x, values, blocks, *lists, (512, 256, 8, 8), *geometry, precision="tf32")

    run = compiled(90, launch)
    assert len(run) == 2 and all(kernel.stack == 0 for kernel in run)


@pytest.mark.parametrize(
    ("size", "padding", "dilation", "wide"),
    [
        (5790, 1, 1, (False, False)),  # 2**31 elements are 64 channels of a little more than 5792 x 5792 pixels
        (5792, 1, 1, (False, False)),
        (5793, 1, 1, (True, True)),
        (5792, 0, 1, (False, True)),  # the gradient that is read has fewer rows than that which is written
        (5790, 0, 1, (False, False)),
        (5790, 4, 1, (True, False)),  # the images that are read have fewer rows than the output
        (5788, 4, 4, (False, False)),
    ],
)
def test_offsets_have_64_bits_where_32_are_too_few(size, padding, dilation, wide):
    """The offset of an element is that of its pixel without a tap's shift, which may lie outside of what is read.

    In both passes `size` is the side of the images that are read.
    """
    weight, block, grown = (64, 64, 3, 3), (64, 64), 2 * dilation - 2 * padding
    x = empty(1, 64, size, size, dtype=B16).to(memory_format=torch.channels_last)
    values, blocks, rows = empty(LIVE, *block, dtype=B16), empty(LIVE, 4), empty(1, 3)
    geometry = (1, 1), (padding, padding), (dilation, dilation)
    launches = (
        lambda: forward(x, values, blocks, rows, weight, None, *geometry),
        lambda: grad_input(x, values, blocks, rows, empty(LIVE), (1, 64, size + grown, size + grown), *geometry),
    )
    for launch, expected in zip(launches, wide, strict=True):
        (convolution,) = arguments(launch)
        assert convolution["WIDE"] == expected
