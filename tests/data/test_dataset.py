"""Splits and data sets: holding images out, taking a share of them, and moving between devices."""

import pytest
import torch

from sparse_adv.data import Batches, Dataset, Split, hold_out, stratified


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


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5])
def test_a_share_has_the_same_fraction_of_each_class_and_follows_the_seed(share):
    labels = torch.tensor([0] * 40 + [1] * 8 + [3])
    split = Split(torch.arange(49, dtype=torch.uint8).view(49, 1, 1, 1), labels)
    chosen, again, other = (stratified(split, share, seed) for seed in (0, 0, 1))
    counts = {label: max(1, round(share * count)) for label, count in ((0, 40), (1, 8), (3, 1))}
    assert {label: int((chosen.labels == label).sum()) for label in counts} == counts
    assert chosen.labels.equal(labels[chosen.images.flatten().long()])
    assert chosen.images.equal(again.images) and not chosen.images.equal(other.images)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan")])
def test_a_share_outside_of_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got "):
        stratified(Split(torch.zeros(4, 1, 1, 1), torch.arange(4)), share)


IMAGES, LABELS = torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize("use", [hold_out, stratified, Batches])
@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES.numpy(), LABELS, "images of the split must be a tensor, got ndarray"),
        (IMAGES, [0, 1, 0, 1], "labels of the split must be a tensor, got list"),
        (IMAGES, torch.zeros(4), r"labels of the split must be integers, got torch\.float32"),
        (IMAGES, LABELS[1:], r"got 4 images, labels of shape \[3\]"),
        (IMAGES[1:], LABELS, r"got 3 images, labels of shape \[4\]"),
        (IMAGES, LABELS[:, None], r"got 4 images, labels of shape \[4, 1\]"),
    ],
)
def test_a_split_must_have_a_label_for_each_image(use, images, labels, said):
    with pytest.raises((TypeError, ValueError), match=said):
        use(Split(images, labels), 1)
