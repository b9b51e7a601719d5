"""eps and alpha of each image, lo and hi of each channel: as one call for each image, and refused in other shapes."""

import pytest
import torch
from helpers.attacked import batch, generator, make_model

from sparse_adv.attacks import FGSM, PGD, Graphs, fgsm, fgsm_rs, n_fgsm, pgd, tpgd

EPS = torch.tensor([0.0, 0.01, 0.02, 0.05, 0.1, 0.3])
LO, HI = torch.tensor([0.0, -0.1, 0.0]), torch.tensor([1.0, 1.1, 1.2])


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_is_attacked_as_alone_with_its_own_radius(norm, falling, early_stop):
    model, (images, _) = make_model().eval(), batch()
    labels = model(images).argmax(1)
    radii = (1 if norm == "linf" else 10) * (EPS.flip(0) if falling else EPS)
    options = {"norm": norm, "steps": 4, "random_start": False, "early_stop": early_stop}
    adv = pgd(model, images, labels, eps=radii, alpha=radii / 3, **options)
    for i, eps in enumerate(radii.tolist()):
        alone = pgd(model, images[i : i + 1], labels[i : i + 1], eps=eps, alpha=eps / 3, **options)
        torch.testing.assert_close(adv[i : i + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_equal_values_give_what_a_number_gives(norm):
    model, (images, labels) = make_model(), batch()
    options = {"norm": norm, "steps": 3}
    number = pgd(model, images, labels, eps=0.1, alpha=0.04, generator=generator(), **options)
    full = {"eps": torch.full((6,), 0.1), "alpha": torch.full((6,), 0.04), "lo": torch.zeros(3), "hi": torch.ones(3)}
    torch.testing.assert_close(
        pgd(model, images, labels, generator=generator(), **full, **options), number, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(fgsm(model, images, labels, eps=full["eps"]), fgsm(model, images, labels, eps=0.1))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_lie_in_each_ball_and_each_channels_range(norm):
    model, (images, labels) = make_model(), batch()
    adv = pgd(model, images, labels, eps=EPS, alpha=EPS, steps=3, norm=norm, lo=LO, hi=HI, restarts=2)
    offset = (adv - images).flatten(1)
    assert (offset.norm(p=torch.inf if norm == "linf" else 2, dim=1) <= EPS).all()
    assert (adv >= LO.view(3, 1, 1)).all() and (adv <= HI.view(3, 1, 1)).all()
    assert adv[:, 1].min() < 0 and adv[:, 0].min() >= 0 and adv[0].equal(images[0])


def test_the_other_attacks_of_the_family_take_them_too():
    model, (images, labels) = make_model(), batch()
    for attack, reach in ((fgsm, 1), (fgsm_rs, 1), (n_fgsm, 3)):
        adv = attack(model, images, labels, eps=EPS)
        assert ((adv - images).flatten(1).abs().amax(1) <= reach * EPS + 1e-6).all()
    adv = tpgd(model, images, eps=EPS, alpha=EPS / 4, steps=2)
    assert ((adv - images).flatten(1).abs().amax(1) <= EPS + 1e-6).all()
    assert FGSM(model, eps=EPS)(images, labels).equal(fgsm(model, images, labels, eps=EPS))
    assert "eps=tensor" in repr(PGD(model, eps=EPS, alpha=EPS))
    stepwise = pgd(model, images, labels, eps=EPS, generator=generator(), graphs=Graphs())
    assert stepwise.equal(pgd(model, images, labels, eps=EPS, generator=generator()))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": EPS[:5]}, ValueError, r"eps must have one value for each image, shape \[6\], got \[5\]"),
        ({"alpha": EPS[:1]}, ValueError, r"alpha must have one value for each image, shape \[6\], got \[1\]"),
        ({"lo": torch.zeros(6)}, ValueError, r"lo must have one value for each channel, shape \[3\], got \[6\]"),
        ({"eps": -EPS}, ValueError, "eps must not be negative or NaN"),
        ({"eps": EPS * torch.nan}, ValueError, "eps must not be negative or NaN"),
        ({"alpha": EPS / 0}, ValueError, "alpha must be finite"),
        ({"lo": HI, "hi": torch.tensor([2.0, 1.0, 2.0])}, ValueError, "lo must not exceed hi"),
        ({"eps": torch.ones(6, dtype=torch.int64)}, TypeError, "eps must be a number or a float tensor"),
        ({"eps": torch.ones(6, 1)}, TypeError, r"eps must be a number or a float tensor of one dimension, .* \[6, 1\]"),
        ({"lo": torch.tensor([0.0, 0.5, 0.0])}, ValueError, r"channel 1: images must lie in \[0.5, 1\]"),
    ],
)
def test_other_tensors_are_refused_in_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        pgd(make_model(), *batch(), **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_radii_that_the_dtype_of_the_images_cannot_hold_are_not_exceeded(norm):
    images = 0.05 * torch.rand(64, 1, 1, 1).bfloat16()
    eps = 0.05 + 0.05 * torch.rand(64)
    adv = pgd(
        lambda x: x.flatten(1) * torch.tensor([1.0, -1.0]).bfloat16(),
        images,
        torch.ones(64).long(),
        eps=eps,
        alpha=0.2,
        steps=1,
        random_start=False,
        norm=norm,
    )
    assert ((adv.double() - images.double()).flatten() <= eps).all() and (adv > images).all()
