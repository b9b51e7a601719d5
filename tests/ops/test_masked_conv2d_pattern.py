"""Patterns: their lists and fields, requested kernels, and that no list of tensors can crash the process."""

import contextlib
import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers.convolution_cases import Case, block_mask, cases
from helpers.tolerances import assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparse_adv.ops import compile_pattern, masked_conv2d, pack_pattern, set_kernels
from sparse_adv.ops.masked_conv2d_pattern import Pattern, block_pattern, unflatten

CASE = Case(groups=2, group_in=3, group_out=4, block=(2, 1), seed=7)
MASKED = CASE.weight.where(CASE.mask, 0)
TAP_BITS = 12
NO_EPILOGUE = (None, None, False)  # the last arguments of masked_conv2d


def pairs_of(row_offsets: Tensor, col_indices: Tensor) -> list[list[tuple[int, int]]]:
    """The (channel, tap) pairs of every list."""
    pairs = [(index >> TAP_BITS, index & ((1 << TAP_BITS) - 1)) for index in col_indices.tolist()]
    return [pairs[begin:end] for begin, end in pairwise(row_offsets.tolist())]


@given(cases())
def test_lists_contain_every_kept_weight_once_in_order(case):
    pattern = case.pattern()
    mask = case.mask.flatten(2)
    # grad_input reads output channels.
    transposed = mask.unflatten(0, (case.groups, -1)).transpose(1, 2).flatten(0, 1)
    forward = pairs_of(pattern.row_offsets, pattern.col_indices)
    grad_input = pairs_of(pattern.grad_input_row_offsets, pattern.grad_input_col_indices)
    for lists, kept, block in ((forward, mask, case.block[0]), (grad_input, transposed, case.block[1])):
        rows, channels = kept.shape[:2]
        group_rows = rows // case.groups
        vector = next(v for v in (4, 2, 1) if block % v == 0 and (case.groups == 1 or group_rows % v == 0))
        vectors = -(-group_rows // vector)
        listed: set[tuple[int, int, int]] = set()
        assert len(lists) % (vectors * case.groups) == 0
        for i, pairs in enumerate(lists):
            # By filter row first, if they stand for several output channels.
            columns = case.filter[1] if vector > 1 else case.filter[0] * case.filter[1]
            assert pairs == sorted(set(pairs), key=lambda pair: (pair[1] // columns, *pair))
            group, place = divmod(i % (vectors * case.groups), vectors)
            for channel, tap in pairs:
                for row in range(place * vector, min((place + 1) * vector, group_rows)):
                    listed.add((group * group_rows + row, channel - group * channels, tap))
        assert listed == {tuple(index) for index in kept.nonzero().tolist()}


@pytest.mark.parametrize("change", [lambda m: m.mT, lambda m: m[:, 1:], lambda m: m.flip(0), lambda m: m[::2]])
def test_a_mask_may_have_any_strides(change):
    mask = change(block_mask((6, 5, 3, 3), (1, 1), 0.4))
    contiguous = compile_pattern(mask.clone().contiguous())
    for tensor, expected in zip(compile_pattern(mask).flatten(), contiguous.flatten(), strict=True):
        assert_equal(tensor, expected)


def test_a_pattern_does_not_change_with_the_callers_mask():
    mask = CASE.mask.clone()
    pattern = compile_pattern(mask, CASE.block, CASE.groups)
    mask.logical_not_()
    unchanged = compile_pattern(CASE.mask, CASE.block, CASE.groups).flatten()
    for tensor, expected in zip(pattern.flatten(), unchanged, strict=True):
        assert_equal(tensor, expected)


@pytest.mark.parametrize("wanted", [("sparse", "dense", "dense"), ("dense", "sparse", "sparse")])
def test_set_kernels_requests_kernels_and_leaves_the_pattern_alone(wanted):
    pattern = CASE.pattern()
    before = [tensor.clone() for tensor in pattern.flatten()]
    fixed = set_kernels(pattern, *wanted)
    assert fixed.requested_kernels == wanted
    assert set_kernels(fixed).requested_kernels == ("auto", "auto", "auto") == pattern.requested_kernels
    for tensor, expected in zip(pattern.flatten(), before, strict=True):
        assert_equal(tensor, expected)


def test_packed_values_are_the_weights_in_the_lists_order():
    case = Case(group_in=4, group_out=3, block=(1, 1))
    weight = case.weight.where(case.mask, 0)
    packed = pack_pattern(case.pattern(), weight)
    vector, lists = weight.flatten(2), pairs_of(packed.row_offsets, packed.col_indices)
    expected = [vector[k, c, tap] for k, pairs in enumerate(lists) for c, tap in pairs]
    assert_equal(packed.values, torch.stack(expected))
    assert_equal(pack_pattern(packed, 2 * weight).values, 2 * packed.values)


@given(cases())
def test_packed_values_may_have_a_factor_for_each_output_channel(case):
    pattern, scale = case.pattern().flatten(), torch.rand(2 * case.weight.shape[0])[::2]
    pack = torch.ops.sparse_adv.pack_values
    scaled = case.weight * scale[:, None, None, None]
    for values, expected in zip(pack(case.weight, pattern, scale), pack(scaled, pattern), strict=True):
        assert_equal(values, expected)


@pytest.mark.parametrize("scale", [torch.ones(7), torch.ones(8, dtype=torch.float64)])
def test_a_factor_that_does_not_fit_the_weight_is_refused(scale):
    with pytest.raises(RuntimeError, match="scale must"):
        torch.ops.sparse_adv.pack_values(CASE.weight, CASE.pattern().flatten(), scale)


def test_a_weight_that_is_not_zero_where_pruned_is_not_packed():
    mask = torch.tensor([[True, False], [True, True]])[..., None, None]
    pattern = compile_pattern(mask)
    for value in (1.0, -1e-30, math.nan):
        with pytest.raises(ValueError, match="weight must be 0 where the pattern prunes it"):
            pack_pattern(pattern, torch.ones(2, 2, 1, 1).where(mask, value))
    assert pack_pattern(pattern, torch.ones(2, 2, 1, 1).where(mask, -0.0)).weight_is_masked


WIDE_MASK = block_mask((64, 64, 3, 3), (32, 32), 0.5)
PATTERNS = {
    "lists": CASE.pattern("sparse"),
    "lists and values": pack_pattern(CASE.pattern(), MASKED),
    "blocks": block_pattern(compile_pattern(WIDE_MASK, (32, 32))),
}


def fields_of(pattern: Pattern) -> dict[str, object]:
    """Everything in the common interface of all patterns."""
    names = ("block", "groups", "nonzeros", "requested_kernels", "weight_is_masked")
    return {name: getattr(pattern, name) for name in names} | {"mask": pattern.mask.tolist()}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda pattern: pickle.loads(pickle.dumps(pattern)),
        lambda pattern: unflatten(pattern.flatten()),
        lambda pattern: pytree.tree_map(torch.clone, pattern),
    ],
    ids=["deepcopy", "pickle", "list of tensors", "pytree"],
)
def test_a_copied_pattern_has_the_same_fields_and_tensors(name, copied):
    pattern = PATTERNS[name]
    twin = copied(pattern)
    assert type(twin) is type(pattern) and fields_of(twin) == fields_of(pattern)
    for tensor, expected in zip(twin.flatten(), pattern.flatten(), strict=True):
        assert_equal(tensor, expected)


def test_the_fields_of_a_pattern():
    pattern = PATTERNS["lists and values"]
    assert pattern.block == (2, 1, 1, 1) and pattern.groups == 2 and pattern.nonzeros == int(CASE.mask.sum())
    assert pattern.weight_is_masked and not pattern.without_values().weight_is_masked
    assert pattern.without_values().values is None
    assert PATTERNS["lists"].requested_kernels == ("sparse", "sparse", "sparse")
    assert PATTERNS["blocks"].block == (32, 32, 1, 1) and PATTERNS["blocks"].requested_kernels.forward == "auto"
    assert_equal(PATTERNS["blocks"].mask, WIDE_MASK)


class Convolve(nn.Module):
    """Takes the pattern as an argument."""

    def forward(self, x: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
        return masked_conv2d(x, weight, pattern, None, *CASE.shape).sin()


@pytest.mark.parametrize("name", ["lists", "lists and values"])
def test_a_pattern_may_be_an_argument_of_compiled_and_exported_code(name):
    arguments = (CASE.input, MASKED, PATTERNS[name])
    expected = Convolve()(*arguments)
    assert_equal(torch.compile(Convolve(), fullgraph=True, backend="aot_eager")(*arguments), expected)
    assert_equal(torch.export.export(Convolve(), arguments).module()(*arguments), expected)


BAD = {
    "no tensor": ({"mask": [True]}, TypeError, "mask must be a bool tensor .*, got list"),
    "sparse": (
        {"mask": torch.ones(2, 2, 1, 1, dtype=torch.bool).to_sparse()},
        TypeError,
        "mask must be a dense tensor",
    ),
    "no values": (
        {"mask": torch.ones(2, 2, 1, 1, dtype=torch.bool, device="meta")},
        ValueError,
        "mask must have values",
    ),
    "numbers": ({"mask": torch.ones(2, 2, 1, 1)}, TypeError, "mask must be a bool tensor .*, got torch.float32"),
    "dimensions": (
        {"mask": torch.ones(2, 2).bool()},
        ValueError,
        r"mask must have the .* shape .*, got \(2, 2\)",
    ),
    "too many taps": ({"mask": torch.ones(1, 1, 65, 64).bool()}, ValueError, r"mask of shape \(1, 1, 65, 64\) cannot"),
    "block of 0": ({"block": (0, 1)}, ValueError, r"block must be .*, got \(0, 1\)"),
    "block of fractions": ({"block": (2.0, 1)}, ValueError, r"block must be .*, got \(2.0, 1\)"),
    "block of 3": ({"block": (1, 1, 1)}, ValueError, r"block must be .*, got \(1, 1, 1\)"),
    "another block": ({"block": (4, 4)}, ValueError, r"mask does not obey block \(4, 4\)"),
    "block of bytes": ({"block": b"\x01\x01"}, ValueError, r"block must be .*, got b'\\x01\\x01'"),
    "block of bools": ({"block": (True, 1)}, ValueError, r"block must be .*, got \(True, 1\)"),
    "groups of text": ({"groups": "1"}, ValueError, "groups must divide .*, got '1'"),
    "groups of bool": ({"groups": True}, ValueError, "groups must divide .*, got True"),
    "groups": ({"groups": 3}, ValueError, "groups must divide the mask's 8 output channels, got 3"),
    "no groups": ({"groups": 0}, ValueError, "groups must divide .*, got 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        compile_pattern(**{"mask": CASE.mask, "block": (1, 1), "groups": 1, **change})


def test_bad_kernels_and_weights_are_reported_by_name_and_value():
    with pytest.raises(ValueError, match="grad_input must be one of auto, sparse, dense, got 'quick'"):
        set_kernels(CASE.pattern(), grad_input="quick")
    with pytest.raises(ValueError, match="weight is on meta, pattern on cpu"):
        pack_pattern(CASE.pattern(), CASE.weight.to("meta"))
    with pytest.raises(ValueError, match=r"made for a weight of shape \(8, 3, 3, 3\), weight has shape \(7, 3, 3, 3\)"):
        pack_pattern(CASE.pattern(), CASE.weight[1:])
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=f"weight must be a floating point tensor, got {dtype}"):
            pack_pattern(CASE.pattern(), CASE.weight.to(dtype))
    with pytest.raises(TypeError, match="weight must be a tensor, got NoneType"):
        pack_pattern(CASE.pattern(), None)


# Below Python: the ops check every pattern that they are given.


def call_all(pattern: list[Tensor], case: Case = CASE) -> None:
    """Calls every op; an op that accepts the list of tensors returns a tensor of the right size."""
    errors = []
    sizes = {"forward": case.output_size, "grad_input": case.input_size, "grad_weight": case.weight_size}
    ops = torch.ops.sparse_adv
    calls: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: ops.masked_conv2d(case.input, case.weight, pattern, None, *case.shape, *NO_EPILOGUE),
        "grad_input": lambda: ops.masked_conv2d_grad_input(
            case.grad_output, case.weight, pattern, case.input_size, *case.shape
        ),
        "grad_weight": lambda: ops.masked_conv2d_grad_weight(case.grad_output, case.input, pattern, *case.shape),
        "pack_values": lambda: ops.pack_values(case.weight, pattern)[0],
    }
    for name, call in calls.items():
        try:
            result = call()
        except RuntimeError as error:
            errors.append(error)
        else:
            assert name not in sizes or tuple(result.shape) == tuple(sizes[name])
    if errors:
        raise errors[0]


def changed(tensor: Tensor, at: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


def with_tensor(at: int, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda pattern: [*pattern[:at], change(pattern[at]), *pattern[at + 1 :]]


TAMPERED = {
    "no tensors": (lambda p: [], "expected 6 tensors, or 8"),
    "five tensors": (lambda p: p[:5], "expected 6 tensors, or 8"),
    "seven tensors": (lambda p: [*p, p[5]], "expected 6 tensors, or 8"),
    "short header": (with_tensor(0, lambda t: t[1:]), "header must be 19 int64"),
    "header of another dtype": (with_tensor(0, lambda t: t.int()), "header must be 19 int64"),
    "header with gaps": (with_tensor(0, lambda t: t.repeat_interleave(2)[::2]), "header must be 19 int64"),
    "another format": (with_tensor(0, lambda t: changed(t, 0, 2)), "format 2, this library reads 1"),
    "no groups": (with_tensor(0, lambda t: changed(t, 5, 0)), "header field 5 is out of range"),
    "negative channels": (with_tensor(0, lambda t: changed(t, 2, -3)), "header field 2 is out of range"),
    "groups that do not divide": (with_tensor(0, lambda t: changed(t, 5, 3)), "sizes do not fit together"),
    "other groups": (with_tensor(0, lambda t: changed(t, 5, 1)), "compiled for 1"),
    "oc_block of 3": (with_tensor(0, lambda t: changed(t, 11, 3)), "oc_block must be 1, 2 or 4, got 3"),
    "another oc_block": (with_tensor(0, lambda t: changed(t, 11, 4)), "row offsets, expected"),
    "ic_block of 0": (with_tensor(0, lambda t: changed(t, 12, 0)), "ic_block must be a power of 2 from 1 to 524288"),
    "ic_block of 24": (with_tensor(0, lambda t: changed(t, 12, 24)), "ic_block must be a power of 2 .* got 24"),
    "ic_block of grad_input of 24": (with_tensor(0, lambda t: changed(t, 14, 24)), "must be a power of 2 .* got 24"),
    "ic_block of 2^20": (with_tensor(0, lambda t: changed(t, 12, 2**20)), "from 1 to 524288, got 1048576"),
    "too many kept weights": (with_tensor(0, lambda t: changed(t, 10, 2**60)), "1152921504606846976 kept weights"),
    "negative kept weights": (with_tensor(0, lambda t: changed(t, 10, -1)), "-1 kept weights"),
    "rows of a filter": (with_tensor(0, lambda t: changed(t, 9, 3)), "block spans rows of the filter"),
    "mask of numbers": (with_tensor(1, lambda t: t.float()), "mask's shape differs"),
    "another mask": (with_tensor(1, lambda t: t[:, 1:]), "mask's shape differs"),
    "flat mask": (with_tensor(1, lambda t: t.flatten()), "mask's shape differs"),
    "row offsets of another dtype": (with_tensor(2, lambda t: t.long()), "contiguous one-dimensional int32"),
    "row offsets with gaps": (
        with_tensor(2, lambda t: t.repeat_interleave(2)[::2]),
        "contiguous one-dimensional int32",
    ),
    "too few row offsets": (with_tensor(2, lambda t: t[:-1]), "row offsets, expected"),
    "row offsets from 1": (with_tensor(2, lambda t: changed(t, 0, 1)), "do not span the column indices"),
    "row offsets too large": (with_tensor(2, lambda t: changed(t, -1, 10**6)), "do not span the column indices"),
    "descending row offsets": (with_tensor(2, lambda t: changed(t, 1, 10**6)), "must not descend"),
    "negative row offsets": (with_tensor(4, lambda t: changed(t, 1, -1)), "must not descend"),
    "column indices of another dtype": (with_tensor(3, lambda t: t.float()), "contiguous one-dimensional int32"),
    "column indices in two dimensions": (with_tensor(3, lambda t: t[None]), "contiguous one-dimensional int32"),
    "too few column indices": (with_tensor(3, lambda t: t[:-1]), "do not span the column indices"),
    "tap out of range": (with_tensor(3, lambda t: changed(t, 0, 9)), "a column index is outside"),
    "channel out of range": (with_tensor(3, lambda t: changed(t, -1, 6 << TAP_BITS)), "a column index is outside"),
    "channel of another group": (with_tensor(3, lambda t: changed(t, 0, 4 << TAP_BITS)), "a column index is outside"),
    "negative column index": (with_tensor(5, lambda t: changed(t, 0, -1)), "a column index is outside"),
    "too few values": (lambda p: [*p, torch.zeros(3), torch.zeros(3)], "packed values must be"),
    "values of another dtype": (lambda p: [*p, *(t.double() for t in values(p))], "packed values must be"),
    "values with gaps": (lambda p: [*p, *(t.repeat_interleave(2)[::2] for t in values(p))], "packed values must be"),
}


def values(pattern: list[Tensor]) -> list[Tensor]:
    return pack_pattern(unflatten(pattern), MASKED).flatten()[6:]


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_patterns_are_refused(name):
    change, message = TAMPERED[name]
    with pytest.raises(RuntimeError, match=message):
        call_all(change(CASE.pattern("sparse").flatten()))


def test_an_ic_block_that_overflows_is_refused():
    case = Case(group_in=2, group_out=1)
    header, mask, _, _, *grad_input = case.pattern("sparse").flatten()
    none = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        call_all([changed(header, 12, 2**63 - 1), mask, none, none, *grad_input], case)


@settings(max_examples=300)
@given(st.data())
def test_no_pattern_crashes_the_process(data):
    """Whatever is changed, an op either refuses the pattern or returns a tensor of the right size."""
    numbers = st.sampled_from((-(2**63), -(2**31), -1, 0, 1, 2, 3, 4, 6, 8, 9, 16, 1 << TAP_BITS, 2**31 - 1, 2**63 - 1))
    compiled = CASE.pattern("sparse")
    pattern = (pack_pattern(compiled, MASKED) if data.draw(st.booleans()) else compiled).flatten()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(pattern) - 1))
        tensor = pattern[at].clone()
        match data.draw(st.sampled_from(("element", "cut", "swap", "dtype"))):
            case "element" if tensor.numel():
                flat = tensor.view(-1)
                value = data.draw(numbers)
                limits = torch.iinfo(flat.dtype) if flat.dtype in (torch.int32, torch.int64) else None
                place = data.draw(st.integers(0, flat.numel() - 1))
                flat[place] = min(max(value, limits.min), limits.max) if limits else float(value)
            case "cut":
                tensor = tensor[: data.draw(st.integers(0, len(tensor)))].clone()
            case "swap":
                tensor = pattern[data.draw(st.integers(0, len(pattern) - 1))]
            case "dtype":
                tensor = tensor.to(data.draw(st.sampled_from((torch.int64, torch.int32, torch.float32, torch.bool))))
        pattern = [*pattern[:at], tensor, *pattern[at + 1 :]]
    with contextlib.suppress(RuntimeError):
        call_all(pattern)


@pytest.mark.parametrize("name", ["dtype", "channels", "residual", "bias", "size", "negative", "grad", "stride"])
def test_ops_refuse_arguments_that_do_not_fit_the_pattern(name):
    case, pattern, ops = CASE, CASE.pattern("sparse").flatten(), torch.ops.sparse_adv
    tensors = (case.input, case.weight, pattern, None)
    calls = {
        "dtype": lambda: ops.masked_conv2d(case.input, case.weight.double(), *tensors[2:], *case.shape, *NO_EPILOGUE),
        "channels": lambda: ops.masked_conv2d(case.input[:, 1:], *tensors[1:], *case.shape, *NO_EPILOGUE),
        "residual": lambda: ops.masked_conv2d(*tensors, *case.shape, None, case.grad_output[:1], False),
        "bias": lambda: ops.masked_conv2d(*tensors[:3], torch.zeros(7), *case.shape, *NO_EPILOGUE),
        "size": lambda: ops.masked_conv2d_grad_input(case.grad_output, case.weight, pattern, [9] * 4, *case.shape),
        "negative": lambda: ops.masked_conv2d_grad_input(
            case.grad_output, case.weight, pattern, [-2, 6, 9, 11], *case.shape
        ),
        "grad": lambda: ops.masked_conv2d_grad_weight(case.grad_output[..., 1:], case.input, pattern, *case.shape),
        "stride": lambda: ops.masked_conv2d(*tensors, [0, 1], *case.shape[1:], *NO_EPILOGUE),
    }
    with pytest.raises(RuntimeError, match="sparse_adv: "):
        calls[name]()


def test_a_pattern_for_another_weight_is_refused():
    with pytest.raises(ValueError, match="pattern was made for a weight of shape"):
        masked_conv2d(CASE.input, CASE.weight, Case().pattern(), groups=2)
