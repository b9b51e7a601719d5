"""Signs of gradient masking: each is named where it occurs, and a plain network has none."""

import pytest
import torch
from helpers.attacked import batch, make_model

from sparse_adv.attacks import signs_of_masking


def test_signs_of_masking_are_named():
    model, (images, labels) = make_model().eval(), batch()
    assert signs_of_masking(model, images, labels) == []
    for masked, words in (
        (lambda x: model(x).softmax(1), "probabilities"),
        (lambda x: model(x) + torch.rand(6, 5), "differ between two calls"),
        (lambda x: model((x * 8).round() / 8), "gradient is zero at 6 of 6 images"),
        (lambda x: model(x) * (torch.arange(6) > 1)[:, None], "gradient is zero at 2 of 6 images"),
        (lambda x: model(x) * torch.nan, "6 of 6 images are NaN"),
    ):
        assert any(words in sign for sign in signs_of_masking(masked, images, labels))
    with pytest.raises(TypeError, match="got a tuple"):
        signs_of_masking(lambda x: (model(x),), images, labels)


def test_the_loss_that_does_not_rise_and_robustness_that_rises_with_eps_are_named():
    labels = torch.zeros(40, dtype=torch.int64)
    images = torch.rand(40, 3, 4, 4) * 0.2 + 0.4

    def walled(x):
        """Misclassified where the mean pixel has risen by 0.03 to 0.06, and robust beyond."""
        rise = (x - images).flatten(1).mean(1)
        margin = (1 - 33 * rise).where(rise < 0.06, 2 - rise)
        return torch.stack([margin, torch.zeros_like(margin)], 1)

    signs = signs_of_masking(walled, images, labels, eps=0.05)
    assert any("robust accuracy rises with eps" in sign for sign in signs)

    def hollow(x):
        """A loss that falls again where steps go on."""
        change = (x - images).flatten(1).abs().amax(1)
        slope = (x - images).flatten(1).sum(1)
        margin = 1 - slope + (change > 0.02) * (5 + slope)
        return torch.stack([margin, torch.zeros_like(margin)], 1)

    signs = signs_of_masking(hollow, images, labels, eps=0.05)
    assert any("does not rise with its steps" in sign for sign in signs)
