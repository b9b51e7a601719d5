"""Epilogues in Triton, interpreted on the CPU: of the input gradient over live blocks, and on their own."""

import pytest
import torch
from helpers.convolution_cases import Case
from helpers.tolerances import assert_close

from sparse_adv.kernels import masked_conv2d as block_kernels
from sparse_adv.kernels import masked_conv2d_pack
from sparse_adv.kernels.pointwise import pointwise
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
    lists = values, blocks.blocks, blocks.grad_rows, blocks.grad_order
    geometry = case.shape[:3]
    actual = block_kernels.grad_input(grad, *lists, case.input_size, *geometry, residual, gate)
    assert_close(actual, (case.expected()["grad_input"] + residual).where(gate > 0, 0))
