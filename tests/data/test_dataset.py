"""Splits and data sets: holding images out and moving between devices."""

import pytest
import torch

from sparse_adv.data import Dataset, Split, hold_out


def numbered(count: int) -> Split:
    """One-pixel images; the pixel is the number of the image, the label is 100 more."""
    return Split(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1), torch.arange(count) + 100)


def test_hold_out_loses_no_image_and_labels_match_their_images():
    parts = hold_out(numbered(40), 7, seed=3)
    assert [len(part.labels) for part in parts] == [33, 7]
    assert sorted(int(pixel) for part in parts for pixel in part.images.flatten()) == list(range(40))
    assert all(torch.equal(part.images.flatten() + 100, part.labels) for part in parts)


@pytest.mark.parametrize("count", [4, -1])
def test_hold_out_raises_if_no_image_remains_or_count_is_negative(count):
    with pytest.raises(ValueError, match=f"count must be at least 0 and less than the 4 images of split, got {count}"):
        hold_out(numbered(4), count)


def test_all_splits_of_a_data_set_move_to_a_device():
    dataset = Dataset(*(numbered(count) for count in (4, 2, 3)), classes=103, name="numbers").to("meta")
    assert {tensor.device.type for split in dataset[:3] for tensor in split} == {"meta"}
    assert (dataset.classes, dataset.name, dataset.input_shape) == (103, "numbers", (1, 1, 1))
