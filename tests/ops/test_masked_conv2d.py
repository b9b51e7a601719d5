"""The three passes of the convolution: values, layouts, dtypes, determinism, errors."""

import itertools
import math
import re
import threading
from functools import partial

import numpy as np
import pytest
import torch
from helpers.convolution_cases import BLOCKS, FILTERS, LAYOUTS, Case, assert_passes_equal, cases, integers
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given, settings
from torch import Tensor

from sparse_adv.ops import Pattern, compile_pattern, masked_conv2d, pack_pattern, reference, set_kernels

KERNELS = ("sparse", "auto", "dense")


@pytest.mark.parametrize("kernel", KERNELS)
def test_passes_equal_the_reference(kernel):
    @settings(max_examples=500 if kernel == "sparse" else 50)
    @given(cases())
    def check(case: Case) -> None:
        assert_passes_equal(case.results(case.pattern(kernel)), case.expected())

    check()


@pytest.mark.parametrize("stride", list(itertools.product((1, 2, 3), repeat=2)), ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strides_of_rows_and_columns_are_independent_for_every_width(stride, layout):
    for width in range(3, 26):
        case = Case(16, 1, 3, 2, (11, width), (5, 3), stride, density=0.5, layout=layout, seed=width)
        assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("filter", [(3, 3), (4, 3)])
def test_every_block_equals_the_reference_with_smaller_blocks_at_the_edge(block, filter):
    named = {"R": filter[0], "S": filter[1]}
    block = tuple(named.get(size, size) for size in block)
    case = Case(batch=17, group_in=37, group_out=70, image=(9, 7), filter=filter, block=block, seed=15)
    assert 0 < case.mask.sum() < case.mask.numel() or block == (64, 64)
    assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_larger_than_the_cache_equal_the_reference(stride, layout):
    case = Case(17, 1, 24, 12, (53, 71), stride=(stride, stride), layout=layout, density=0.1, seed=15)
    assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


@pytest.mark.parametrize("filter", FILTERS)
def test_real_numbers_equal_the_reference_up_to_rounding(filter):
    case = Case(19, 1, 48, 32, filter=filter, padding=(3, 3), density=0.1).with_real_numbers()
    actual, expected = case.results(case.pattern("sparse")), case.expected()
    for name, value in expected.items():
        assert_close(actual[name], value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_kept_and_everything_kept(kernel, density):
    case = Case(batch=3, density=density)
    assert_passes_equal(case.results(case.pattern(kernel)), case.expected())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch(kernel, layout):
    case = Case(batch=0, layout=layout, seed=15)
    actual = case.results(case.pattern(kernel))
    assert actual["forward"].shape == case.output_size and actual["grad_input"].shape == case.input_size
    assert_equal(actual["grad_weight"], torch.zeros(case.weight_size))


@pytest.mark.parametrize("kernel", KERNELS)
def test_code_may_write_to_the_result_for_an_empty_batch(kernel):
    case = Case(batch=0)
    output = masked_conv2d(case.input, case.weight.requires_grad_(), case.pattern(kernel))
    assert output.relu_().requires_grad


@given(cases())
def test_packed_values_give_the_same_bits(case):
    vars(case)["weight"] = case.weight.where(case.mask, 0)
    pattern = case.pattern("sparse")
    assert_passes_equal(case.results(pack_pattern(pattern, case.weight)), case.results(pattern))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_pruned_entries_of_the_weight_are_never_read(kernel, value, block):
    case = Case(group_in=9, group_out=13, block=block)
    expected = case.expected()
    case.weight.masked_fill_(~case.mask, value)
    assert_passes_equal(case.results(case.pattern(kernel)), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("place", ["input", "grad_output"])
def test_pruned_weights_get_no_gradient_even_from_values_that_are_not_finite(kernel, place):
    case = Case()
    getattr(case, place)[1, 2] = math.nan
    getattr(case, place)[0, 1, 2, 3] = math.inf
    grad_weight = case.results(case.pattern(kernel))["grad_weight"]
    assert grad_weight.isnan().any()
    assert_equal(grad_weight[~case.mask], torch.zeros(int((~case.mask).sum())))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_pixels_that_are_not_finite_reach_only_the_outputs_that_read_them(kernel, value):
    case = Case(density=1.0, batch=3)
    case.input[1, 2, 4, 5] = value
    spoiled = ~case.results(case.pattern(kernel))["forward"].isfinite()
    expected = torch.zeros(case.output_size, dtype=torch.bool)
    expected[1, :, 3:6, 4:7] = True
    assert_equal(spoiled.any(1), expected.any(1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("width", [9, 16, 20])
@pytest.mark.parametrize("place", [(0, 1, 8, 3), (0, 1, 0, 0), (0, 1, 4, -1)])
def test_a_pixel_that_is_not_finite_reaches_the_gradients_of_the_weights_that_multiply_it(kernel, width, place):
    case = Case(density=1.0, image=(9, width))
    case.input[place] = math.nan
    spoiled = case.results(case.pattern(kernel))["grad_weight"].isnan()
    assert_equal(spoiled, case.expected()["grad_weight"].isnan())


@pytest.mark.parametrize("images", [1, 16])
@pytest.mark.parametrize("width", [5, 16, 17, 19, 33, 34])
def test_the_first_pixel_of_a_row_reaches_no_output_of_the_row_before(width, images):
    """Without padding, a vector that begins in the last pixels of a row must not end in the next row."""
    x = torch.rand(images, 2, 6, width)
    x[:, :, 2, 0] = math.inf
    pattern = set_kernels(compile_pattern(torch.ones(4, 2, 3, 3, dtype=torch.bool), (1, 1)), *["sparse"] * 3)
    weight = torch.rand(4, 2, 3, 3).requires_grad_()
    out = masked_conv2d(x, weight, pattern)
    assert not out[..., :3, 0].isfinite().any() and out[..., 1:].isfinite().all()
    (gradient,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    assert not gradient[..., 0].isfinite().any() and gradient[..., 1:].isfinite().all()


@pytest.mark.parametrize("width", [14, 20])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (2, 3)])
@pytest.mark.parametrize("batch", [2, 33])
def test_blocks_of_whole_filter_rows_equal_the_reference(width, stride, padding, batch):
    for block in ((1, 1, 1, 3), (1, 1, 3, 3)):
        case = Case(batch, group_in=70, image=(5, width), stride=stride, padding=padding, block=block, seed=15)
        assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


@pytest.mark.parametrize("height", [4, 12])
@pytest.mark.parametrize("filter", [(1, 1), (3, 1)])
def test_rows_with_more_positions_than_pixels_equal_the_reference(filter, height):
    """Filters of one column on padded rows: four rows of 33 positions, 32 floats apart, end behind 16 vectors of 8."""
    case = Case(2, group_in=16, group_out=16, image=(height, 31), filter=filter, padding=(filter[0] // 2, 1), seed=2)
    assert_passes_equal(case.results(case.pattern("sparse")), case.expected())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filter", [(1, 1), (3, 3)])
def test_channels_last_inputs_give_channels_last_and_all_others_contiguous(kernel, layout, filter):
    case = Case(layout=layout, filter=filter, seed=15)
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    actual = case.results(case.pattern(kernel))
    assert actual["forward"].is_contiguous(memory_format=format)
    assert actual["grad_input"].is_contiguous(memory_format=format)
    assert actual["grad_weight"].is_contiguous()


def check_in_dtype(case: Case, kernel: str, dtype: torch.dtype) -> None:
    tensors = {name: getattr(case, name).to(dtype) for name in ("input", "weight", "grad_output")}
    expected = case.expected()
    vars(case).update(
        tensors, epilogue={k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.epilogue.items()}
    )
    actual = case.results(case.pattern(kernel))
    for name, value in expected.items():
        assert actual[name].dtype == dtype
        assert_close(actual[name], value)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_equal_the_reference(kernel, dtype):
    # At most 27 terms below 16 are summed, so 16-bit formats round only the result.
    check_in_dtype(Case(group_in=3, seed=13), kernel, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "geometry",
    [
        # On processors with AMX the convolution of PyTorch 2.13 ends the process in these,
        ((5, 1), (1, 1), (3, 3), (4, 4), (3, 3)),
        ((1, 20), (3, 3), (2, 1), (3, 0), (2, 1)),
        ((1, 5), (2, 1), (1, 1), (4, 0), (4, 1)),  # the first and the last window read a pixel, those between do not
        # and its bfloat16 results are wrong in these.
        ((11, 5), (2, 2), (1, 3), (1, 0), (2, 2)),
        ((15, 3), (7, 7), (1, 3), (1, 3), (1, 1)),
    ],
    ids=range(5),
)
def test_16_bit_convolutions_that_pytorch_gets_wrong(geometry, layout, dtype):
    image, filter, stride, padding, dilation = geometry
    case = Case(5, 2, 7, 5, image, filter, stride, padding, dilation, density=1.0, layout=layout, seed=15)
    check_in_dtype(case, "dense", dtype)


@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("stride", [(2, 2), (1, 2), (3, 1)], ids=str)
def test_strided_1x1_convolutions_of_few_channels_write_only_their_gradient(channels, stride):
    """In channels_last, oneDNN's AVX2 kernel of torch 2.13 overwrites other memory, which mostly ends the process."""
    case = Case(2, 1, channels, 8, (32, 32), (1, 1), stride, (0, 0), density=1.0, layout="channels_last")
    pattern, expected = case.pattern("dense"), case.expected()
    kept = [case.results(pattern) for _ in range(50)]  # what is overwritten belongs to one of them, or to the allocator
    for results in kept:
        assert_passes_equal(results, expected)


def in_threads(count: int, case: Case, pattern: Pattern) -> dict[str, Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return case.results(pattern)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 4), (1, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("image", [(17, 23), (4, 4), (8, 16)], ids=str)
@pytest.mark.parametrize("sizes", [(33, 1, 21, 19), (3, 1, 40, 70), (5, 2, 24, 20)], ids=str)
def test_results_are_the_same_for_every_number_of_threads_and_every_call(sizes, image, stride, block, layout):
    case = Case(*sizes, image, stride=stride, block=block, layout=layout).with_real_numbers()
    pattern = case.pattern("sparse")
    once = in_threads(1, case, pattern)
    for count in (1, 2, 3, 5, 16):
        assert_passes_equal(in_threads(count, case, pattern), once)


def test_two_concurrent_threads_get_the_same_results_as_one():
    calls = [Case(33, 1, 10 + 5 * i, 19, (15 + i, 20)).with_real_numbers() for i in range(2)]
    patterns = [case.pattern("sparse") for case in calls]
    alone = [case.results(pattern) for case, pattern in zip(calls, patterns, strict=True)]
    together: list[list[dict[str, Tensor]]] = [[], []]

    def work(i: int) -> None:
        together[i] = [calls[i].results(patterns[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert len(together[i]) == 20
        for actual in together[i]:
            assert_passes_equal(actual, alone[i])


@pytest.mark.parametrize("kernel", ["auto", "sparse"])
@pytest.mark.parametrize("padding", ["same", "valid", 0, (1, 2)])
def test_the_function_takes_the_paddings_of_torch(kernel, padding):
    case = Case()
    bias = integers(6)
    actual = masked_conv2d(case.input, case.weight, case.pattern(kernel), bias, 1, padding, relu=True)
    assert_equal(actual, reference.masked_conv2d(case.input, case.weight, case.mask, bias, 1, padding, relu=True))


@pytest.mark.parametrize(("filter", "dilation"), [((2, 3), 1), ((3, 2), 1), ((2, 2), 1), ((2, 3), 2), ((4, 2), 2)])
def test_same_keeps_the_size_or_is_refused(filter, dilation):
    case = Case(filter=filter)
    call = partial(masked_conv2d, case.input, case.weight, case.pattern(), None, 1, "same", dilation)
    if dilation == 2:
        assert call().shape[2:] == case.input.shape[2:]
    else:
        with pytest.raises(ValueError, match=re.escape(f'padding="same" with filter {filter} and dilation (1, 1)')):
            call()


BAD = {
    "input is no image": ({"input": torch.zeros(5, 9, 11)}, r"input must be \[N, C, H, W\], got shape \(5, 9, 11\)"),
    "input of integers": ({"input": torch.zeros(2, 5, 9, 11).long()}, "input must be .*, got torch.int64"),
    "no pattern": ({"pattern": [torch.zeros(1)]}, "pattern must be what compile_pattern returned, got list"),
    "another pattern": ({"weight": torch.zeros(6, 4, 3, 3)}, r"pattern .*\(6, 5, 3, 3\), weight .*\(6, 4, 3, 3\)"),
    "channels": ({"input": torch.zeros(2, 4, 9, 11)}, "input has 4 channels, .* needs 5"),
    "groups": ({"groups": 2}, "pattern was compiled for groups=1, got groups=2"),
    "stride": ({"stride": 0}, r"stride .* must be positive .* \(0, 0\)"),
    "dilation": ({"dilation": (1, -1)}, r"dilation must be positive .* \(1, -1\)"),
    "padding": ({"padding": -1}, r"padding not negative, .* \(-1, -1\)"),
    "padding's name": ({"padding": "full"}, "padding must be .*, got 'full'"),
    "stride of fractions": ({"stride": 1.5}, "stride must be one or two integers, got 1.5"),
    "stride of 3": ({"stride": [1, 1, 1]}, r"stride must be one or two integers, got \[1, 1, 1\]"),
    "a tensor as stride": ({"stride": torch.tensor(1)}, r"stride must be one or two integers, got tensor\(1\)"),
    "a bool as dilation": ({"dilation": True}, "dilation must be one or two integers, got True"),
    "a huge dilation beside NumPy": (
        {"padding": np.int64(2), "dilation": 2**62},
        r"smaller than the filter \(3, 3\) with dilation",
    ),
    "padding is missing": ({"padding": None}, "padding must be one or two integers, got None"),
    "same with a stride": ({"padding": "same", "stride": 2}, r'padding="same" needs stride 1, got stride \(2, 2\)'),
    "no rows": ({"input": torch.zeros(2, 5, 0, 8), "padding": 2}, r"input must have pixels, got .* \(2, 5, 0, 8\)"),
    "no columns": ({"input": torch.zeros(2, 5, 8, 0), "padding": 2}, r"input must have pixels, got .* \(2, 5, 8, 0\)"),
    "filter too large": ({"dilation": 6}, r"input of 9 x 11 pixels .* smaller than the filter \(3, 3\)"),
    "filter too high": ({"dilation": (6, 1)}, r"input of 9 x 11 pixels .* smaller than the filter \(3, 3\)"),
    "filter too wide": ({"dilation": (1, 6)}, r"input of 9 x 11 pixels .* smaller than the filter \(3, 3\)"),
    "8 bits": ({"input": torch.zeros(2, 5, 9, 11).to(torch.float8_e5m2)}, "16 bits or more, got torch.float8_e5m2"),
    "dtypes": ({"weight": torch.zeros(6, 5, 3, 3).double()}, "weight is torch.float64, input is torch.float32"),
    "devices": ({"weight": torch.zeros(6, 5, 3, 3, device="meta")}, "weight is on meta, input on cpu"),
    "bias": ({"bias": torch.zeros(5)}, r"bias must have shape \[6\], got \(5,\)"),
    "scale": ({"scale": torch.zeros(6, 1)}, r"scale must have shape \[6\], got \(6, 1\)"),
    "residual": ({"residual": torch.zeros(2, 6, 7, 8)}, r"residual must .*\(2, 6, 7, 9\), got \(2, 6, 7, 8\)"),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": None}, "input must be a tensor, got NoneType"),
        ({"weight": [1.0]}, "weight must be a tensor, got list"),
        ({"input": torch.nested.nested_tensor([torch.zeros(3)])}, "input must be a dense tensor, got a nested one"),
        ({"bias": "a"}, "bias must be a tensor, got str"),
        ({"scale": 2.0}, "scale must be a tensor, got float"),
        ({"residual": 0}, "residual must be a tensor, got int"),
        ({"pattern": "abc"}, "pattern must be what compile_pattern returned, got str"),
        ({"groups": "1"}, "groups must be an integer, got '1'"),
        ({"groups": True}, "groups must be an integer, got True"),
        ({"relu": "yes"}, "relu must be True or False, got 'yes'"),
    ],
)
def test_wrong_types_are_reported_by_name_and_value(change, message):
    case = Case()
    with pytest.raises(TypeError, match=message):
        masked_conv2d(**{"input": case.input, "weight": case.weight, "pattern": case.pattern(), **change})


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, message = BAD[name]
    case = Case()
    arguments = {"input": case.input, "weight": case.weight, "pattern": case.pattern(), **change}
    wrong_type = "torch." in message or "got list" in message
    with pytest.raises(TypeError if wrong_type else ValueError, match=message):
        masked_conv2d(**arguments)


def test_a_pattern_for_other_groups_is_refused():
    case, other = Case(groups=2), Case(group_out=12)
    with pytest.raises(ValueError, match="pattern was compiled for groups=1, got groups=2"):
        masked_conv2d(case.input, case.weight, other.pattern(), groups=2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_without_input_channels_gives_the_bias_and_has_gradients(groups):
    pattern = compile_pattern(torch.ones(4, 0, 3, 3, dtype=torch.bool), groups=groups)
    x, weight, bias = (torch.rand(s).requires_grad_() for s in ((2, 0, 5, 5), (4, 0, 3, 3), (4,)))
    y = masked_conv2d(x, weight, pattern, bias, padding=1, groups=groups)
    assert torch.equal(y, bias[:, None, None].expand(2, 4, 5, 5))
    y.sum().backward()
    assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
    assert torch.equal(bias.grad, torch.full((4,), 50.0))


def test_a_convolution_without_output_channels_is_refused():
    pattern = compile_pattern(torch.ones(0, 3, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"weight of shape \(0, 3, 3, 3\) has no output channels"):
        masked_conv2d(torch.rand(2, 3, 5, 5), torch.rand(0, 3, 3, 3), pattern)
