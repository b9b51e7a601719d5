"""`load`: held-out validation images, limits, and messages about paths without a data set; on scikit-learn's digits."""

import pytest
import torch

from sparse_adv import data

pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")


def test_digits_are_uint8_from_0_to_255_and_each_split_contains_every_class():
    dataset = data.load("digits")
    assert (dataset.classes, dataset.name, dataset.input_shape) == (10, "digits", (1, 8, 8))
    for part in (dataset.train, dataset.validation, dataset.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == (1, 8, 8)
        assert part.images.min() == 0 and part.images.max() == 255
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(10))
    assert dataset.train.images.unique().tolist() == [round(level * 255 / 16) for level in range(17)]


def test_the_seed_decides_the_validation_images_but_never_the_test_images():
    first, again, other = (data.load("digits", seed=seed) for seed in (1, 1, 2))
    assert first.validation.images.equal(again.validation.images)
    assert not first.validation.images.equal(other.validation.images)
    assert first.test.images.equal(other.test.images)


@pytest.mark.parametrize(("validation", "count"), [(None, 150), (0.5, 748), (300, 300), (1, 1)])
def test_validation_is_a_fraction_or_a_number_of_images(validation, count):
    dataset = data.load("digits", validation=validation)
    assert (len(dataset.train.labels), len(dataset.validation.labels)) == (1497 - count, count)


def test_limit_takes_the_first_images_before_any_are_held_out():
    everything, few = data.load("digits", validation=1), data.load("digits", limit=20, validation=5)
    assert (len(few.train.labels), len(few.validation.labels), len(few.test.labels)) == (15, 5, 300)
    assert few.test.images.equal(everything.test.images)
    first, other = data.load("digits", limit=20, validation=5, seed=1), data.load("digits", limit=20, validation=5)
    used = [torch.cat([d.train.images, d.validation.images]).flatten(1).tolist() for d in (first, other)]
    assert sorted(used[0]) == sorted(used[1])
    assert len(data.load("digits", limit=2).validation.labels) == 1


def test_device_applies_to_all_splits():
    dataset = data.load("digits", device="meta")
    assert {tensor.device.type for split in dataset[:3] for tensor in split} == {"meta"}


@pytest.mark.parametrize("validation", [0, 0.0001, -1, 1.5, 1497, float("nan"), float("inf")])
def test_a_validation_that_leaves_a_split_empty_raises(validation):
    with pytest.raises(ValueError, match=f"validation must .*, got {validation}"):
        data.load("digits", validation=validation)


@pytest.mark.parametrize("limit", [-5, 0, 1, 1498])
def test_a_limit_beyond_the_number_of_images_raises(limit):
    with pytest.raises(ValueError, match=f"limit must be from 2 to the 1497 training images of digits, got {limit!r}"):
        data.load("digits", limit=limit)


@pytest.mark.parametrize("limit", ["a", 2.5])
def test_a_limit_that_is_no_whole_number_raises(limit):
    with pytest.raises(TypeError, match=f"limit must be of type int or None, got {limit!r}"):
        data.load("digits", limit=limit)


def test_a_path_without_a_data_set_raises_an_error_that_lists_the_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere: no such file or folder"):
        data.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no images")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match=r"supported format: cifar-10-batches-py or .*a subfolder of images"):
            data.load(path)


def test_a_share_leaves_the_validation_images_as_they_are_and_takes_none_of_them():
    everything, few = data.load("digits", seed=3), data.load("digits", share=0.25, seed=3)
    assert few.validation.images.equal(everything.validation.images)
    assert few.test.images.equal(everything.test.images)
    assert few.train.images.equal(data.stratified(everything.train, 0.25, 3).images)
    assert len(few.train.labels) == pytest.approx(len(everything.train.labels) / 4, abs=10)
