"""What the engine does once for a model, and not again: the one place of these tests that names its functions."""

import pytest
import torch

from sparse_adv.engine import dispatch


def shapes_given(monkeypatch: pytest.MonkeyPatch, name: str) -> list[torch.Size]:
    """A list that grows by the shape of the input at each call of this function of the engine."""
    shapes: list[torch.Size] = []
    function = getattr(dispatch, name)

    def noted(model: torch.nn.Module, x: torch.Tensor) -> object:
        shapes.append(x.shape)
        return function(model, x)

    monkeypatch.setattr(dispatch, name, noted)
    return shapes


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the input for which each program was made: each takes a trace of the model."""
    return shapes_given(monkeypatch, "_make")


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of the images on which each gradient of a model's steps was compared with autograd's."""
    return shapes_given(monkeypatch, "_check")
