"""Input validation: the errors of attacks on invalid batches, and deferred validation."""

from contextlib import nullcontext

import pytest
import torch
from helpers.attacked import make_model, snapshot
from torch import nn

from sparse_adv.attacks import checks, fab, fmn, n_fgsm, pgd
from sparse_adv.attacks.checks import InputValidator
from sparse_adv.training import robust_accuracy

IMAGES, LABELS = torch.rand(2, 3, 8, 8), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"images": IMAGES * 2 - 1},
            ValueError,
            r"images must lie in \[0, 1\], got values from -.*: put the normalisation inside the model",
        ),
        ({"images": IMAGES.log() * 0 / 0}, ValueError, "images must be finite"),
        ({"images": IMAGES / 0}, ValueError, "images must be finite"),
        (
            {"images": (IMAGES * 255).byte()},
            TypeError,
            r"images must be a floating point tensor, got torch.uint8: data.to_unit\(images\) is one",
        ),
        ({"images": IMAGES[0, 0, 0]}, ValueError, r"images must be a batch \[N, ...\], got shape \(8,\)"),
        ({"images": IMAGES[:, :, :0]}, ValueError, r"images must have pixels, got shape \(2, 3, 0, 8\)"),
        ({"labels": torch.tensor([0, 5])}, ValueError, r"labels must lie in \[0, 4\], the model's classes, got 0 to 5"),
        ({"labels": torch.tensor([-100, 1])}, ValueError, r"labels must lie in \[0, 4\], .*, got -100 to 1"),
        ({"labels": torch.tensor([0])}, ValueError, r"labels must have one label per image, shape \[2\], got \(1,\)$"),
        (
            {"labels": torch.zeros(2, 8, 8, dtype=torch.int64)},
            ValueError,
            r"shape \[2\], got \(2, 8, 8\): attacks.pgd takes others with a function \(logits, labels\) as its loss",
        ),
        ({"labels": torch.tensor([0.0, 1.0])}, TypeError, "labels must be an int64 tensor, got torch.float32"),
        ({"labels": [0, 1]}, TypeError, r"labels must be an int64 tensor, got \[0, 1\]"),
        (
            {"model": nn.Conv2d(3, 5, 8)},
            ValueError,
            r"model must return logits \[2, classes\], got shape \(2, 5, 1, 1\)",
        ),
        ({"model": "vgg"}, TypeError, "model must be an nn.Module or a function of the images, got str"),
        ({"model": lambda x: (x, x)}, TypeError, r"model must return logits \[2, classes\], got a tuple: wrap it in"),
        ({"model": lambda x: {"logits": x}}, TypeError, r"model must return logits \[2, classes\], got a dict"),
        ({"model": lambda x: x.flatten(1)[:1]}, ValueError, r"must return logits \[2, classes\], got shape \(1, 192\)"),
    ],
)
@pytest.mark.parametrize("attack", [pgd, n_fgsm, fab, fmn])
def test_an_invalid_batch_raises_an_error_that_names_it_and_leaves_the_model_as_it_was(attack, change, error, message):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attack(**{"model": model, "images": IMAGES, "labels": LABELS, **change})
    assert snapshot(model) == before


def test_with_check_false_values_are_not_checked():
    assert pgd(make_model(), IMAGES * 2 - 1, LABELS, steps=1, check=False).min() >= 0


def test_a_random_start_needs_finite_radii_for_every_image():
    with pytest.raises(ValueError, match="eps must be finite, got inf"):
        pgd(make_model().eval(), IMAGES, LABELS, eps=torch.tensor([0.1, torch.inf]), alpha=0.01, steps=1)


def test_deferred_validation_clamps_labels_and_raises_later():
    validator = InputValidator(deferred=True)
    assert validator.check(IMAGES, LABELS, 5).tolist() == [0, 4]
    validator.raise_deferred()
    assert validator.check(IMAGES, LABELS + 3, 5).tolist() == [3, 4]
    validator.check(IMAGES, LABELS, 5)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\], the model's classes, got 0 to 7"):
        validator.raise_deferred()
    validator.raise_deferred()  # nothing new to report
    validator.check(IMAGES * 2, LABELS, 5)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        validator.raise_deferred()


@pytest.mark.parametrize("deferred", [True, False])
def test_shapes_and_dtypes_are_checked_at_once(deferred):
    validator = InputValidator(deferred)
    with pytest.raises(TypeError, match=r"labels must be an int64 tensor, got torch\.float32"):
        validator.check(IMAGES, LABELS.float(), 5)
    with pytest.raises(ValueError, match="labels must have one label per image"):
        validator.check(IMAGES, LABELS[:1], 5)
    with pytest.raises(TypeError, match="images must be a floating point tensor"):
        validator.check(IMAGES.byte(), LABELS, 5)


def test_validation_that_is_not_deferred_raises_in_check():
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 4\]"):
        InputValidator(deferred=False).check(IMAGES, LABELS + 3, 5)


@pytest.mark.parametrize(("value", "accepted"), [(-2.98e-8, True), (1 + 1.2e-7, True), (-1e-5, False), (1.001, False)])
def test_pixels_may_leave_the_range_by_rounding(value, accepted, caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    images, labels = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
    images[0, 0, 0, 0] = value
    checks._warn_of_rounding.cache_clear()
    with nullcontext() if accepted else pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        for _ in range(2):
            adv = pgd(model, images, labels, eps=0.1, alpha=0.05, steps=2)
            assert adv.min() >= 0 and adv.max() <= 1
            assert 0 <= robust_accuracy(model, [(images, labels)], steps=1).fraction <= 1
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == accepted
