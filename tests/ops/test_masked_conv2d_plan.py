"""The plan of a convolution compared with what runs: the kernel of each pass, and the MACs that it executes."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from helpers.convolution_cases import LAYOUTS, Case, block_mask
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_adv.ops import (
    PASSES,
    Pattern,
    compile_pattern,
    masked_conv2d,
    masked_conv2d_cuda,
    masked_conv2d_plan,
    plan,
    set_kernels,
)
from sparse_adv.ops._library import has_triton
from sparse_adv.ops.masked_conv2d_pattern import block_pattern

# Densities on both sides of the table's break-even: of each geometry some run sparse and some dense.
GEOMETRIES = {
    "3x3": Case(batch=4, group_in=32, group_out=32, image=(14, 14)),
    "3x3, stride 2": Case(batch=17, group_in=32, group_out=48, image=(15, 15), stride=(2, 2)),
    "1x1": Case(batch=16, group_in=64, group_out=32, image=(14, 15), filter=(1, 1), padding=(0, 0)),
    "wide image": Case(batch=1, group_in=24, group_out=32, image=(40, 40)),
    "groups": Case(batch=16, groups=2, group_in=24, group_out=24, image=(12, 12)),
    "5x5, dilated": Case(batch=8, group_in=16, group_out=32, image=(18, 18), filter=(5, 5), dilation=(2, 2)),
    "one output pixel": Case(batch=32, group_in=64, group_out=64, image=(3, 3), padding=(0, 0)),
    "one output channel": Case(batch=4, group_in=64, group_out=1, image=(28, 28)),
    "one input channel": Case(batch=32, group_in=1, group_out=64, image=(20, 20)),
}
DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.6)


def plan_of(case: Case, pattern: Pattern, input: Tensor) -> dict[str, tuple[str, int]]:
    """For each pass (kernel, multiply-adds)."""
    passes = plan(pattern, input, *case.shape[:3])._asdict()
    return {name: (planned.kernel, planned.macs) for name, planned in passes.items()}


def reasons(pattern: Pattern, input: Tensor) -> set[str]:
    """The reasons for the three kernels, which are the same."""
    return {planned.reason for planned in plan(pattern, input, padding=1)}


def kernels_that_ran(case, pattern):
    """For each pass; the profiler records PyTorch's convolution as a child of the op where the dense kernel runs."""
    vars(case)["output_size"] = case.output_size  # computed by a convolution, before the profiler starts
    with torch.autograd.profiler.profile() as profile:
        case.results(pattern)
    called = {event.name: {child.name for child in event.cpu_children} for event in profile.function_events}
    ops = dict(zip(PASSES, ("masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight"), strict=True))
    dense = {"aten::convolution", "aten::convolution_backward"}
    return {pass_: "dense" if called[f"sparse_adv::{op}"] & dense else "sparse" for pass_, op in ops.items()}


def in_layout(case):
    """The case, with grad_output in the layout that the output has: channels_last, or NCHW for any other input."""
    last = case.layout == "channels_last"
    vars(case)["grad_output"] = LAYOUTS["channels_last" if last else "contiguous"](case.grad_output)
    return case


@pytest.mark.parametrize("block", [(1, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_planned_kernels_are_those_that_run(name, layout, block):
    for density in DENSITIES:
        case = in_layout(replace(GEOMETRIES[name], density=density, layout=layout, block=block))
        planned = plan_of(case, case.pattern(), case.input)
        assert {pass_: kernel for pass_, (kernel, _) in planned.items()} == kernels_that_ran(case, case.pattern())
        assert {each.reason for each in plan(case.pattern(), case.input, *case.shape[:3])} == {"table"}


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_a_requested_kernel_is_planned_and_runs(kernel, layout):
    case = in_layout(replace(GEOMETRIES["groups"], layout=layout))
    pattern = case.pattern(kernel)
    expected = dict.fromkeys(PASSES, kernel)
    assert {pass_: planned for pass_, (planned, _) in plan_of(case, pattern, case.input).items()} == expected
    assert kernels_that_ran(case, pattern) == expected
    assert {planned.reason for planned in plan(pattern, case.input, *case.shape[:3])} == {"requested"}


def test_each_pass_has_its_own_request():
    case = GEOMETRIES["groups"]
    planned = plan_of(case, set_kernels(case.pattern(), "sparse", "dense", "sparse"), case.input)
    assert [kernel for kernel, _ in planned.values()] == ["sparse", "dense", "sparse"]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_sparse_kernel_executes_the_weights_that_the_mask_keeps_and_the_dense_one_all(name):
    case = replace(GEOMETRIES[name], density=0.3)
    positions = case.batch * math.prod(case.output_size[2:])
    sparse, dense = (plan_of(case, case.pattern(kernel), case.input) for kernel in ("sparse", "dense"))
    assert sparse == dict.fromkeys(PASSES, ("sparse", positions * int(case.mask.count_nonzero())))
    assert dense == dict.fromkeys(PASSES, ("dense", positions * case.mask.numel()))


def test_the_geometries_lie_on_both_sides_of_the_break_even():
    kernels = {pass_: set() for pass_ in PASSES}
    for geometry in GEOMETRIES.values():
        for layout in ("contiguous", "channels_last"):
            for density in DENSITIES:
                case = in_layout(replace(geometry, density=density, layout=layout))
                for pass_, (kernel, _) in plan_of(case, case.pattern(), case.input).items():
                    kernels[pass_].add(kernel)
    assert all(seen == {"sparse", "dense"} for seen in kernels.values())


@pytest.mark.parametrize(
    ("channels", "outputs", "size", "groups", "pixels"),
    [(576, 576, 5, 576, 2), (960, 960, 3, 960, 2), (320, 1280, 1, 1, 2), (512, 512, 3, 1, 1)],
)
def test_small_images_and_depthwise_layers_take_the_sparse_kernels(channels, outputs, size, groups, pixels):
    """PyTorch reorders all weights in each call, and has no fast gradient of depthwise weights."""
    mask = block_mask((outputs, channels // groups, size, size), (4, 1), 0.1)
    x = torch.rand(20, channels, pixels, pixels)
    planned = plan(compile_pattern(mask, (4, 1), groups), x, padding=size // 2)
    assert {each.kernel for each in planned} == {"sparse"}


def test_the_layout_of_the_input_counts():
    """Wide NCHW images are read without a transposition, channels_last ones are not: one layer, two kernels."""
    case = Case(batch=1, group_in=16, group_out=16, image=(28, 28), density=0.1)
    pattern = case.pattern()
    kernels = {
        layout: plan_of(case, pattern, LAYOUTS[layout](case.input))["forward"][0]
        for layout in ("contiguous", "sliced", "channels_last")
    }
    assert kernels == {"contiguous": "sparse", "sliced": "sparse", "channels_last": "dense"}


def test_dense_images_of_channels_last_skip_the_padding_that_a_large_dilation_reads():
    """Of 3x3 taps 24 apart, 27 % read one of 33x33 pixels; grad_weight of the dense kernel takes all of them."""
    near, far = (
        Case(batch=8, group_in=256, group_out=128, image=(33, 33), padding=(d, d), dilation=(d, d), block=(4, 4))
        for d in (1, 24)
    )
    kernels = [
        [kernel for kernel, _ in plan_of(case, case.pattern(), case.input).values()]
        for case in (replace(each, density=0.1, layout="channels_last") for each in (near, far))
    ]
    assert kernels[0] == ["sparse", "sparse", "sparse"]
    assert kernels[1][:2] == ["dense", "dense"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_without_sparse_kernels_is_dense_whatever_is_requested(dtype):
    case = replace(GEOMETRIES["3x3"])
    for name in ("input", "weight", "grad_output"):
        vars(case)[name] = getattr(case, name).to(dtype)
    macs = case.batch * math.prod(case.output_size[2:]) * case.mask.numel()
    for kernel in ("auto", "sparse", "dense"):
        pattern = case.pattern(kernel)
        assert plan_of(case, pattern, case.input) == dict.fromkeys(PASSES, ("dense", macs))
        assert set(kernels_that_ran(case, pattern).values()) == {"dense"}
        assert reasons(pattern, case.input) == {f"no sparse kernel for {str(dtype)[6:]} on cpu"}


def test_an_empty_batch_executes_nothing():
    case = Case()
    assert plan_of(case, case.pattern("sparse"), case.input[:0]) == dict.fromkeys(PASSES, ("dense", 0))
    assert reasons(case.pattern("sparse"), case.input[:0]) == {"no sparse kernel for images of this size"}


def test_under_autocast_the_plan_is_that_of_its_dtype():
    case = GEOMETRIES["3x3"]
    pattern = case.pattern("sparse")
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons(pattern, case.input) == {"no sparse kernel for bfloat16 on cpu"}
        assert kernels_that_ran_under_autocast(case, pattern) == {"dense"}
        assert reasons(pattern, case.input.double()) == {"no sparse kernel for float64 on cpu"}


def kernels_that_ran_under_autocast(case: Case, pattern: Pattern) -> set[str]:
    """Of the forward pass."""
    with torch.autograd.profiler.profile() as profile:
        masked_conv2d(case.input, case.weight, pattern, None, *case.shape)
    return {"dense" if any(event.name == "aten::convolution" for event in profile.function_events) else "sparse"}


def test_other_devices_have_no_sparse_kernel():
    case = Case()
    planned = plan(case.pattern("sparse"), case.input.to("meta"), *case.shape[:3])
    macs = case.batch * math.prod(case.output_size[2:]) * case.mask.numel()
    assert planned == (("dense", "no sparse kernel on meta", macs),) * 3


def test_padding_may_be_named():
    case = Case()
    pattern = case.pattern()
    assert plan(pattern, case.input, padding="same") == plan(pattern, case.input, padding=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.empty(2, 7, 9, 11)}, ValueError, "input has 7 channels, .* needs 6"),
        ({"input": torch.empty(6, 9, 11)}, ValueError, r"input must be \[N, C, H, W\], got shape \(6, 9, 11\)"),
        ({"input": torch.empty(2, 6, 9, 11).long()}, TypeError, "input must be .*, got torch.int64"),
        ({"pattern": [torch.zeros(1)]}, TypeError, "pattern must be what compile_pattern returned, got list"),
        ({"stride": 0}, ValueError, r"stride .* must be positive .* \(0, 0\)"),
    ],
)
def test_bad_input_is_reported_by_name_and_value(change, error, message):
    case = Case(groups=2, group_in=3)
    with pytest.raises(error, match=message):
        plan(**{"pattern": case.pattern(), "input": case.input, **change})


def test_a_plan_reads_no_element():
    """2**50 pixels in one float of memory."""
    case = Case(group_in=1, group_out=1, filter=(1, 1), padding=(0, 0), density=1.0)
    images = torch.zeros(1).expand(2**20, 1, 2**15, 2**15)
    assert plan_of(case, case.pattern(), images)["forward"][1] == 2**50


def test_sizes_that_64_bits_cannot_count_are_refused():
    case = Case(group_in=1, group_out=8)
    images = torch.zeros(1).expand(2**31, 1, 2**15, 2**15)
    with pytest.raises(RuntimeError, match="an output of 2147483648 x 32768 x 32768 pixels is too large"):
        plan_of(case, case.pattern(), images)


# On CUDA, with tensors that have no memory: Python makes the plan, and the passes ask for it.

WIDE = block_mask((256, 256, 3, 3), (64, 64), 0.2)
BLOCKS = block_pattern(compile_pattern(WIDE, (64, 64)))
POSITIONS = 512 * 8 * 8


def on_cuda(dtype: torch.dtype = torch.bfloat16, images: int = 512, pixels: int = 8) -> Tensor:
    with FakeTensorMode():
        return torch.empty(images, 256, pixels, pixels, dtype=dtype, device="cuda")


def test_blocks_run_in_triton_where_the_roofline_expects_a_gain():
    sparse = ("sparse", "roofline", POSITIONS * int(WIDE.count_nonzero()))
    dense = ("dense", "roofline", POSITIONS * WIDE.numel())  # of the gradient of the weight a gain of 1.2 is given up
    assert plan(BLOCKS, on_cuda(), padding=1) == (sparse, sparse, dense)
    few = 2 * 8 * 8 * WIDE.numel()
    assert plan(BLOCKS, on_cuda(images=2), padding=1) == (("dense", "roofline", few),) * 3


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_a_requested_kernel_is_planned_on_cuda(kernel):
    weights = {"sparse": int(WIDE.count_nonzero()), "dense": WIDE.numel()}[kernel]
    pattern = set_kernels(BLOCKS, kernel, kernel, kernel)
    assert plan(pattern, on_cuda(), padding=1) == ((kernel, "requested", POSITIONS * weights),) * 3


def test_what_has_no_triton_kernel_is_dense_on_cuda():
    requested = set_kernels(BLOCKS, "sparse", "sparse", "sparse")
    lists = set_kernels(compile_pattern(WIDE, (64, 64)), "sparse", "sparse", "sparse")
    too_large = "no sparse kernel for images of this size"
    assert reasons(requested, on_cuda(torch.float64)) == {"no sparse kernel for float64 on cuda"}
    assert reasons(lists, on_cuda()) == {"no sparse kernel for block (64, 64, 1, 1) on cuda"}
    assert reasons(requested, on_cuda(images=2**20, pixels=32)) == {too_large}
    by_stride = plan(requested, on_cuda(images=2**20, pixels=32), stride=2, padding=1)  # the output alone would fit
    assert {planned.reason for planned in by_stride} == {too_large}


def test_autocast_on_cuda_changes_the_dtype_of_the_plan(monkeypatch):
    dtypes = []
    monkeypatch.setattr(masked_conv2d_plan, "missing_kernel", lambda _, dtype, device: dtypes.append(dtype) or "none")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would do nothing without a GPU
    try:
        plan(BLOCKS, on_cuda(torch.float32), padding=1)
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert dtypes == [torch.get_autocast_dtype("cuda")] * 3 != [torch.float32] * 3


def test_without_triton_blocks_take_the_dense_kernel_and_one_warning_is_logged(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    has_triton.cache_clear()
    pattern = block_pattern(compile_pattern(block_mask((64, 64, 3, 3), (32, 32), 0.3), (32, 32)))
    x, weight, one = torch.rand(2, 64, 5, 5), torch.rand(64, 64, 3, 3), (1, 1)
    try:
        for _ in range(2):
            masked_conv2d_cuda.masked_conv2d(x, weight, pattern.flatten(), None, one, one, one, 1, None, None, False)
        assert reasons(BLOCKS, on_cuda()) == {"no sparse kernel without Triton"}
    finally:
        has_triton.cache_clear()
    told = "PyTorch's own kernels are used on CUDA: Triton cannot be imported"
    assert [record.getMessage()[: len(told)] for record in caplog.records] == [told]
