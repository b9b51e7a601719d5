"""The engine on models that hypothesis draws: whatever is fused, the gradients are those of autograd."""

import torch
from helpers.random_models import BATCH, CHANNELS, SIZE, random_models
from hypothesis import given, reject, settings

from sparse_adv import engine

TOLERANCE = 1e-9


def loss(logits):
    """One that depends on every element, and on the logits."""
    weights = torch.arange(1, logits[0].numel() + 1).to(logits).cos().view(1, *logits.shape[1:])
    return (logits * weights + logits.square()).sum()


def check(model, seen):
    x = torch.rand(BATCH, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    try:
        expected = {rows: engine.Autograd(model).gradient(x[:rows], loss) for rows in (BATCH, 3)}
    except RuntimeError as error:
        assert "in-place" in str(error) or "inplace" in str(error) or "require grad" in str(error)
        reject()  # PyTorch itself cannot differentiate it
    before = x.clone()
    with engine.input_gradients(model, x) as gradients:
        seen.append(isinstance(gradients, engine.Program))
        if not seen[-1]:
            (line,) = engine.explain(model, x)
            assert len(line) > len("autograd: ")
            return
        kept = []
        for rows, gradient in expected.items():  # fewer rows are padded
            logits = model(x[:rows].clone()).detach()
            torch.testing.assert_close(gradients.logits(x[:rows]), logits, rtol=TOLERANCE, atol=TOLERANCE)
            actual = gradients.gradient(x[:rows], loss)
            kept.append((actual, gradient))
        for actual, gradient in kept:  # later calls must not overwrite earlier results
            scale = float(gradient.abs().max()) or 1.0
            torch.testing.assert_close(actual, gradient, rtol=TOLERANCE, atol=TOLERANCE * scale)
    assert x.equal(before)


def test_gradients_of_random_models_are_autograds():
    seen = []

    @given(random_models())
    @settings(max_examples=25)
    def each(model):
        check(model, seen)

    each()
    assert sum(seen) >= 0.9 * len(seen) > 0
