"""FAB and FAB-T: the least distance to a linear boundary, the projection onto it, ball and box, targets, one result."""

from functools import partial

import pytest
import torch
from helpers.attacked import generator
from helpers.searched import (
    assert_leaves_all_as_found,
    assert_works_at_the_edges,
    broken,
    classified,
    distances,
    least_distance,
    linear_problem,
)

from sparse_adv.attacks import FAB, fab, fab_t
from sparse_adv.attacks.ball import Ball
from sparse_adv.attacks.hyperplane import onto_hyperplane
from sparse_adv.ops.pgd_step import NORMS

ATTACKS = (fab, partial(fab_t, n_target_classes=4))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_linear_model_falls_at_its_least_distance(attack, norm):
    model, images, labels = linear_problem()
    least = least_distance(model, images, labels, norm)
    adv = attack(model, images, labels, norm=norm, steps=40)
    assert broken(model, adv, labels).all()
    ratio = distances(adv, images, norm) / least
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.01).all()
    for factor, falls in ((0.99, False), (1.06, True)):
        for x, y, eps in zip(images.split(1), labels.split(1), least.tolist(), strict=True):
            found = attack(model, x, y, norm=norm, eps=factor * eps, steps=5)
            assert bool(broken(model, found, y)) is falls
            assert (distances(found, x, norm) <= factor * eps).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_target_is_reached_at_its_least_distance(norm):
    model, images, labels = linear_problem()
    targets = (labels + 1) % 4
    adv = fab(model, images, targets, norm=norm, steps=80, targeted=True)
    assert torch.equal(model(adv).argmax(1), targets)
    assert (distances(adv, images, norm) >= (1 - 1e-4) * least_distance(model, images, labels, norm, targets)).all()
    single = least_distance(model, images, labels, norm, targets)
    nearest = least_distance(model, images, labels, norm)
    assert (distances(adv, images, norm)[single == nearest] <= 1.02 * nearest[single == nearest]).all()


@pytest.mark.parametrize("end", [torch.inf, 0.5])
@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_where_the_range_has_no_end(norm, end):
    draw = torch.Generator().manual_seed(0)
    x, slope = torch.randn(2, 8, 1, 3, 4, generator=draw, dtype=torch.float64)
    value = torch.randn(8, generator=draw, dtype=torch.float64)
    x = x.clamp(max=end)
    change = onto_hyperplane(x, value, slope, Ball(0.0, norm, -torch.inf, end))
    assert torch.allclose((change * slope).flatten(1).sum(1), -value)
    assert (x + change <= end + 1e-12).all()
    if end == torch.inf:
        direction = slope.sign() if norm == "linf" else slope
        expected = -direction * (value / (slope * direction).flatten(1).sum(1)).view(-1, 1, 1, 1)
        torch.testing.assert_close(change, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_the_projection_is_the_nearest_point_of_the_hyperplane_in_the_box(norm):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 3, 4, generator=draw, dtype=torch.float64)
    slope = torch.randn(x.shape, generator=draw, dtype=torch.float64)
    slope[:, :, 0, 0] = 0
    value = torch.randn(64, generator=draw, dtype=torch.float64) * 2
    change = onto_hyperplane(x, value, slope, Ball(0.0, norm, 0.0, 1.0))
    assert (x + change >= -1e-12).all() and (x + change <= 1 + 1e-12).all()
    left = value + (change * slope).flatten(1).sum(1)
    # The furthest that the value can go within the box.
    room = torch.where(slope * value.sign().view(-1, 1, 1, 1) > 0, x, 1 - x)
    reachable = (slope.abs() * room).flatten(1).sum(1)
    feasible = reachable >= value.abs()
    assert 0 < feasible.sum() < 64
    assert torch.allclose(left[feasible], torch.zeros(1, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(left[~feasible].abs(), (value.abs() - reachable)[~feasible])
    # By bisection over the multiplier (l2) or the radius (linf) of the same problem.
    low, high = torch.zeros(64, 1, 1, 1, dtype=torch.float64), torch.full((64, 1, 1, 1), 1e4, dtype=torch.float64)
    for _ in range(200):
        middle = (low + high) / 2
        step = (middle * (1 if norm == "linf" else slope.abs())).minimum(room)
        enough = ((slope.abs() * step).flatten(1).sum(1) >= value.abs()).view(-1, 1, 1, 1)
        low, high = middle.where(~enough, low), middle.where(enough, high)
    expected = (high * (1 if norm == "linf" else slope.abs())).minimum(room)
    expected = expected.where(slope != 0, 0)
    zero = torch.zeros_like(x)
    assert torch.allclose(distances(change, zero, norm)[feasible], distances(expected, zero, norm)[feasible], atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_results_lie_in_ball_and_box_without_slack_and_failures_are_the_clean_images(attack, norm):
    model, images, _ = classified(16)
    images[:4] = images[:4].round()
    labels = model(images).argmax(1)
    for eps in (0.0, 8 / 255, 0.031, 0.3):
        adv = attack(model, images, labels, norm=norm, eps=eps, steps=6, restarts=2, generator=generator())
        length = distances(adv, images, norm)
        assert all(value <= eps for value in length.tolist())
        assert adv.min() >= 0 and adv.max() <= 1
        assert torch.equal(broken(model, adv, labels), length > 0)


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_restarts_and_radius_break_no_fewer_images(norm):
    model, images, labels = classified(32)

    def found(**budget: object) -> torch.Tensor:
        return broken(model, fab(model, images, labels, norm=norm, generator=generator(), **budget), labels)

    eps = 0.02 if norm == "linf" else 0.2
    for weak, strong in (
        ({"steps": 2}, {"steps": 12}),
        ({"steps": 4}, {"steps": 4, "restarts": 3}),
        ({"steps": 8}, {"steps": 8, "eps": 4 * eps}),
    ):
        weaker, stronger = found(**{"eps": eps, **weak}), found(**{"eps": eps, **strong})
        assert (stronger | ~weaker).all()


def test_images_that_are_adversarial_already_stay():
    model, images, labels = linear_problem()
    wrong = (labels + 1) % 4
    assert torch.equal(fab(model, images, wrong), images)
    assert torch.equal(fab_t(model, images, wrong, eps=0.1), images)
    assert torch.equal(fab(model, images, labels, targeted=True), images)


@pytest.mark.parametrize("attack", ATTACKS)
def test_model_random_state_and_inputs_stay_as_they_are(attack):
    def bound(model, images, labels):
        return attack(model, images, labels, steps=3, restarts=2, generator=generator())

    assert_leaves_all_as_found(bound)
    assert_works_at_the_edges(bound)


def test_the_object_computes_what_the_functions_compute():
    model, images, labels = classified()
    settings = {"eps": 0.1, "steps": 4}
    attack = FAB(model, "L2", n_restarts=2, seed=5, **settings)
    arguments = {"norm": "l2", "restarts": 2, **settings}
    assert torch.equal(attack(images, labels), fab(model, images, labels, generator=generator(), **arguments))
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    expected = fab(model, images, targets, targeted=True, generator=generator(), **arguments)
    assert torch.equal(attack(images, targets), expected)
    multi = FAB(model, "L2", n_restarts=2, seed=5, multi_targeted=True, n_classes=5, **settings)
    expected = fab_t(model, images, labels, n_target_classes=4, generator=generator(), **arguments)
    assert torch.equal(multi(images, labels), expected)
    with pytest.raises(ValueError, match="FAB has no targeted mode"):
        multi.set_mode_targeted_by_label()


def test_the_targeted_modes_follow_multi_targeted_between_two_calls():
    model, images, labels = classified()
    attack = FAB(model, "L2", eps=0.1, steps=4, multi_targeted=True)
    attack.multi_targeted = False
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    expected = fab(model, images, targets, norm="l2", eps=0.1, steps=4, targeted=True)
    assert attack.supported_mode == ["default", "targeted"] and attack(images, targets).equal(expected)
    attack.multi_targeted = True
    assert attack.supported_mode == ["default"]
    with pytest.raises(ValueError, match="FAB has no targeted mode"):
        attack(images, targets)
    attack.set_mode_default()
    assert attack(images, labels).equal(fab_t(model, images, labels, norm="l2", eps=0.1, steps=4))


def test_wrong_arguments_are_named():
    model, images, labels = classified()
    for words, arguments in (
        ("norm must be", {"norm": "l1"}),
        ("eps must not be negative", {"eps": -1.0}),
        ("steps must be an integer of at least 1, got 0", {"steps": 0}),
        (r"alpha_max must lie in \[0, 1\], got 2", {"alpha_max": 2}),
        ("eta must be at least 1, got 0.5", {"eta": 0.5}),
        ("beta must lie between 0 and 1, got 1", {"beta": 1}),
    ):
        with pytest.raises(ValueError, match=words):
            fab(model, images, labels, **arguments)
    with pytest.raises(ValueError, match="n_target_classes must be an integer of at least 1, got 0"):
        fab_t(model, images, labels, n_target_classes=0)


@pytest.mark.parametrize("norm", NORMS)
def test_without_eps_further_starts_lie_at_half_of_the_distance_found(norm):
    model, images, labels = linear_problem()
    seen = []
    model.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone()) if args[0].requires_grad else None
    )
    fab_t(model, images, labels, norm=norm, steps=1, restarts=2, n_target_classes=1, eta=1.2, engine=False)
    clean, start = seen
    target = model(images).argsort(1, descending=True)[:, 1]
    found = 1.2 * least_distance(model, images, labels, norm, target)
    assert clean.equal(images)
    torch.testing.assert_close(distances(start, images, norm), found / 2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_further_starts_lie_at_half_of_the_radius_each_in_another_place(norm):
    model, images, labels = linear_problem()
    with torch.no_grad():
        model.fc.bias[0] = 100.0  # no image falls
    images, labels, seen = images, torch.zeros_like(labels), []
    model.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().clone()) if args[0].requires_grad else None
    )
    fab_t(model, images, labels, norm=norm, eps=0.1, steps=1, restarts=3, n_target_classes=1, engine=False)
    clean, *starts = seen
    assert clean.equal(images) and len(starts) == 2 and not starts[0].equal(starts[1])
    for start in starts:
        torch.testing.assert_close(distances(start, images, norm), torch.full((len(images),), 0.05))
