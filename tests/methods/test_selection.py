"""Exact numbers of blocks are dropped and grown, and the right ones: compared with plain NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.masks.blocks import block_sizes
from sparse_adv.methods import selection


def smallest_in_numpy(scores: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    order = [i for i in np.argsort(scores, kind="stable") if among[i]]
    chosen = np.zeros(len(scores), dtype=bool)
    chosen[order[:count]] = True
    return chosen


shapes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(shapes, st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 9))
def test_drop_and_grow_is_that_of_plain_numpy_and_keeps_the_number_of_blocks(shapes, fraction, density, joint, seed):
    random = np.random.default_rng(seed)
    names = [str(i) for i in range(len(shapes))]
    grids = {n: random.random(shape) < density for n, shape in zip(names, shapes, strict=True)}
    drop, grow = ({n: random.integers(0, 4, grid.shape).astype(float) for n, grid in grids.items()} for _ in range(2))
    groups = [tuple(names)] if joint else [(name,) for name in names]

    expected = {}
    for group in groups:
        kept = np.concatenate([grids[n].ravel() for n in group])
        if not kept.all():
            count = math.ceil(fraction * kept.sum())
            kept &= ~smallest_in_numpy(np.concatenate([drop[n].ravel() for n in group]), kept, count)
            kept |= smallest_in_numpy(-np.concatenate([grow[n].ravel() for n in group]), ~kept, count)
        parts = np.split(kept, np.cumsum([grids[n].size for n in group])[:-1])
        expected |= {n: part.reshape(grids[n].shape) for n, part in zip(group, parts, strict=True)}

    def tensors(arrays):
        return {n: torch.from_numpy(array) for n, array in arrays.items()}

    new = selection.drop_and_grow(tensors(grids), tensors(drop), lambda: tensors(grow), groups, fraction)
    for name in names:
        assert np.array_equal(new.get(name, torch.from_numpy(grids[name])).numpy(), expected[name])
    for group in groups:
        kept = sum(int(new.get(n, torch.from_numpy(grids[n])).sum()) for n in group)
        assert kept == sum(int(grids[n].sum()) for n in group)


@pytest.mark.parametrize("density", [0, 1])
def test_nothing_is_dropped_and_no_gradient_is_asked_for_at_density_0_and_1(density):
    grids = {"a": torch.full((2, 3), bool(density))}

    def grow():
        raise AssertionError("not needed")

    assert selection.drop_and_grow(grids, {"a": torch.rand(2, 3)}, grow, [("a",)], 0.5) == {}


def test_pruning_never_grows_a_block():
    grids = {"a": torch.tensor([True, False, True, True])}
    scores, sizes = {"a": torch.tensor([0.0, 9.0, 1.0, 2.0])}, {"a": torch.tensor([3, 3, 3, 3])}
    assert selection.prune(grids, scores, sizes, {("a",): 6})["a"].tolist() == [False, False, True, True]
    for target in (9, 12):
        assert selection.prune(grids, scores, sizes, {("a",): target}) == {}


@settings(deadline=None, max_examples=200)
@given(
    shapes, st.sampled_from([(1, 1), (2, 2), (3, 2)]), st.floats(0, 1), st.sampled_from([0.5, 1.0]), st.integers(0, 9)
)
def test_pruning_keeps_the_weights_that_were_asked_for_as_nearly_as_blocks_allow(layers, block, density, live, seed):
    """And no block is dropped whose score is higher than that of one that is kept."""
    random = torch.Generator().manual_seed(seed)
    sizes = {str(i): block_sizes(shape, block) for i, shape in enumerate(layers)}
    grids = {name: torch.rand(size.shape, generator=random) < live for name, size in sizes.items()}
    scores = {name: torch.rand(size.shape, generator=random) for name, size in sizes.items()}
    weights = sum(int(size.sum()) for size in sizes.values())
    before = sum(int(sizes[name][grid].sum()) for name, grid in grids.items())
    target = round(density * weights)
    new = grids | selection.prune(grids, scores, sizes, {tuple(sizes): target})
    kept = sum(int(sizes[name][grid].sum()) for name, grid in new.items())
    assert abs(kept - min(target, before)) <= max(int(size.max()) for size in sizes.values()) / 2
    dropped = torch.cat([scores[name][grids[name] & ~new[name]] for name in sizes])
    remaining = torch.cat([scores[name][new[name]] for name in sizes])
    assert not len(dropped) or not len(remaining) or dropped.max() <= remaining.min()
