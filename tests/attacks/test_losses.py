"""The losses that attacks know by name: their formulas, and what no shift or scale of the logits changes."""

import pytest
import torch
from helpers.attacked import batch, generator, make_model

from sparse_adv.attacks import PGD, losses, pgd


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, 6, dtype=torch.float64)


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.randint(6, (50,))


def test_each_loss_is_its_formula(logits, labels):
    targets = (labels + 2) % 6
    for i, (z, y, t) in enumerate(zip(logits.tolist(), labels.tolist(), targets.tolist(), strict=True)):
        highest = sorted(z, reverse=True)
        wrong = max(value for k, value in enumerate(z) if k != y)
        row = slice(i, i + 1)
        expected = {
            losses.cross_entropy: sum(torch.tensor(z, dtype=torch.float64).exp()).log().item() - z[y],
            losses.margin: wrong - z[y],
            losses.dlr: (wrong - z[y]) / (highest[0] - highest[2]),
        }
        for loss, value in expected.items():
            assert loss(logits[row], labels[row]).item() == pytest.approx(value)
        scale = highest[0] - (highest[2] + highest[3]) / 2
        found = losses.targeted_dlr(logits[row], labels[row], targets[row])
        assert found.item() == pytest.approx((z[t] - z[y]) / scale)


def test_the_divergence_of_trades_is_from_the_clean_images_to_the_adversarial_ones(logits):
    clean, attacked = logits[:25], logits[25:]
    q, p = clean.softmax(1), attacked.softmax(1)
    expected, reverse = (q * (q / p).log()).sum(1), (p * (p / q).log()).sum(1)
    assert not torch.allclose(expected, reverse, rtol=0.1)
    torch.testing.assert_close(losses.kl_divergence(attacked, clean.log_softmax(1)), expected)


def test_margin_and_dlr_are_positive_where_the_prediction_is_wrong(logits, labels):
    wrong = logits.argmax(1) != labels
    assert torch.equal(losses.margin(logits, labels) > 0, wrong)
    assert torch.equal(losses.dlr(logits, labels) > 0, wrong)


def test_dlr_depends_neither_on_a_shift_nor_on_a_scale(logits, labels):
    targets = (labels + 1) % 6
    for loss in (losses.dlr, lambda z, y: losses.targeted_dlr(z, y, targets)):
        torch.testing.assert_close(loss(3 * logits + 7, labels), loss(logits, labels))


def test_equal_logits_give_a_loss_of_zero(labels):
    for loss in (losses.margin, losses.dlr, lambda z, y: losses.targeted_dlr(z, y, (y + 1) % 6)):
        assert not loss(torch.ones(50, 6), labels).any()


def test_too_few_classes_are_refused():
    labels = torch.tensor([0])
    for classes, loss in ((1, losses.margin), (2, losses.dlr), (3, lambda z, y: losses.targeted_dlr(z, y, y))):
        with pytest.raises(ValueError, match=f"needs logits of at least {classes + 1} classes, got {classes}"):
            loss(torch.zeros(1, classes), labels)


def test_labels_of_the_losses_of_this_library_are_classes_and_are_checked():
    model, (images, labels) = make_model().eval(), batch()
    for loss in (*losses.LOSSES, losses.SmoothedCrossEntropy(0.1)):
        with pytest.raises(ValueError, match="labels must lie in"):
            pgd(model, images, labels + 5, loss=loss, steps=1)
    assert not losses.takes_classes(losses.cross_entropy)  # of a function nothing is known


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("targeted", [True, False])
def test_an_attack_takes_a_loss_by_name(name, targeted):
    model, (images, labels) = make_model(), batch()
    loss = losses.LOSSES[name]
    adv = pgd(model, images, labels, loss=name, targeted=targeted, steps=5, random_start=False)
    assert torch.equal(adv, PGD(model, steps=5, random_start=False, loss=loss, targeted=targeted)(images, labels))
    with torch.no_grad():
        change = loss(model.eval()(adv), labels) - loss(model(images), labels)
    assert (change.mean() < 0) if targeted else (change.mean() > 0)
    assert not torch.equal(adv, pgd(model, images, labels, loss=name, steps=5, generator=generator()))
