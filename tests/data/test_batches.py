"""Batches: each image once per epoch, reproducible epochs, sharing among processes, and augmentation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparse_adv.data import Batches, Split, crop_and_flip, to_unit


def numbered(count: int) -> Split:
    """One-pixel images; pixel and label are the number of the image."""
    return Split(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1), torch.arange(count))


def labels(batches: Batches) -> list[list[int]]:
    return [y.tolist() for _, y in batches]


def noise(count: int = 20, height: int = 6, width: int = 5) -> Split:
    return Split(torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8), torch.arange(count))


def test_images_are_float32_in_0_1_and_match_their_labels():
    for x, y in Batches(numbered(200), 64):
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), 1, 1, 1)
        assert x.flatten().equal(y.float() / 255)


def test_float_images_are_not_rescaled_and_integer_images_raise():
    images = torch.rand(4, 1, 2, 2)
    ((x, _),) = Batches(Split(images.double(), torch.arange(4)), 4, shuffle=False)
    assert x.dtype == torch.float32 and x.equal(images)
    with pytest.raises(TypeError, match=r"uint8 or float in \[0, 1\], got torch.int64"):
        Batches(Split(torch.arange(4), torch.arange(4)), 2)


def test_changing_a_batch_does_not_change_the_split():
    split = noise()
    before = split.images.clone()
    for x, _ in Batches(split, 8, augment=True):
        x.zero_()
    assert split.images.equal(before)


@given(images=st.integers(0, 40), share=st.integers(1, 5), world_size=st.integers(1, 4), shuffle=st.booleans())
def test_processes_share_each_batch_and_len_counts_the_batches_of_a_process(images, share, world_size, shuffle):
    assume(not shuffle or images >= world_size)
    ranks = [
        Batches(numbered(images), share * world_size, shuffle=shuffle, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    own = [labels(batches) for batches in ranks]
    assert [len(batches) for batches in ranks] == [len(batches) for batches in own]
    assert all(batch for batches in own for batch in batches)
    seen = sorted(label for batches in own for batch in batches for label in batch)
    if shuffle:
        assert len({tuple(map(len, batches)) for batches in own}) == 1
        assert len(seen) == len(set(seen)) == images - images % world_size
    else:
        assert seen == list(range(images))
        assert max(map(len, own)) == math.ceil(images / (share * world_size))


def test_two_processes_together_get_the_batches_of_one_process():
    split = noise(20)
    options = {"augment": True, "seed": 3}
    whole = list(Batches(split, 8, **options))
    parts = [list(Batches(split, 8, rank=rank, world_size=2, **options)) for rank in range(2)]
    for i, (x, y) in enumerate(whole):
        for rank in range(2):
            assert parts[rank][i][0].equal(x[rank::2]) and parts[rank][i][1].equal(y[rank::2])


def test_an_epoch_depends_only_on_seed_and_epoch_number():
    split = noise()
    batches, other = Batches(split, 8, augment=True, seed=1), Batches(split, 8, augment=True, seed=1)
    epochs = [list(batches) for _ in range(3)]
    torch.rand(1)
    other.set_epoch(2)
    assert all(x.equal(a) and y.equal(b) for (x, y), (a, b) in zip(epochs[2], other, strict=True))
    orders = {str([y.tolist() for _, y in epoch]) for epoch in epochs}
    orders.add(str(labels(Batches(split, 8, augment=True, seed=2))))
    assert len(orders) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_random_numbers_of_an_epoch_are_drawn_batch_by_batch(world_size):
    """The order of the draws must not change: it decides which epoch a seed gives."""
    split = noise(21)
    draws = torch.Generator().manual_seed(int(np.random.SeedSequence([5, 3, 0]).generate_state(1)[0]))
    expected = []
    for batch in torch.randperm(21, generator=draws)[: 21 - 21 % world_size].split(8):
        shifts = torch.randint(0, 9, (2, len(batch)), generator=draws)
        flips = torch.rand(len(batch), generator=draws) < 0.5
        own = slice(world_size - 1, None, world_size)
        expected.append((to_unit(crop_and_flip(split.images[batch[own]], shifts[:, own], flips[own])), batch[own]))
    batches = Batches(split, 8, augment=True, seed=5, rank=world_size - 1, world_size=world_size)
    batches.set_epoch(3)
    for (x, y), (images, labels) in zip(batches, expected, strict=True):
        assert x.equal(images) and y.equal(labels)


def test_an_iteration_that_is_abandoned_counts_as_an_epoch():
    batches, other = Batches(numbered(40), 8), Batches(numbered(40), 8)
    iter(batches)
    other.set_epoch(1)
    assert labels(batches) == labels(other)


def test_global_random_state_does_not_change():
    batches, before = Batches(noise(), 8, augment=True), torch.get_rng_state()
    list(batches)
    assert torch.get_rng_state().equal(before)


def test_without_shuffle_images_come_in_order_in_each_epoch():
    batches = Batches(numbered(7), 3, shuffle=False)
    assert labels(batches) == labels(batches) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 5, 9)])
def test_crop_and_flip_equals_a_loop_over_images(dtype, shape):
    _, height, width = shape
    images = torch.randint(1, 256, (50, *shape)).to(dtype)
    shifts, flips = torch.randint(0, 9, (2, 50)), torch.rand(50) < 0.5
    expected = []
    for image, row, column, flip in zip(images, *shifts.tolist(), flips.tolist(), strict=True):
        padded = torch.zeros(shape[0], height + 8, width + 8, dtype=dtype)
        padded[:, 4:-4, 4:-4] = image
        crop = padded[:, row : row + height, column : column + width]
        expected.append(crop.flip(2) if flip else crop)
    actual = crop_and_flip(images, shifts, flips)
    assert actual.dtype == dtype and actual.equal(torch.stack(expected))


def test_augmentation_shifts_by_up_to_four_pixels_and_flips_half_of_the_images():
    split = Split(torch.zeros(2000, 1, 9, 9, dtype=torch.uint8), torch.zeros(2000, dtype=torch.int64))
    split.images[:, :, 4, 4], split.images[:, :, 4, 3] = 255, 51
    ((x, _),) = Batches(split, 2000, augment=True)
    bright, grey = (x == level for level in (1, 51 / 255))
    assert bright.any(0).all()  # from the centre to every pixel
    both = bright.flatten(1).any(1) & grey.flatten(1).any(1)
    straight = bright[both].flatten(1).int().argmax(1) > grey[both].flatten(1).int().argmax(1)
    assert 0.45 < straight.float().mean() < 0.55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size must be a positive multiple of world_size \(1\), got 0"),
        ({"batch_size": 9, "world_size": 2}, r"multiple of world_size \(2\), got 9"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 1\], got 2"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"split": Split(torch.zeros(3, 1, 2, 2), torch.arange(4))}, r"3 images, labels of shape \[4\]"),
        ({"split": numbered(3), "world_size": 4}, "an image for each of the 4 processes, got 3"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=message):
        Batches(**{"split": numbered(10), "batch_size": 8, **options})


def test_set_epoch_raises_for_a_negative_epoch():
    with pytest.raises(ValueError, match="epoch must be at least 0, got -1"):
        Batches(numbered(4), 2).set_epoch(-1)


def test_to_unit_maps_bytes_to_multiples_of_1_255():
    levels = to_unit(torch.arange(256, dtype=torch.uint8))
    assert levels.equal(torch.arange(256) / 255) and (levels * 255).round().equal(torch.arange(256).float())


@pytest.mark.parametrize(
    ("images", "size", "world_size", "sizes"),
    [
        (5, 4, 1, [5]),
        (9, 4, 1, [4, 5]),
        (10, 4, 1, [4, 4, 2]),
        (10, 4, 2, [2, 3]),
        (3, 1, 1, [1, 1, 1]),
        (1, 4, 1, [1]),
    ],
)
def test_a_last_batch_of_one_image_is_joined_to_the_one_before(images, size, world_size, sizes):
    split = Split(torch.zeros(images, 1, 2, 2), torch.arange(images))
    seen = []
    for rank in range(world_size):
        batches = Batches(split, size, rank=rank, world_size=world_size)
        labels = [y for _, y in batches]
        assert [len(y) for y in labels] == sizes and len(batches) == len(sizes)
        seen += torch.cat(labels).tolist()
    assert sorted(seen) == list(range(images))
    whole = Batches(split, size, shuffle=False)
    assert sum(len(y) for _, y in whole) == images and len(whole) == -(-images // size)


@pytest.mark.parametrize(
    ("images", "shifts", "flips", "said"),
    [
        ((3, 4, 4), (2, 3), 3, r"images must be \[N, C, H, W\], got shape \[3, 4, 4\]"),
        ((3, 1, 4, 4), (2, 2), 3, r"shifts must have shape \[2, 3\], got \[2, 2\]"),
        ((3, 1, 4, 4), (2, 3), 2, r"flips must have shape \[3\], got \[2\]"),
    ],
)
def test_augmentation_names_what_does_not_fit(images, shifts, flips, said):
    with pytest.raises(ValueError, match=said):
        crop_and_flip(torch.zeros(images), torch.full(shifts, 4), torch.zeros(flips, dtype=torch.bool))
