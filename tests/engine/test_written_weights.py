"""Weights that somebody wrote where the mask prunes them."""

import pytest
import torch
from helpers.networks import network

from sparse_adv import engine, masks
from sparse_adv.nn import MaskedConv2d, sparsify


@pytest.mark.parametrize("images", [1, 5, 32])
def test_pruned_weights_that_somebody_wrote_count_as_zero(images):
    """In every kernel, also where a pass takes another one because its weight is packed."""
    model, shape = network("digits_cnn")
    sparsify(model, masks.prune(model, density=0.3, block=(1, 1)))
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, MaskedConv2d):
                layer.weight.masked_fill_(~layer.weight_mask, 0.5)
    x = torch.rand(images, *shape[1:])
    program = engine.Program(model, x)
    program.fold()
    loss = lambda logits: logits.square().sum(1)  # noqa: E731
    expected = engine.Autograd(model).gradient(x, loss)
    assert (program.gradient(x, loss) - expected).norm() < 1e-4 * expected.norm()
