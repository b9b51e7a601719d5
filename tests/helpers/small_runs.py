"""A task, a network and a recipe that train in a second: what the tests of training and tickets share."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_adv.data import Batches, Split
from sparse_adv.runs import EpochRecord
from sparse_adv.training import TrainConfig

WITH_ENGINE = TrainConfig(
    objective="natural", epochs=3, lr=0.1, schedule="constant", eps=0.05, alpha=0.02, steps=2, evaluation_steps=2
)
QUICK = replace(WITH_ENGINE, engine=False)
"""For all that does not depend on the engine: to trace so small a network takes twice the time of training it."""


def bars(count: int, seed: int) -> Split:
    """Noisy 6 x 6 images with a bright column (class 0) or a bright row (class 1)."""
    noise = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(count, 1, 6, 6, generator=noise)
    labels = torch.arange(count) % 2
    images[labels == 0, :, :, 2] += 0.5
    images[labels == 1, :, 2, :] += 0.5
    return Split(images.mul(255).to(torch.uint8), labels)


TRAIN, VALIDATION, TEST = bars(96, 0), bars(40, 1), bars(40, 2)


def batches(size: int = 32, **options) -> Batches:
    return Batches(TRAIN, size, **options)


def network(seed: int = 0, channels: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(36 * channels, 2),
        )


class Untraceable(nn.Sequential):
    """Goes another way for other images: torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class ExtraState(nn.Identity):
    """Has a state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"count": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


class Stop(Exception):
    """Ends a run where a test raises it."""


def stop_after(epoch: int | None) -> Callable[[EpochRecord], None]:
    """An `on_epoch` that ends a run after this epoch; None never does."""

    def on_epoch(record: EpochRecord) -> None:
        if record.epoch == epoch:
            raise Stop

    return on_epoch


def equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
