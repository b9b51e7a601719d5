"""Data sets by their place: what `load` holds out and limits, and the digits that need no files."""

import pytest
import torch

from sparse_adv import data

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def numbered(count: int) -> data.Split:
    """Images that are their own number, labels that are 100 more."""
    return data.Split(torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1), torch.arange(count) + 100)


def numbers(*splits: data.Split) -> list[int]:
    return [int(number) for split in splits for number in split.images.flatten()]


def test_digits_are_bytes_of_the_whole_range_with_every_class():
    dataset = data.load("digits")
    assert (dataset.classes, dataset.name, dataset.input_shape) == (10, "digits", (1, 8, 8))
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 8, 8)
        assert part.images.min() == 0 and part.images.max() == 255
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(10))
    assert dataset.train.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]


def test_holding_out_loses_no_image_and_keeps_labels_with_images():
    parts = data.hold_out(numbered(40), 7, seed=3)
    assert [len(part.labels) for part in parts] == [33, 7]
    assert sorted(numbers(*parts)) == list(range(40))
    assert all(torch.equal(part.images.flatten() + 100, part.labels) for part in parts)


def test_the_seed_decides_what_is_held_out_but_never_the_test_images():
    first, again, other = (data.load("digits", seed=seed) for seed in (1, 1, 2))
    assert first.validation.images.equal(again.validation.images)
    assert not first.validation.images.equal(other.validation.images)
    assert first.test.images.equal(other.test.images)


@pytest.mark.parametrize(("validation", "held"), [(None, 150), (0.5, 748), (300, 300), (1, 1)])
def test_validation_is_a_share_or_a_number(validation, held):
    dataset = data.load("digits", validation=validation)
    assert (len(dataset.train.labels), len(dataset.validation.labels)) == (1497 - held, held)


def test_limit_takes_the_first_images_before_any_are_held_out():
    everything, few = data.load("digits", validation=1), data.load("digits", limit=20, validation=5)
    assert (len(few.train.labels), len(few.validation.labels), len(few.test.labels)) == (15, 5, 300)
    assert few.test.images.equal(everything.test.images)
    first, other = data.load("digits", limit=20, validation=5, seed=1), data.load("digits", limit=20, validation=5)
    seen = [torch.cat([d.train.images, d.validation.images]).flatten(1).tolist() for d in (first, other)]
    assert sorted(seen[0]) == sorted(seen[1])
    assert len(data.load("digits", limit=2).validation.labels) == 1


def test_a_data_set_moves_to_a_device_as_a_whole():
    dataset = data.load("digits", device="meta")
    assert {tensor.device.type for part in dataset[:3] for tensor in part} == {"meta"}
    assert (dataset.classes, dataset.input_shape) == (10, (1, 8, 8))


@pytest.mark.parametrize("validation", [0, 0.0001, -1, 1.5, 1497, float("nan"), float("inf")])
def test_a_validation_that_leaves_nothing_is_refused(validation):
    with pytest.raises(ValueError, match=f"validation must .*, got {validation:g}"):
        data.load("digits", validation=validation)


@pytest.mark.parametrize("limit", [-5, 0, 1, 1498])
def test_a_limit_beyond_the_images_is_refused(limit):
    with pytest.raises(ValueError, match=f"limit must be from 2 to the 1497 training images of digits, got {limit}"):
        data.load("digits", limit=limit)


def test_holding_out_everything_is_refused():
    with pytest.raises(ValueError, match="some of 4 images to train on, got 4"):
        data.hold_out(numbered(4), 4)


def test_a_place_with_nothing_in_it_is_told_with_what_is_understood(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere; only 'digits' needs no files"):
        data.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no images")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"understood: 'digits', cifar-10-batches-py, .*PNG or JPEG"):
            data.load(place)
