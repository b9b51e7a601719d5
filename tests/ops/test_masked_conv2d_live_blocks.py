"""The lists of live blocks that the Triton kernels read: all blocks of a mask, each once, longest list first."""

import pytest
import torch
from helpers.convolution_cases import block_mask
from hypothesis import given
from hypothesis import strategies as st

from sparse_adv.ops.masked_conv2d_live_blocks import blocks_fit, live_blocks

sizes = st.sampled_from((32, 64))


@given(sizes, sizes, st.integers(1, 200), st.integers(1, 200), st.sampled_from((0.0, 0.1, 0.6, 1.0)), st.integers(0, 9))
def test_the_lists_contain_each_block_of_the_mask_once(out, into, out_channels, in_channels, density, seed):
    mask = block_mask((out_channels, in_channels, 3, 2), (out, into), density, seed)
    rows, blocks, grad_rows, grad_order = live_blocks(mask, (out, into))
    rebuilt = torch.zeros_like(mask)
    for k, c, r, s in blocks.tolist():
        assert not rebuilt[k, c, r, s]
        rebuilt[k : k + out, c : c + into, r, s] = True
    assert rebuilt.equal(mask)
    for listed, dim, entries in ((rows, 0, blocks), (grad_rows, 1, blocks[grad_order.long()])):
        lengths = listed[:, 2] - listed[:, 1]
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True) and int(lengths.sum()) == len(blocks)
        assert len(listed) == -(-mask.shape[dim] // (out, into)[dim])
        for first, start, end in listed.tolist():
            assert (entries[start:end, dim] == first).all()


def test_input_channels_are_counted_over_all_groups():
    mask = block_mask((128, 32, 3, 3), (64, 32), 1.0)
    rows, blocks, grad_rows, _ = live_blocks(mask, (64, 32), groups=2)
    assert {(k, c) for k, c, _, _ in blocks.tolist()} == {(0, 0), (64, 32)}
    assert sorted(rows[:, 0].tolist()) == [0, 64] and sorted(grad_rows[:, 0].tolist()) == [0, 32]


@pytest.mark.parametrize(
    ("block", "groups", "shape", "fits"),
    [
        ((32, 32, 1, 1), 1, (70, 50, 3, 3), True),
        ((64, 32, 1, 1), 2, (128, 32, 3, 3), True),
        ((64, 32, 1, 1), 2, (64, 32, 3, 3), False),
        ((32, 64, 1, 1), 2, (64, 32, 3, 3), False),
        ((16, 32, 1, 1), 1, (64, 64, 3, 3), False),
        ((32, 32, 3, 3), 1, (64, 64, 3, 3), False),
        ((1, 1, 1, 1), 1, (64, 64, 3, 3), False),
    ],
)
def test_blocks_of_32_and_64_channels_within_a_group_have_kernels(block, groups, shape, fits):
    assert blocks_fit(block, groups, shape) is fits
