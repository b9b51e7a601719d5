"""Masks and their blocks: which blocks a mask obeys, and masks made of a grid of blocks."""

import pytest
import torch
from helpers.convolution_cases import cases
from helpers.tolerances import assert_equal
from hypothesis import given
from hypothesis import strategies as st

from sparse_adv.ops import compile_pattern
from sparse_adv.ops.masked_conv2d_mask import expand_blocks, obeys


def test_the_mask_of_a_linear_layer_obeys_blocks_like_a_1x1_filter_but_is_not_compiled():
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2:4, 1] = True
    for block, expected in (((2, 1), True), ((2, 1, 3, 3), True), ((4, 1), False), ((2, 2), False)):
        assert obeys(mask, block) is obeys(mask[:, :, None, None], block) is expected
    with pytest.raises(ValueError, match=r"shape \[K, C/groups, R, S\], got \(6, 4\)"):
        compile_pattern(mask)


@given(cases(), st.integers(0, 2**30))
def test_a_mask_with_one_weight_changed_no_longer_obeys_its_block(case, place):
    assert obeys(case.mask, case.block)
    changed = case.mask.clone().flatten()
    changed[place % changed.numel()] ^= True
    changed = changed.view_as(case.mask)
    place = place % changed.numel()
    for size, length, stride in zip((*case.block, 1, 1)[:4], changed.shape, changed.stride(), strict=True):
        first = place // stride % length // size * size
        if min(size, length - first) > 1:  # the weight shares its block with others
            assert not obeys(changed, case.block)
            with pytest.raises(ValueError, match="mask does not obey block"):
                compile_pattern(changed, case.block, case.groups)
            return
    assert obeys(changed, case.block)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 9))
def test_every_weight_gets_the_value_of_its_block(dimensions, seed):
    shape, block = zip(*dimensions, strict=True)
    counts = [-(-length // size) for length, size in dimensions]
    grid = torch.randint(100, counts, generator=torch.Generator().manual_seed(seed))
    expanded = expand_blocks(grid, block, shape)
    assert tuple(expanded.shape) == shape and expanded.is_contiguous()
    for index in torch.ones(shape).nonzero().tolist():
        assert expanded[tuple(index)] == grid[tuple(i // size for i, size in zip(index, block, strict=True))]


@given(cases())
def test_the_first_weight_of_each_block_gives_the_mask_back(case):
    block = (*case.block, 1, 1)[:4]
    grid = case.mask[tuple(slice(None, None, size) for size in block)]
    assert_equal(expand_blocks(grid, block, case.mask.shape), case.mask)
