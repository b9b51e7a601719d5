"""CW and DeepFool: the least l2 distance to a linear boundary, targets, the box; the model stays as it is."""

from functools import partial

import pytest
import torch
from helpers.searched import (
    assert_leaves_all_as_found,
    assert_works_at_the_edges,
    broken,
    classified,
    distances,
    least_distance,
    linear_problem,
    moved_over,
)
from torch import Tensor, nn

from sparse_adv.attacks import CW, DeepFool, cw, deepfool, fab, fmn


def test_deepfool_ends_just_over_the_nearest_linear_boundary():
    model, images, labels = linear_problem()
    adv = deepfool(model, images, labels, overshoot=0.03)
    assert broken(model, adv, labels).all()
    assert torch.allclose(distances(adv, images, "l2"), 1.03 * least_distance(model, images, labels, "l2"), rtol=1e-3)


def plain_deepfool(model: nn.Module, x: Tensor, y: Tensor, steps: int, overshoot: float) -> Tensor:
    """Algorithm 2 of Moosavi-Dezfooli et al. 2016, each point clamped to [0, 1]."""
    way, z = torch.zeros_like(x), x
    for _ in range(steps):
        if model(z[None]).argmax() != y:
            break
        point = (x + way).clamp(0, 1).requires_grad_()
        logits = model(point[None])[0]
        found = []
        for k in range(len(logits)):
            if k != y:
                (slope,) = torch.autograd.grad(logits[y] - logits[k], point, retain_graph=True)
                lead = (logits[y] - logits[k]).item()
                found.append((lead / slope.norm().item(), lead, slope))
        _, lead, slope = min(found, key=lambda each: each[0])
        way = way - lead / slope.square().sum() * slope
        z = (x + (1 + overshoot) * way).clamp(0, 1)
    return moved_over(model, x, y, z)


@pytest.mark.parametrize("overshoot", [0.0, 0.02, 0.5])
def test_deepfool_is_its_algorithm(overshoot):
    model, images, labels = classified(12)
    model, images = model.double(), images.double()
    for steps in (1, 2, 5):
        adv = deepfool(model, images, labels, steps=steps, overshoot=overshoot)
        for x, y, found in zip(images, labels, adv, strict=True):
            assert torch.allclose(found, plain_deepfool(model, x, y, steps, overshoot), rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", [partial(cw, lr=0.1, c=10.0, binary_search_steps=2), fmn, fab])
def test_a_tie_of_the_logits_is_no_example(attack):
    """Where the first logit has fallen to the second, it stays there: the class is never another one."""
    images, labels = torch.rand(3, 1, 2, 2) * 0.4 + 0.4, torch.zeros(3, dtype=torch.int64)

    def model(x):
        lead = (x.flatten(1).mean(1) - 0.3).clamp_min(0)
        return torch.stack([lead, 0 * lead], 1)

    assert attack(model, images, labels, steps=40).equal(images)


def test_cw_reaches_the_least_distance_to_a_linear_boundary():
    model, images, labels = linear_problem()
    adv = cw(model, images, labels, c=0.1, steps=120, binary_search_steps=6)
    assert broken(model, adv, labels).all()
    ratio = distances(adv, images, "l2") / least_distance(model, images, labels, "l2")
    assert (ratio >= 1 - 1e-4).all() and (ratio <= 1.03).all()


def test_cw_reaches_a_target_and_exceeds_it_by_kappa():
    model, images, labels = linear_problem()
    targets = (labels + 1) % 4
    for kappa in (0.0, 0.5):
        adv = cw(model, images, targets, c=5.0, kappa=kappa, steps=200, targeted=True)
        top = model(adv).topk(2, dim=1)
        assert torch.equal(top.indices[:, 0], targets)
        assert (top.values[:, 0] - top.values[:, 1] >= kappa).all()


def test_a_binary_search_finds_a_weight_where_the_first_fails():
    model, images, labels = linear_problem()
    assert torch.equal(cw(model, images, labels, c=1e-4), images)
    counts = [
        int(broken(model, cw(model, images, labels, c=1e-4, binary_search_steps=n), labels).sum()) for n in (2, 4, 8)
    ]
    assert counts == sorted(counts) and counts[-1] == len(images)


@pytest.mark.parametrize("attack", [partial(cw, c=10.0, lr=0.05), deepfool])
def test_more_steps_break_no_fewer_images_and_all_stay_in_the_box(attack):
    model, images, _ = classified(24)
    images[4:] = 0.25 + images[4:] / 2  # far from the ends, where DeepFool, which cuts its steps off there, can fail
    images[:4] = images[:4].round()  # hard for both: no pixel of theirs may go on over an end
    labels = model(images).argmax(1)
    found = []
    for steps in (1, 3, 30):
        adv = attack(model, images, labels, steps=steps)
        assert adv.min() >= 0 and adv.max() <= 1
        found.append(broken(model, adv, labels))
    assert (found[1] | ~found[0]).all() and (found[2] | ~found[1]).all() and found[2][4:].all()
    wide = images * 4 - 2
    adv = attack(model, wide, model(wide).argmax(1), steps=5, lo=-2.0, hi=2.0)
    assert adv.min() >= -2 and adv.max() <= 2


@pytest.mark.parametrize("attack", [cw, deepfool])
def test_images_that_are_adversarial_already_stay(attack):
    model, images, labels = linear_problem()
    assert torch.equal(attack(model, images, (labels + 1) % 4), images)


@pytest.mark.parametrize("attack", [partial(cw, steps=3, binary_search_steps=2), partial(deepfool, steps=3)])
def test_model_random_state_and_inputs_stay_as_they_are(attack):
    assert_leaves_all_as_found(attack)
    assert_works_at_the_edges(attack)


def test_objects_compute_what_the_functions_compute():
    model, images, labels = classified()
    attack = CW(model, 10, 0.1, 5, 0.05, binary_search_steps=2)
    settings = {"c": 10, "kappa": 0.1, "steps": 5, "lr": 0.05, "binary_search_steps": 2}
    assert torch.equal(attack(images, labels), cw(model, images, labels, **settings))
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    assert torch.equal(attack(images, targets), cw(model, images, targets, targeted=True, **settings))
    assert torch.equal(DeepFool(model, 3, 0.1)(images, labels), deepfool(model, images, labels, steps=3, overshoot=0.1))
    with pytest.raises(ValueError, match="DeepFool has no targeted mode"):
        DeepFool(model).set_mode_targeted_by_label()


def test_wrong_arguments_are_named():
    model, images, labels = classified()
    for words, arguments in (
        ("c must be positive and finite, got 0", {"c": 0}),
        ("lr must be positive and finite, got -1", {"lr": -1}),
        ("kappa must be finite and not negative, got -1", {"kappa": -1}),
        ("steps must be an integer of at least 1, got 0", {"steps": 0}),
        ("binary_search_steps must be an integer of at least 1, got 0", {"binary_search_steps": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            cw(model, images, labels, **arguments)
    with pytest.raises(ValueError, match="overshoot must be finite and not negative, got -1"):
        deepfool(model, images, labels, overshoot=-1)
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        deepfool(model, images, labels, steps=-1)
