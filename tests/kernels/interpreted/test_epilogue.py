"""Epilogues in Triton, interpreted on the CPU: of the input gradient over live blocks, and on their own."""

import pytest
import torch
from helpers.convolution_cases import Case
from helpers.tolerances import assert_close

from sparse_adv.kernels import masked_conv2d as block_kernels
from sparse_adv.kernels import masked_conv2d_pack
from sparse_adv.kernels import pointwise as kernels
from sparse_adv.kernels.masked_conv2d_phases import select_phases
from sparse_adv.kernels.pointwise import pointwise
from sparse_adv.ops import empty_gate, gate_to_bool, reference
from sparse_adv.ops.masked_conv2d_live_blocks import live_blocks

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def random(*shape: int, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("act", ["nothing", "relu", "gate"])
@pytest.mark.parametrize("operands", ["", "scale", "bias", "residual", "scale bias residual"])
def test_pointwise_equals_its_formula(layout, dtype, act, operands):
    x, residual, gate = (random(3, 7, 5, 6, dtype=dtype, layout=layout, seed=seed) for seed in range(3))
    x[0, 0, 0, 0] = torch.nan
    vectors = {"scale": random(7, seed=3), "bias": random(7, seed=4), "residual": residual}
    given = {name: vectors[name] for name in operands.split()}
    result = pointwise(x, **given, relu=act == "relu", gate=gate if act == "gate" else None)
    expected = x.double()
    if "scale" in given:
        expected = expected * given["scale"].double()[:, None, None]
    if "bias" in given:
        expected = expected + given["bias"].double()[:, None, None]
    if "residual" in given:
        expected = expected + residual.double()
    if act == "relu":
        expected = expected.relu()
    if act == "gate":
        expected = expected.where(gate > 0, 0)
    assert result.dtype == dtype and result.stride() == x.stride()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("shape", [(3, 16, 5, 6), (2, 8, 1, 3), (2, 24, 40, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_pointwise_writes_and_reads_gates_of_bits(shape, dtype):
    x, residual, grad = (random(*shape, dtype=dtype, layout=torch.channels_last, seed=seed) for seed in range(3))
    x[0, 0, 0, 0] = torch.nan
    gate = empty_gate(x)
    out = pointwise(x, residual=residual, relu=True, gate_out=gate)
    assert torch.equal(gate_to_bool(gate, x), ~(out <= 0))
    assert torch.equal(pointwise(grad, gate=gate), grad.where(~(out <= 0), 0))


def test_numbers_of_64_bits(monkeypatch):
    x, residual = (random(3, 16, 30, 6, layout=torch.channels_last, seed=seed) for seed in range(2))
    operands = {"scale": random(16, seed=2), "bias": random(16, seed=3), "residual": residual}
    results = []
    for wide_from in (x.numel() + kernels._BLOCK + 1, x.numel() + kernels._BLOCK):
        monkeypatch.setattr(kernels, "WIDE_FROM", wide_from)
        gate = empty_gate(x)
        results.append((pointwise(x, **operands, relu=True, gate_out=gate), gate))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_the_gate_is_that_of_the_rounded_output():
    x = torch.full((1, 8, 2, 2), 1e-4, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    gate = empty_gate(x)
    out = pointwise(x, scale=torch.full((8,), 1e-6), relu=True, gate_out=gate)
    assert not out.any() and not gate.any()


@pytest.mark.parametrize("wrong", ["NCHW", "channels", "size"])
def test_gates_of_bits_are_refused_where_they_do_not_fit(wrong):
    x = random(
        2, 12 if wrong == "channels" else 16, 3, 3, layout=LAYOUTS["NCHW" if wrong == "NCHW" else "channels_last"]
    )
    gate = torch.zeros(2, 3, 3, 1 if wrong == "size" else 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"gate must have a bit for each element .*, got torch.uint8 of shape"):
        pointwise(x, gate=gate)


def test_pointwise_refuses_operands_of_another_layout():
    x = random(2, 4, 3, 3)
    with pytest.raises(
        ValueError, match=r"residual must be contiguous_format and have the input's shape \(2, 4, 3, 3\)"
    ):
        pointwise(x, residual=x.contiguous(memory_format=torch.channels_last))


def test_pointwise_takes_images_of_one_pixel_in_either_layout():
    x, residual = random(2, 4, 1, 1), random(2, 4, 1, 1, seed=1)
    other = residual.as_strided(residual.shape, (4, 1, 4, 4))  # as channels_last would be
    assert torch.equal(pointwise(x, residual=other), x + residual)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_input_gradient_adds_a_residual_and_applies_a_gate(stride, layout):
    case = Case(2, 1, 64, 64, (6, 5), stride=stride, block=(32, 32), density=0.5)
    blocks = live_blocks(case.mask, (32, 32))
    values = masked_conv2d_pack.pack(case.weight, blocks.blocks, (32, 32), 1, torch.float32)
    grad = case.grad_output.contiguous(memory_format=layout)
    residual, gate = (random(*case.input_size, seed=seed) for seed in (1, 2))
    geometry = case.shape[:3]
    phases = select_phases(blocks.blocks, blocks.grad_rows, blocks.grad_order, *geometry)
    lists = values, blocks.blocks, *phases
    actual = block_kernels.grad_input(grad, *lists, case.input_size, *geometry, residual, gate)
    assert_close(actual, (case.expected()["grad_input"] + residual).where(gate > 0, 0))


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("channels", [64, 72])  # whole tiles, and others
def test_gates_of_bits_over_live_blocks(channels, stride):
    case = Case(2, 1, channels, channels, (6, 5), stride=stride, block=(32, 32), density=0.5, layout="channels_last")
    blocks = live_blocks(case.mask, (32, 32))
    values = masked_conv2d_pack.pack(case.weight, blocks.blocks, (32, 32), 1, torch.float32)
    expected, geometry = case.expected(), case.shape[:3]
    conv = reference.masked_conv2d(case.input, case.weight, case.mask, None, *case.shape)
    residual = random(*conv.shape, layout=torch.channels_last)
    gate = empty_gate(residual)
    lists = values, blocks.blocks, blocks.rows, case.weight.shape, None
    out = block_kernels.forward(case.input, *lists, *geometry, None, residual, True, "tf32x3", gate)
    assert_close(out, (conv + residual).relu())
    assert torch.equal(gate_to_bool(gate, out), out > 0)
    passes = random(*case.input_size, layout=torch.channels_last, seed=4) > 0
    bits = empty_gate(case.input)
    pointwise(passes.float().contiguous(memory_format=torch.channels_last), relu=True, gate_out=bits)
    phases = select_phases(blocks.blocks, blocks.grad_rows, blocks.grad_order, *geometry)
    lists = values, blocks.blocks, *phases
    grad = block_kernels.grad_input(case.grad_output, *lists, case.input_size, *geometry, None, bits)
    assert_close(grad, expected["grad_input"].where(passes, 0))
