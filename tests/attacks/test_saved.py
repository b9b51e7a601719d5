"""What `Attack.save` counts as robust, with labels that are the true classes and labels that are targets."""

import pytest
from helpers.searched import classified

from sparse_adv import attacks


def by_label(model, **options):
    attack = attacks.PGD(model, **options)
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


def by_argument(model, **options):
    return attacks.PGD(model, targeted=True, **options)


def by_label_in_a_search(model, **options):
    attack = attacks.MIFGSM(model, eps=options["eps"], alpha=options["alpha"], steps=options["steps"])
    attack.set_mode_targeted_by_label(quiet=True)
    return attack


@pytest.mark.parametrize("make", [by_label, by_argument, by_label_in_a_search])
def test_where_labels_are_targets_an_image_is_robust_if_its_target_was_not_reached(make):
    model, images, labels = classified(32)
    targets = (labels + 1) % 5
    attack = make(model, eps=0.03, alpha=0.01, steps=5, random_start=False)
    adv = attack(images, targets)
    reached, lengths = model(adv).argmax(1) == targets, (adv - images).flatten(1).norm(dim=1)
    assert 0 < reached.sum() < 32 and lengths[reached].mean() != lengths.mean()
    loader = [(images[k::3], targets[k::3]) for k in range(3)]
    accuracy, distance, _ = attack.save(loader, verbose=False, return_verbose=True)
    assert accuracy == pytest.approx(100 * (1 - reached.float().mean().item()))
    assert distance == pytest.approx(lengths[reached].mean().item())


def test_where_a_function_gives_the_targets_an_image_is_robust_if_its_class_is_still_the_true_one():
    model, images, labels = classified(32)
    attack = attacks.PGD(model, eps=0.03, alpha=0.01, steps=5, random_start=False)
    attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 5, quiet=True)
    adv = attack(images, labels)
    fallen = model(adv).argmax(1) != labels
    assert 0 < fallen.sum() < 32
    accuracy, distance, _ = attack.save([(images, labels)], verbose=False, return_verbose=True)
    assert accuracy == pytest.approx(100 * (1 - fallen.float().mean().item()))
    assert distance == pytest.approx((adv - images).flatten(1).norm(dim=1)[fallen].mean().item())
