"""The attacks outside of PGD's family with eps of each image, lo and hi of each channel: as with one number each."""

from functools import partial

import pytest
import torch
from helpers.attacked import generator
from helpers.searched import broken, classified, distances

from sparse_adv.attacks import BIM, apgd, apgd_t, bim, cw, deepfool, eotpgd, fab, fab_t, fmn, mifgsm, rfgsm, square

EPS = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 0.3])
LO, HI = torch.tensor([0.0, -0.1, 0.0]), torch.tensor([1.0, 1.1, 1.2])

ALONE = {
    "mifgsm": lambda *batch, eps, **o: mifgsm(*batch, eps=eps, alpha=eps / 3, steps=4, **o),
    "eotpgd": lambda *batch, eps, **o: eotpgd(*batch, eps=eps, alpha=eps / 3, steps=4, random_start=False, **o),
    "fab": partial(fab, steps=4),
}
"""Attacks that draw no random numbers: an image is attacked as it is alone."""

DRAWING = {
    "eotpgd": lambda *batch, eps, **o: eotpgd(*batch, eps=eps, alpha=eps / 2, steps=3, **o),
    "rfgsm": lambda *batch, eps, **o: rfgsm(*batch, eps=eps, alpha=eps / 2, steps=2, **o),
    "apgd": partial(apgd, steps=6, restarts=2),
    "apgd_t": partial(apgd_t, steps=4, n_target_classes=2),
    "square": partial(square, queries=30),
    "fab": partial(fab, steps=4, restarts=2),
    "fab_t": partial(fab_t, steps=4, n_target_classes=3),
}
"""Attacks that draw random numbers of a generator."""

LINF_ONLY = ("rfgsm",)
BOTH = [(name, norm) for name in {**ALONE, **DRAWING} for norm in ("linf", "l2") if norm == "linf" or name != "rfgsm"]


def attack_of(name, norm):
    options = {} if name in LINF_ONLY else {"norm": norm}
    return (
        partial(DRAWING[name], generator=generator(), **options) if name in DRAWING else partial(ALONE[name], **options)
    )


def radii(norm):
    return EPS if norm == "linf" else 10 * EPS


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ALONE)
def test_each_image_is_attacked_as_alone_with_its_own_radius(name, norm):
    model, images, labels = classified()
    adv = ALONE[name](model, images, labels, eps=radii(norm), norm=norm)
    for i, eps in enumerate(radii(norm).tolist()):
        alone = ALONE[name](model, images[i : i + 1], labels[i : i + 1], eps=eps, norm=norm)
        torch.testing.assert_close(adv[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "norm"), BOTH)
def test_equal_values_give_what_a_number_gives(name, norm):
    model, images, labels = classified()
    eps = 0.03125 if norm == "linf" else 0.25
    number = attack_of(name, norm)(model, images, labels, eps=eps)
    values = {"eps": torch.full((6,), eps), "lo": torch.zeros(3), "hi": torch.ones(3)}
    full = attack_of(name, norm)(model, images, labels, **values)
    assert not number.equal(images)
    torch.testing.assert_close(full, number, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "norm"), BOTH)
def test_results_lie_in_each_ball_and_each_channels_range_without_slack(name, norm, dtype):
    model, images, labels = classified()
    images[:, :, 0], images[:, :, -1] = 0, 1
    labels = model(images).argmax(1)
    eps = radii(norm).to(dtype)
    adv = attack_of(name, norm)(model, images, labels, eps=eps, lo=LO, hi=HI)
    assert (distances(adv, images, norm) <= eps).all()
    assert (adv >= LO.view(3, 1, 1)).all() and (adv <= HI.view(3, 1, 1)).all()
    assert adv[0].equal(images[0]) and not adv[-1].equal(images[-1])
    assert adv[:, 1].min() < 0  # the range of the second channel is used


@pytest.mark.parametrize("name", {**ALONE, **DRAWING})
def test_images_with_a_larger_radius_fall(name):
    model, images, labels = classified(12)
    eps = torch.tensor([0.0, 0.4]).repeat(6)
    fell = broken(model, attack_of(name, "linf")(model, images, labels, eps=eps), labels)
    assert not fell[::2].any() and fell[1::2].sum() > 3


@pytest.mark.parametrize("name", {**ALONE, **DRAWING})
def test_other_tensors_are_refused_in_a_sentence(name):
    model, images, labels = classified()
    for options, error, message in (
        ({"eps": EPS[:5]}, ValueError, r"eps must have one value for each image, shape \[6\], got \[5\]"),
        ({"eps": EPS * torch.nan}, ValueError, "eps must not be negative or NaN"),
        ({"eps": EPS, "lo": torch.zeros(6)}, ValueError, r"lo must have one value for each channel, shape \[3\]"),
        ({"eps": EPS, "lo": LO, "hi": torch.ones(4)}, ValueError, "lo and hi must have one value for each channel"),
        ({"eps": EPS, "lo": HI, "hi": LO}, ValueError, "lo must not exceed hi"),
        ({"eps": torch.ones(6, 1)}, TypeError, "eps must be a number or a float tensor of one dimension"),
        ({"eps": torch.ones(6, dtype=torch.int64)}, TypeError, "eps must be a number or a float tensor"),
        ({"eps": EPS, "lo": torch.tensor([0.0, 0.5, 0.0])}, ValueError, r"channel 1: images must lie in \[0.5, 1\]"),
    ):
        with pytest.raises(error, match=message):
            attack_of(name, "linf")(model, images, labels, **options)


def test_step_sizes_of_each_image_have_ranges_too():
    model, images, labels = classified()
    for attack in (mifgsm, eotpgd, rfgsm):
        with pytest.raises(ValueError, match=r"alpha must have one value for each image, shape \[6\], got \[5\]"):
            attack(model, images, labels, eps=0.5, alpha=EPS[:5])
        with pytest.raises(ValueError, match="alpha must be finite"):
            attack(model, images, labels, eps=0.5, alpha=EPS / 0)
    with pytest.raises(ValueError, match="alpha must lie between 0 and eps"):
        rfgsm(model, images, labels, eps=EPS, alpha=EPS.flip(0))
    for eps in (EPS, EPS.double() / 3):
        assert rfgsm(model, images, labels, eps=eps, alpha=eps, generator=generator()).shape == images.shape
    for attack in (eotpgd, apgd):
        with pytest.raises(ValueError, match="eps must be finite, got inf"):
            attack(model, images, labels, eps=torch.full((6,), torch.inf))


@pytest.mark.parametrize("name", {**ALONE, **DRAWING})
def test_no_image_needs_no_radius(name):
    model, images, labels = classified()
    assert attack_of(name, "linf")(model, images[:0], labels[:0], eps=EPS[:0]).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match=r"eps must have one value for each image, shape \[6\], got \[0\]"):
        attack_of(name, "linf")(model, images, labels, eps=EPS[:0])
    with pytest.raises(ValueError, match="lo must not exceed hi"):
        attack_of(name, "linf")(model, images, labels, eps=EPS, lo=0.5, hi=torch.tensor([1.0, 0.4, 1.0]))


def test_bim_takes_them_as_pgd_and_refuses_the_papers_steps():
    model, images, labels = classified()
    adv = bim(model, images, labels, eps=EPS, alpha=EPS / 4)
    assert BIM(model, eps=EPS, alpha=EPS / 4)(images, labels).equal(adv) and adv[0].equal(images[0])
    with pytest.raises(ValueError, match="steps must be at least 1 where eps is a tensor, got 0"):
        BIM(model, eps=EPS, steps=0)


NEAREST = {
    "cw": partial(cw, c=10.0, lr=0.05, steps=15),
    "deepfool": partial(deepfool, steps=10),
    "fmn": partial(fmn, steps=15),
    "fmn l2": partial(fmn, steps=15, norm="l2"),
    "fab": partial(fab, steps=5),
}
"""Attacks without a radius: they have a range of pixel values alone."""


@pytest.mark.parametrize("name", NEAREST)
def test_the_nearest_examples_lie_in_each_channels_range(name):
    model, images, labels = classified()
    low, high = torch.tensor([0.25, -0.5, 0.0]), torch.tensor([0.5, 1.0, 0.75])
    images = images.clamp(low.view(3, 1, 1), high.view(3, 1, 1))
    labels = model(images).argmax(1)
    adv = NEAREST[name](model, images, labels, lo=low, hi=high)
    assert broken(model, adv, labels).any() and adv.isfinite().all()
    assert (adv.amin((0, 2, 3)) >= low).all() and (adv.amax((0, 2, 3)) <= high).all()
    for wrong, message in (
        ({"lo": low[:2]}, r"lo must have one value for each channel, shape \[3\], got \[2\]"),
        ({"lo": high, "hi": low}, "lo must not exceed hi"),
        ({"hi": high * torch.nan}, "lo must not exceed hi"),
    ):
        with pytest.raises(ValueError, match=message):
            NEAREST[name](model, images, labels, **wrong)


@pytest.mark.parametrize("name", NEAREST)
def test_equal_ends_give_what_numbers_give(name):
    model, images, labels = classified()
    number = NEAREST[name](model, images, labels, lo=0.0, hi=1.0)
    adv = NEAREST[name](model, images, labels, lo=torch.zeros(3), hi=torch.ones(3))
    torch.testing.assert_close(adv, number, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NEAREST)
def test_a_channel_with_equal_ends_does_not_change(name):
    model, images, labels = classified()
    images[:, 1] = 0.5
    labels = model(images).argmax(1)
    ends = {"lo": torch.tensor([0.0, 0.5, 0.0]), "hi": torch.tensor([1.0, 0.5, 1.0])}
    adv = NEAREST[name](model, images, labels, **ends)
    assert (adv[:, 1] == 0.5).all() and adv.isfinite().all() and not adv.equal(images)


def test_fmn_refuses_step_sizes_of_each_image():
    with pytest.raises(TypeError, match=r"alpha must be a number, got a tensor of shape \(6,\)"):
        fmn(*classified(), alpha=EPS)
