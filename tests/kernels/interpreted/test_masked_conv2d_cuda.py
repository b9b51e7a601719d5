"""The convolution ops on CUDA over live blocks: plan, packing and Triton kernels, interpreted on the CPU."""

import pytest
import torch
from helpers.convolution_cases import Case
from helpers.tolerances import assert_close, assert_equal
from torch import Tensor

from sparse_adv.kernels.layout import layout_of
from sparse_adv.kernels.masked_conv2d_pack import pack
from sparse_adv.ops import Pattern, set_kernels
from sparse_adv.ops import masked_conv2d_cuda as cuda
from sparse_adv.ops.masked_conv2d_pattern import block_pattern, promise_masked, unflatten

CASES = {
    "3x3": Case(3, 1, 40, 36, (5, 6), block=(32, 32)),
    "strided, with an epilogue": Case(2, 1, 64, 64, (7, 6), stride=(2, 2), block=(64, 64), density=0.5, seed=15),
    "dilated groups": Case(2, 2, 32, 64, (6, 7), dilation=(2, 1), block=(64, 32), layout="channels_last"),
    "1x1": Case(3, 1, 100, 40, (3, 4), (1, 1), padding=(0, 0), block=(32, 64), density=0.7, weight_layout="sliced"),
    "nothing kept": Case(2, 1, 64, 64, (3, 3), block=(32, 32), density=0.0, seed=2),
    "no images": Case(0, 1, 64, 64, (3, 3), block=(32, 32)),
}


def pattern_of(case: Case) -> Pattern:
    return set_kernels(block_pattern(case.pattern()), "sparse", "sparse", "sparse")


def packed(pattern: Pattern, weight: Tensor) -> Pattern:
    """What `ops.pack_pattern` returns on CUDA."""
    promised = promise_masked(pattern).flatten()
    return unflatten([*promised, *cuda.pack_values(weight, promised)])


def passes(case: Case, pattern: Pattern, dtype: torch.dtype) -> dict[str, Tensor]:
    input, weight, grad = (t.to(dtype) for t in (case.input, case.weight, case.grad_output))
    fused = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.epilogue.items()}
    rest, tensors = (fused.get("scale"), fused.get("residual"), fused.get("relu", False)), pattern.flatten()
    return {
        "forward": cuda.masked_conv2d(input, weight, tensors, fused.get("bias"), *case.shape, *rest),
        "grad_input": cuda.masked_conv2d_grad_input(grad, weight, tensors, case.input_size, *case.shape),
        "grad_weight": cuda.masked_conv2d_grad_weight(grad, input, tensors, *case.shape),
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_pass_equals_the_reference(name, dtype):
    case = CASES[name]
    for pass_, actual in passes(case, pattern_of(case), dtype).items():
        assert actual.dtype == dtype
        (assert_equal if dtype == torch.float32 else assert_close)(actual, case.expected()[pass_])
        layout = layout_of(case.grad_output if pass_ == "grad_input" else case.input)
        assert actual.is_contiguous(memory_format=layout)


def test_packed_values_may_have_a_factor_for_each_output_channel():
    case, scale = CASES["3x3"], torch.rand(2 * CASES["3x3"].weight.shape[0])[::2]
    pattern = pattern_of(case).flatten()
    scaled = case.weight * scale[:, None, None, None]
    assert_equal(cuda.pack_values(case.weight, pattern, scale)[0], cuda.pack_values(scaled, pattern)[0])


def test_packed_values_are_read_and_those_of_another_dtype_are_not():
    case = CASES["3x3"]
    vars(case)["weight"] = case.weight.where(case.mask, 0)
    twice = packed(pattern_of(case), 2 * case.weight)
    single, half = (passes(case, twice, dtype) for dtype in (torch.float32, torch.float16))
    for pass_ in ("forward", "grad_input"):
        assert_equal(single[pass_], 2 * case.expected()[pass_])
        assert_close(half[pass_], case.expected()[pass_])
    assert len(twice.flatten()) == 7 and len(twice.without_values().flatten()) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # interpreted, a cast to bfloat16 does not round
@pytest.mark.parametrize("of_weight", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "1x1", "dilated groups"])
def test_weights_are_packed_with_factors_of_their_channels(name, of_weight, dtype):
    case = CASES[name]
    pattern, weight = pattern_of(case), case.weight.to(of_weight)
    scale = torch.randn(len(weight), generator=torch.Generator().manual_seed(0))
    operands = pattern.blocks, pattern.block[:2], pattern.groups
    expected = pack((weight * scale[:, None, None, None]).to(dtype), *operands, dtype)
    assert torch.equal(pack(weight, *operands, dtype, scale), expected)


def test_pruned_entries_are_not_read():
    case = CASES["dilated groups"]
    vars(case)["weight"] = case.weight.where(case.mask, torch.nan)
    actual = passes(case, pattern_of(case), torch.float32)
    assert actual["forward"].isfinite().all() and actual["grad_input"].isfinite().all()


@pytest.mark.parametrize("shares", [3, 19])  # fewer than are loaded at a time, and more
def test_shares_of_the_weight_gradient_are_added(monkeypatch, shares):
    from sparse_adv.kernels import masked_conv2d_grad_weight as kernels

    monkeypatch.setattr(kernels, "gradient_shares", lambda *_: shares)
    case = Case(4, 1, 32, 40, (9, 8), block=(32, 32), density=0.3)
    assert_equal(passes(case, pattern_of(case), torch.float32)["grad_weight"], case.expected()["grad_weight"])
