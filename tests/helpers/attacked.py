"""A small network, a batch and the textbook PGD loop: what the tests of the attacks share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv.attacks import autoattack_state
from sparse_adv.ops import reference

EPS, ALPHA = 8 / 255, 2 / 255


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * 9, 5),
    )
    for _ in range(3):  # running statistics that differ from those of a batch
        model(torch.rand(16, 3, 8, 8) * 2)
    return model


def batch(seed: int = 1, size: int = 6, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, 8, 8, generator=generator)
    return images.to(device), torch.randint(5, (size,), generator=generator).to(device)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def philox_state() -> Tensor:
    """Key and offset that an attack draws from `generator()`."""
    key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator())
    return torch.cat([key, torch.zeros_like(key)])


def textbook_pgd(
    model: nn.Module, start: Tensor, images: Tensor, labels: Tensor, steps: int, sign: int = 1, **step: float
) -> Tensor:
    adv = start.clone()
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (sign * F.cross_entropy(model(adv), labels)).backward()
        adv = reference.pgd_step(adv.detach(), adv.grad, images, **step)
    return adv


def losses(model: nn.Module, adv: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(adv), labels, reduction="none")


@contextmanager
def interrupted_at_its_first_state() -> Iterator[None]:
    """AutoAttack is interrupted in this block, when it has written its state for the first time."""
    write = autoattack_state.State.write

    def interrupted(state: autoattack_state.State, path: Path) -> None:
        write(state, path)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(autoattack_state.State, "write", interrupted)
        yield


def snapshot(model: nn.Module) -> list[object]:
    """All that an attack must not change, in a form that == compares."""
    modules = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    parameters = [
        (parameter.requires_grad, parameter.grad if parameter.grad is None else parameter.grad.tolist())
        for parameter in model.parameters()
    ]
    return [modules, parameters, {name: value.tolist() for name, value in model.state_dict().items()}]
