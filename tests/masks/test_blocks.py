"""Blocks: the largest block that a mask obeys, and grids of blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_adv.masks import SUPPORTED_BLOCKS, largest_block, prune
from sparse_adv.masks.blocks import block_sizes, block_sums, grid_shape


@pytest.mark.parametrize("block", [b for b in SUPPORTED_BLOCKS if "S" not in b])
def test_largest_block_finds_the_block_that_a_mask_was_made_with(block):
    mask = prune(nn.Conv2d(128, 128, 3), 0.5, block)[""]
    assert largest_block(mask) == (*block, 1, 1)


def test_kernel_and_row_blocks_have_the_size_of_the_filter():
    assert largest_block(prune(nn.Conv2d(9, 8, 3), 0.5, (1, 1, 3, 3))[""]) == (1, 1, 3, 3)
    assert largest_block(prune(nn.Conv2d(9, 8, 5), 0.5, (1, 1, 1, 5))[""]) == (1, 1, 1, 5)
    assert largest_block(prune(nn.Conv2d(16, 16, 3), 0.5)[""], candidates=[(4, 4)]) == (1, 1, 1, 1)


def test_the_largest_block_has_the_most_elements_whatever_its_sides():
    kernels = torch.eye(2, dtype=torch.bool).repeat_interleave(2, 0)[:, :, None, None]  # pairs of filters are equal
    assert largest_block(kernels.expand(4, 2, 3, 3), [(2, 1), (1, 1, "R", "S")]) == (1, 1, 3, 3)
    assert largest_block(kernels, [(2, 1), (1, 1, "R", "S")]) == (2, 1, 1, 1)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (8, 8)])
def test_largest_block_accepts_masks_of_linear_layers(block):
    assert largest_block(prune(nn.Linear(40, 48), 0.5, block, linear=True)[""]) == (*block, 1, 1)


SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4)


@given(SIZES)
def test_sums_over_blocks_are_those_of_a_loop_and_sizes_count_elements(sizes):
    shape, block = zip(*sizes, strict=True)
    values = torch.randn(shape, dtype=torch.float64)
    sums, counts = block_sums(values, block), block_sizes(shape, block)
    assert list(sums.shape) == list(counts.shape) == grid_shape(shape, block)
    for index in torch.cartesian_prod(*map(torch.arange, sums.shape)).view(-1, len(shape)).tolist():
        part = values[tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, block, strict=True))]
        assert sums[tuple(index)] == pytest.approx(part.sum()) and counts[tuple(index)] == part.numel()


def test_a_block_larger_than_the_weight_is_the_whole_weight():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    kept = prune(model, 0.5, (10**6, 10**6, 10**6, 10**6))
    assert [bool(mask.any()) == bool(mask.all()) for mask in kept.values()] == [True, True]
