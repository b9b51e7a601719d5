"""Which views share memory, with themselves or with another tensor, as a look at every element says."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.ops.arguments import overlap_partly, overlaps_itself

BASE = torch.arange(400.0)
dimensions = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=4)


def view(sizes_and_strides, start=0):
    sizes, strides = zip(*sizes_and_strides, strict=True)
    return BASE.as_strided(sizes, strides, start)


@settings(max_examples=300)
@given(dimensions)
def test_a_view_overlaps_itself_if_two_of_its_elements_are_one(dimensions):
    tensor = view(dimensions)
    assert overlaps_itself(tensor) == (tensor.unique().numel() < tensor.numel())


@settings(max_examples=300)
@given(dimensions, dimensions, st.integers(0, 60), st.integers(0, 60))
def test_views_overlap_partly_if_they_share_elements_in_another_order(first, second, start, other):
    written, read = view(first, start), view(second, other)
    shared = bool(torch.isin(written.flatten(), read.flatten()).any())
    same_order = start == other and written.stride() == read.stride()
    assert overlap_partly(written, read) == (shared and not same_order)


def test_sums_of_several_strides_may_meet():
    assert overlaps_itself(BASE.as_strided((2, 2, 2), (1, 2, 3)))
    assert not overlaps_itself(BASE.as_strided((2, 2, 2), (1, 2, 4)))
    assert not overlaps_itself(BASE.as_strided((2, 2), (3, 2)))  # interleaved: elements 0, 2, 3 and 5
