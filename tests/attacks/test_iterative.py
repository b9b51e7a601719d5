"""MI-FGSM, EOT-PGD, R+FGSM and BIM: against PGD or a textbook loop, in ball and box, targeted, on random models."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.attacked import generator
from helpers.searched import assert_leaves_all_as_found, assert_works_at_the_edges, broken, classified, distances
from torch import nn

from sparse_adv.attacks import BIM, EOTPGD, MIFGSM, RFGSM, bim, eotpgd, mifgsm, pgd, rfgsm

SETTINGS = {"eps": 0.1, "alpha": 0.025, "steps": 5}


def gradient(model, adv, labels):
    adv = adv.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(adv), labels, reduction="sum"), adv)[0]


def test_momentum_is_that_of_the_paper():
    model, images, labels = classified()
    adv, momentum = images.double(), 0
    model.double()
    for _ in range(4):
        slope = gradient(model, adv, labels)
        momentum = 0.9 * momentum + slope / slope.abs().sum((1, 2, 3), keepdim=True)
        adv = (adv + 0.025 * momentum.sign()).clamp(images - 0.1, images + 0.1).clamp(0, 1)
    result = mifgsm(model, images.double(), labels, eps=0.1, alpha=0.025, steps=4, decay=0.9)
    assert torch.allclose(result, adv, atol=1e-12)


def test_momentum_goes_on_after_a_gradient_of_zero():
    model, images, labels = classified()
    factors = iter([0.0, 1.0])
    adv = mifgsm(lambda x: model(x) * next(factors), images, labels, eps=0.1, alpha=0.025, steps=2)
    assert torch.equal(adv, mifgsm(model, images, labels, eps=0.1, alpha=0.025, steps=1, engine=False))


def test_without_momentum_and_without_randomness_both_are_pgd():
    model, images, labels = classified()
    start = pgd(model, images, labels, random_start=False, **SETTINGS)
    assert torch.allclose(mifgsm(model, images, labels, decay=0.0, **SETTINGS), start, atol=1e-6, rtol=0)
    assert torch.equal(bim(model, images, labels, **SETTINGS), start)
    expected = pgd(model, images, labels, generator=generator(), **SETTINGS)
    for eot_iter in (1, 2):
        adv = eotpgd(model, images, labels, eot_iter=eot_iter, generator=generator(), **SETTINGS)
        assert torch.allclose(adv, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("attack", [bim, mifgsm])
def test_images_may_be_made_in_inference_mode(attack, engine):
    model, images, labels = classified()
    expected = attack(model, images, labels, engine=engine, **SETTINGS)
    with torch.inference_mode():
        assert torch.equal(attack(model, images.clone(), labels.clone(), engine=engine, **SETTINGS), expected)


def test_a_mean_of_gradients_beats_one_gradient_on_a_noisy_model():
    class Noisy(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x + torch.randn_like(x))

    model, images, labels = classified(48)

    def mean_loss(eot_iter):
        torch.manual_seed(0)
        adv = eotpgd(Noisy(model), images, labels, eps=0.1, alpha=0.05, steps=5, eot_iter=eot_iter)
        return F.cross_entropy(model(adv), labels).item()

    one, some, many = (mean_loss(eot_iter) for eot_iter in (1, 8, 32))
    assert one < some < many


@pytest.mark.parametrize(("eps", "steps"), [(1, 1), (2, 2), (3, 3), (4, 5), (8, 10), (15, 18), (16, 20), (24, 28)])
def test_the_number_of_steps_of_the_paper_is_rounded_down(eps, steps):
    assert BIM(nn.Flatten(), eps=eps / 255, steps=0).options.steps == steps


def test_the_random_step_is_of_size_alpha_and_the_others_of_the_rest():
    model, images, labels = classified()
    images = images * 0.5 + 0.25
    start = rfgsm(model, images, labels, eps=0.1, alpha=0.04, steps=0, generator=generator())
    assert torch.allclose((start - images).abs(), torch.tensor(0.04), atol=1e-6)
    assert abs((start > images).float().mean() - 0.5) < 0.1
    moved = rfgsm(model, images, labels, eps=0.1, alpha=0.04, generator=generator())
    slope = gradient(model, start, labels)
    assert torch.allclose(moved, start + 0.06 * slope.sign(), atol=1e-6)
    with pytest.raises(ValueError, match=r"alpha must lie between 0 and eps, 0.1, got 0.2"):
        rfgsm(model, images, labels, eps=0.1, alpha=0.2)


ATTACKS = {
    "mifgsm": mifgsm,
    "mifgsm l2": partial(mifgsm, norm="l2"),
    "eotpgd": partial(eotpgd, generator=None),
    "eotpgd l2": partial(eotpgd, norm="l2"),
    "rfgsm": rfgsm,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_results_lie_in_ball_and_box_without_slack(name):
    model, images, _ = classified(16)
    images[:4] = images[:4].round()
    labels = model(images).argmax(1)
    for eps in (0.0, 8 / 255, 0.031, 0.3):
        adv = ATTACKS[name](model, images, labels, eps=eps, alpha=eps / 2, steps=4)
        assert all(value <= eps for value in distances(adv, images, "l2" if "l2" in name else "linf").tolist())
        assert adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_targets_are_reached_and_more_radius_breaks_no_fewer(name):
    model, images, labels = classified(24)
    factor = 8 if "l2" in name else 1
    targets = (labels + 1) % 5
    adv = ATTACKS[name](model, images, targets, eps=factor * 0.4, alpha=factor * 0.05, steps=40, targeted=True)
    assert (model(adv).argmax(1) == targets).float().mean() > 0.9
    counts = []
    for eps in (0.002, 0.01, 0.05, 0.2):
        adv = ATTACKS[name](model, images, labels, eps=factor * eps, alpha=factor * eps / 2, steps=10)
        counts.append(int(broken(model, adv, labels).sum()))
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("attack", [mifgsm, partial(eotpgd, random_start=False), bim])
def test_model_random_state_and_inputs_stay_as_they_are(attack):
    assert_leaves_all_as_found(partial(attack, steps=2))
    assert_works_at_the_edges(partial(attack, steps=2))


@pytest.mark.parametrize("attack", [eotpgd, rfgsm])
def test_a_generator_alone_decides_what_is_drawn(attack):
    def seeded(model, images, labels):
        return attack(model, images, labels, steps=2, generator=generator())

    assert_leaves_all_as_found(seeded)
    assert_works_at_the_edges(seeded)


def test_objects_compute_what_the_functions_compute():
    model, images, labels = classified()
    targets = (labels + 1) % 5
    for kind, function, extra in (
        (MIFGSM, mifgsm, {"decay": 0.5}),
        (EOTPGD, eotpgd, {"eot_iter": 3, "random_start": False}),
        (RFGSM, rfgsm, {}),
        (BIM, bim, {}),
    ):
        attack = kind(model, *SETTINGS.values(), **extra)
        torch.manual_seed(0)
        adv = attack(images, labels)
        torch.manual_seed(0)
        assert torch.equal(adv, function(model, images, labels, **SETTINGS, **extra))
        attack.set_mode_targeted_by_label(quiet=True)
        torch.manual_seed(0)
        adv = attack(images, targets)
        torch.manual_seed(0)
        assert torch.equal(adv, function(model, images, targets, targeted=True, **SETTINGS, **extra))


def test_wrong_arguments_are_named():
    model, images, labels = classified()
    for attack in (mifgsm, eotpgd, rfgsm, bim):
        with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
            attack(model, images, labels, steps=-1)
        with pytest.raises(ValueError, match='loss must be "ce"'):
            attack(model, images, labels, loss="cw")
    with pytest.raises(ValueError, match="decay must be finite and not negative, got -1"):
        mifgsm(model, images, labels, decay=-1)
    with pytest.raises(ValueError, match="eot_iter must be an integer of at least 1, got 0"):
        eotpgd(model, images, labels, eot_iter=0)
