"""Data sets: ranges, types and splits."""

import pytest
import torch

from sparse_adv import data

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_digits_are_float_images_in_zero_one_with_every_class():
    for part in data.digits():
        assert part.images.dtype == torch.float32 and part.images.shape[1:] == (1, 8, 8)
        assert part.images.min() == 0 and part.images.max() == 1
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(10))


def test_splits_share_no_image_and_lose_none():
    count = 40
    whole = data.Split(torch.arange(count).view(count, 1, 1, 1), torch.arange(count) + 100)
    dataset = data.split(whole, validation=7, test=5, seed=3)
    assert [len(part.labels) for part in dataset] == [28, 7, 5]
    assert sorted(torch.cat([part.images.flatten() for part in dataset]).tolist()) == list(range(count))
    assert all(torch.equal(part.images.flatten() + 100, part.labels) for part in dataset)


def test_the_seed_decides_the_split():
    first, again, other = (data.digits(seed=seed).test.images for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("validation", "test"), [(900, 897), (-1, 10), (10, -1)])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(validation, test):
    with pytest.raises(ValueError, match=f"got {validation}, {test}"):
        data.digits(validation, test)
