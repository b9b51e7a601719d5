"""The plan of a convolution against what runs: the kernel of each pass, and the multiply-adds that it executes."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.convolution_cases import LAYOUTS, Case

from sparse_adv.ops import set_paths

SPARSE, DENSE = 1, 2
PASSES = ("forward", "grad_input", "grad_weight")

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


def plan_of(case, pattern, input):
    """For each pass (kernel, multiply-adds)."""
    numbers = torch.ops.sparse_adv.masked_conv2d_plan(input, pattern, *case.shape[:3])
    return dict(zip(PASSES, zip(numbers[::2], numbers[1::2], strict=True), strict=True))


def kernels_that_ran(case, pattern):
    """For each pass: the dense kernel is PyTorch's, which the profiler sees within the op."""
    vars(case)["output_size"] = case.output_size  # computed by a convolution, before the profiler starts
    with torch.autograd.profiler.profile() as profile:
        case.found(pattern)
    called = {event.name: {child.name for child in event.cpu_children} for event in profile.function_events}
    ops = dict(zip(PASSES, ("masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight"), strict=True))
    dense = {"aten::convolution", "aten::convolution_backward"}
    return {pass_: DENSE if called[f"sparse_adv::{op}"] & dense else SPARSE for pass_, op in ops.items()}


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
        plan = plan_of(case, case.pattern(), case.input)
        assert {pass_: kernel for pass_, (kernel, _) in plan.items()} == kernels_that_ran(case, case.pattern())


@pytest.mark.parametrize("path", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_a_requested_kernel_is_planned_and_runs(path, layout):
    case = in_layout(replace(GEOMETRIES["groups"], layout=layout))
    expected = dict.fromkeys(PASSES, {"sparse": SPARSE, "dense": DENSE}[path])
    plan = plan_of(case, case.pattern(path), case.input)
    assert {pass_: kernel for pass_, (kernel, _) in plan.items()} == expected
    assert kernels_that_ran(case, case.pattern(path)) == expected


def test_each_pass_has_its_own_request():
    case = GEOMETRIES["groups"]
    plan = plan_of(case, set_paths(case.pattern(), "sparse", "dense", "sparse"), case.input)
    assert [kernel for kernel, _ in plan.values()] == [SPARSE, DENSE, SPARSE]


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_sparse_kernel_executes_the_weights_that_the_mask_keeps_and_the_dense_one_all(name):
    case = replace(GEOMETRIES[name], density=0.3)
    positions = case.batch * math.prod(case.output_size[2:])
    sparse, dense = (plan_of(case, case.pattern(path), case.input) for path in ("sparse", "dense"))
    assert sparse == dict.fromkeys(PASSES, (SPARSE, positions * int(case.mask.count_nonzero())))
    assert dense == dict.fromkeys(PASSES, (DENSE, positions * case.mask.numel()))


def test_the_geometries_lie_on_both_sides_of_the_break_even():
    kernels = {pass_: set() for pass_ in PASSES}
    for geometry in GEOMETRIES.values():
        for layout in ("contiguous", "channels_last"):
            for density in DENSITIES:
                case = in_layout(replace(geometry, density=density, layout=layout))
                for pass_, (kernel, _) in plan_of(case, case.pattern(), case.input).items():
                    kernels[pass_].add(kernel)
    assert all(seen == {SPARSE, DENSE} for seen in kernels.values())


def test_the_layout_of_the_input_counts():
    """Wide NCHW images are read without a transposition, channels_last ones are not: one layer, two kernels."""
    case = Case(batch=4, group_in=32, group_out=32, image=(14, 14), density=0.1)
    pattern = case.pattern()
    kernels = {
        layout: plan_of(case, pattern, LAYOUTS[layout](case.input))["forward"][0]
        for layout in ("contiguous", "sliced", "channels_last")
    }
    assert kernels == {"contiguous": SPARSE, "sliced": SPARSE, "channels_last": DENSE}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_without_sparse_kernels_is_dense_whatever_is_requested(dtype):
    case = replace(GEOMETRIES["3x3"])
    for name in ("input", "weight", "grad_output"):
        vars(case)[name] = getattr(case, name).to(dtype)
    macs = case.batch * math.prod(case.output_size[2:]) * case.mask.numel()
    for path in ("auto", "sparse", "dense"):
        assert plan_of(case, case.pattern(path), case.input) == dict.fromkeys(PASSES, (DENSE, macs))
        assert set(kernels_that_ran(case, case.pattern(path)).values()) == {DENSE}


def test_an_empty_batch_executes_nothing():
    case = Case()
    assert plan_of(case, case.pattern("sparse"), case.input[:0]) == dict.fromkeys(PASSES, (DENSE, 0))


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
