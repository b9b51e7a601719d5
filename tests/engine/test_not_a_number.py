"""NaN passes through the engine as through PyTorch: an image at which a model returns NaN counts as wrong.

oneDNN's fused ReLU made 0 of NaN and is not used. Whether cuDNN's does so, a GPU has to show.
"""

import pytest
import torch
from torch import nn

from sparse_adv import engine, masks, sparsify


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x) + x)


NETWORKS = {
    "convolution and ReLU": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()),
    "1 x 1": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Residual(), nn.Flatten()),
    "Winograd": lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten()),
    "max pooling": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    "batch norm alone": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Flatten()),
    "linear": lambda: nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten(), nn.Linear(18, 9), nn.ReLU()),
}


@pytest.mark.parametrize("density", [1.0, 0.2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_logits_are_nan_where_those_of_the_model_are(name, density, device):
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    if density < 1:
        sparsify(model, masks.prune(model, density=density, scope="uniform"))
    model, x = model.to(device), torch.rand(64, 3, 10, 10).to(device)
    bad = x.clone()
    bad[::2, 0, 4, 4] = torch.nan
    expected, seen = model(bad).isnan().any(1), []
    assert expected.any() and not expected.all()

    def loss(logits):
        seen.append(logits.isnan().any(1))
        return logits.sum(1)  # Winograd spreads a NaN over its tile, so images are compared

    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        assert gradients.logits(bad).isnan().any(1).equal(expected)
        gradients.gradient(bad, loss)
    assert seen[0].equal(expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_nan_in_memory_that_was_freed_reaches_no_result(name, device):
    """cuDNN's fused call without a residual adds 0 times its output's memory, and its ReLU makes 0 of NaN."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval().to(device), torch.rand(64, 3, 10, 10).to(device)
    with engine.input_gradients(model, x) as gradients:
        expected = gradients.logits(x), gradients.gradient(x, torch.sum)
        freed = [
            torch.full((64, channels, size, size), torch.nan, device=device)
            for channels in (8, 16, 32)
            for size in (6, 8, 10)
        ]
        del freed
        found = gradients.logits(x), gradients.gradient(x, torch.sum)
    for now, before in zip(found, expected, strict=True):
        assert torch.allclose(now, before, rtol=1e-3, atol=1e-4)


def test_weights_that_became_nan_are_not_hidden(device):
    model, x = NETWORKS["convolution and ReLU"]().eval().to(device), torch.rand(2, 3, 10, 10).to(device)
    with engine.input_gradients(model, x):
        pass
    nn.init.constant_(model[0].weight, torch.nan)
    with engine.input_gradients(model, x) as gradients:
        assert gradients.logits(x).isnan().all()
