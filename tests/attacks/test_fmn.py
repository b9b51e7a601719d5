"""FMN: the least distance to a linear boundary, with the box too; targets, losses, one result."""

from functools import partial

import pytest
import torch
from helpers.searched import (
    Linear,
    assert_leaves_all_as_found,
    assert_works_at_the_edges,
    broken,
    classified,
    least_distance,
    linear_problem,
)
from helpers.searched import distances as lengths

from sparse_adv.attacks import FMN, distances, fab, fmn
from sparse_adv.ops.pgd_step import NORMS


@pytest.mark.parametrize("wrong", [0, 1])
def test_too_few_classes_for_dlr_are_refused_whether_images_are_robust_or_not(wrong):
    model, images = Linear(2, (3, 4, 4)), torch.rand(4, 3, 4, 4)
    labels = (model(images).argmax(1) + wrong) % 2
    assert fmn(model, images, labels, steps=1).shape == images.shape
    with pytest.raises(ValueError, match="needs logits of at least 3 classes, got 2"):
        fmn(model, images, labels, loss="dlr")


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_model_falls_at_its_least_distance(norm):
    model, images, labels = linear_problem(24)
    least = least_distance(model, images, labels, norm)
    adv = fmn(model, images, labels, norm=norm, steps=60)
    ratio = distances(model, adv, images, labels, norm=norm) / least
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.02).all()
    adv = fmn(model, images, labels, norm=norm, steps=60, loss="dlr")  # not linear even where the logits are
    ratio = distances(model, adv, images, labels, norm=norm) / least
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.15).all() and ratio.median() <= 1.01


@pytest.mark.parametrize("norm", NORMS)
def test_a_target_is_reached_at_its_least_distance(norm):
    model, images, labels = linear_problem(24)
    targets = (labels + 1) % 4
    adv = fmn(model, images, targets, norm=norm, steps=100, targeted=True)
    found = distances(model, adv, images, targets, norm=norm, targeted=True)
    assert torch.equal(model(adv).argmax(1), targets)
    single, nearest = (least_distance(model, images, labels, norm, t) for t in (targets, None))
    assert (found >= (1 - 1e-4) * single).all() and (found[single == nearest] <= 1.02 * single[single == nearest]).all()


@pytest.mark.parametrize("norm", NORMS)
def test_in_a_corner_of_the_box_the_least_distance_within_it_is_found(norm):
    model, images, labels = linear_problem(24)
    images = images.round()  # half of the pixels can move in one direction only
    labels = model(images).argmax(1)
    adv = fmn(model, images, labels, norm=norm, steps=200)
    assert adv.min() >= 0 and adv.max() <= 1 and broken(model, adv, labels).all()
    exact = lengths(fab(model, images, labels, norm=norm, steps=100), images, norm)  # projects within the box
    assert (lengths(adv, images, norm) <= 1.05 * exact).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_logits_of_other_images_do_not_count(norm):
    model, images, labels = linear_problem(12)
    model, images = model.double(), images.double()
    scale = torch.ones(12, 1, dtype=torch.float64)
    expected = fmn(lambda x: model(x) * scale[: len(x)], images, labels, norm=norm, steps=10)
    spread = torch.where(torch.arange(12) < 2, 1e12, 1.0).double()[:, None]

    def far_apart(x):  # logits of the first two images are huge; their boundaries stay
        nearest = torch.cdist(x.flatten(1), images.flatten(1)).argmin(1)
        return model(x) * spread[nearest]

    adv = fmn(far_apart, images, labels, norm=norm, steps=10)
    assert torch.allclose(adv[2:], expected[2:], rtol=0, atol=1e-12)


def test_two_pixels_by_hand():
    model = Linear(2, (1, 1, 2))
    with torch.no_grad():
        model.fc.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        model.fc.bias.copy_(torch.tensor([-2.5, 0.0]))
    images, labels = torch.full((1, 1, 1, 2), 0.5), torch.tensor([0])  # leads by 1; |w|_2 = 5, |w|_1 = 7
    for norm, least in (("l2", 1 / 5), ("linf", 1 / 7)):
        assert lengths(fmn(model, images, labels, norm=norm), images, norm).item() == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_every_image_of_a_network_falls_and_no_farther_with_more_steps(norm):
    model, images, labels = classified(24)
    found = []
    for steps in (10, 100):
        adv = fmn(model, images, labels, norm=norm, steps=steps)
        assert adv.min() >= 0 and adv.max() <= 1
        found.append(distances(model, adv, images, labels, norm=norm))
        assert found[-1].isfinite().all()
    assert found[1].mean() <= found[0].mean()
    fab_found = distances(model, fab(model, images, labels, norm=norm, steps=50), images, labels, norm=norm)
    assert found[1].median() <= 1.05 * fab_found.median()


def test_images_that_are_adversarial_already_stay_and_have_distance_0():
    model, images, labels = linear_problem()
    wrong = (labels + 1) % 4
    adv = fmn(model, images, wrong)
    assert torch.equal(adv, images) and (distances(model, adv, images, wrong) == 0).all()
    assert distances(model, images, images, labels).isinf().all()


def test_the_range_of_pixels_may_be_another():
    model, images, _ = classified()
    wide = images * 4 - 2
    adv = fmn(model, wide, model(wide).argmax(1), lo=-2.0, hi=2.0, steps=20)
    assert adv.min() >= -2 and adv.max() <= 2 and adv.min() < 0


@pytest.mark.parametrize("norm", NORMS)
def test_model_random_state_and_inputs_stay_as_they_are(norm):
    assert_leaves_all_as_found(partial(fmn, norm=norm, steps=3))
    assert_works_at_the_edges(partial(fmn, norm=norm, steps=3))


def test_objects_compute_what_the_function_computes():
    model, images, labels = classified()
    attack = FMN(model, "L2", 5, 0.5, 0.1, "dlr")
    settings = {"norm": "l2", "steps": 5, "alpha": 0.5, "gamma": 0.1, "loss": "dlr"}
    assert torch.equal(attack(images, labels), fmn(model, images, labels, **settings))
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    assert torch.equal(attack(images, targets), fmn(model, images, targets, targeted=True, **settings))


def test_wrong_arguments_are_named():
    model, images, labels = classified()
    for words, arguments in (
        ("alpha must be positive and finite, got 0", {"alpha": 0}),
        ("gamma must lie between 0 and 1, got 1", {"gamma": 1}),
        ("loss must be 'margin' or 'dlr', got 'ce'", {"loss": "ce"}),
        ("steps must be an integer of at least 1, got 0", {"steps": 0}),
        ('norm must be "linf" or "l2"', {"norm": "l1"}),
    ):
        with pytest.raises(ValueError, match=words):
            fmn(model, images, labels, **arguments)
