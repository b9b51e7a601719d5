"""An attack whose gradients the engine forms is as strong as one by autograd."""

import copy

import pytest
import torch

from sparse_adv import attacks, config, data, engine, masks, models, training
from sparse_adv.nn import sparsify

EPS = 0.1


@pytest.fixture(scope="module")
def trained():
    """A narrow digits CNN after two epochs of adversarial training, and 300 test images."""
    pytest.importorskip("sklearn", reason="the digits are part of scikit-learn")
    digits = data.load("digits")
    model = models.build("digits_cnn", width=8)
    settings = config.TrainConfig(epochs=2, lr=0.1, eps=EPS, alpha=EPS, steps=1, evaluation_steps=1)
    training.train(model, data.Batches(digits.train, 64), settings)
    x, y = next(iter(data.Batches(digits.test, 300, shuffle=False)))
    return model.eval(), x, y


@pytest.mark.parametrize("density", [None, 0.3], ids=["dense", "sparse"])
def test_robust_accuracy_is_that_of_autograd(trained, density):
    model, x, y = trained
    if density is not None:
        model = copy.deepcopy(model)
        sparsify(model, masks.prune(model, density=density))
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)

    def correct(images):
        with torch.no_grad():
            return int((model(images).argmax(1) == y).sum())

    def robust(use_engine):
        generator = torch.Generator().manual_seed(0)
        return correct(
            attacks.pgd(model, x, y, eps=EPS, alpha=EPS / 4, steps=20, generator=generator, engine=use_engine)
        )

    with_engine, with_autograd = robust(True), robust(False)
    assert abs(with_engine - with_autograd) <= 1
    assert 30 < with_autograd < correct(x) - 30  # neither is a foregone result
