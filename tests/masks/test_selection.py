"""Exact numbers of blocks are selected, and the right ones: compared with plain NumPy."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.masks.selection import select_blocks, smallest


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, math.inf]), min_size=1, max_size=40),
    data=st.data(),
)
def test_the_smallest_scores_are_selected_and_of_equal_ones_the_first(scores, data):
    among = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    count = data.draw(st.integers(0, int(among.sum())))
    found = smallest(torch.tensor(scores), torch.from_numpy(among), count)
    order = [i for i in np.argsort(np.array(scores), kind="stable") if among[i]]
    expected = np.isin(np.arange(len(scores)), order[:count])
    assert found.tolist() == expected.tolist()


def test_nan_counts_as_zero_and_infinity_as_the_largest_number():
    scores = torch.tensor([1.0, math.nan, math.inf, -1.0])
    everything = torch.ones(4, dtype=torch.bool)
    assert smallest(scores, everything, 2).tolist() == [False, True, False, True]
    assert smallest(scores, everything, 4).all()


@settings(deadline=None, max_examples=200)
@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=0, max_size=20),
    size=st.integers(1, 5),
    target=st.integers(0, 110),
)
def test_blocks_of_one_size_are_selected_as_those_of_several(scores, size, target):
    """A block of another size and of the lowest score, which is out of reach, must make no difference."""
    target = min(target, size * len(scores))
    grids = {"layer": torch.tensor(scores), "rest": torch.tensor([-1.0])}
    sizes = {"layer": torch.full((len(scores),), size), "rest": torch.tensor([10**6])}
    alone = select_blocks(grids, sizes, {("layer",): target})
    together = select_blocks(grids, sizes, {("layer", "rest"): target})
    assert alone["layer"].tolist() == together["layer"].tolist() and not together["rest"].any()
