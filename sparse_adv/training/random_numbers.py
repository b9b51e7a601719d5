"""The random generators of batches and layers: the global ones of PyTorch, NumPy and Python, and a DataLoader's own."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

log = logging.getLogger(__name__)

_UNSAVED = (np.random.Generator, np.random.RandomState, random.Random)
_PART_NAMES = (
    *("sampler", "batch_sampler", "collate_fn", "dataset", "datasets"),
    *("transform", "target_transform", "transforms"),
)
"""Attributes by which a DataLoader, samplers, data sets (Subset) and transforms (Compose) refer to others."""


class Stream(IntEnum):
    """What the random numbers of a run are for.

    No value is 0, because NumPy ignores trailing zeros in the numbers of a seed.
    """

    BATCHES = 1
    """The order of an epoch's batches, and layers that draw."""
    ATTACKS = 2
    """The attacks of an epoch."""
    EVALUATION = 3
    """The attacks of an evaluation."""
    MASKS = 11
    """The random masks that sparse training starts from."""
    GROWTH = 12
    """The blocks that grow at random in a change of the masks."""
    REINIT = 13
    """The weights of a re-initialised ticket. They need their own stream, because the training seed, or one next to it,
    may be the seed of the search, and its weights are the ticket's."""


def seed_of(seed: int, stream: Stream, *numbers: int) -> int:
    """Return a seed that depends only on a run's seed, on the purpose of the random numbers, and on further numbers.

    Examples:
        >>> seed_of(0, Stream.MASKS) == seed_of(0, Stream.MASKS), seed_of(0, Stream.MASKS) == seed_of(0, Stream.GROWTH)
        (True, False)
    """
    return int(np.random.SeedSequence([seed, stream, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(seed: int, stream: Stream, *numbers: int) -> Generator:
    """Return a CPU generator seeded with `seed_of`: its random numbers are the same in all processes.

    Examples:
        >>> torch.rand((), generator=generator(0, Stream.MASKS)) == torch.rand((), generator=generator(0, Stream.MASKS))
        tensor(True)
    """
    return Generator().manual_seed(seed_of(seed, stream, *numbers))


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed the global generators of PyTorch, NumPy and Python; after the block they continue where they were before.

    Args:
        seed: in [0, 2^64).
        device: its generator is seeded too, besides the CPU's.

    Examples:
        >>> with seeded(0):
        ...     first = random.random()
        >>> with seeded(0):
        ...     random.random() == first
        True
    """
    device = torch.device(device)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def states_of(batches: Iterable[Any], model: nn.Module | None = None) -> list[Tensor]:
    """Return the states of the user's own generators, which a continued run needs.

    Args:
        batches: their samplers, data sets and transforms may have an attribute `generator`.
        model: its modules may have generators, under any name.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> len(states_of(DataLoader([1, 2], shuffle=True, generator=Generator())))
        1
    """
    return [generator.get_state() for generator in _generators(batches, model)]


def load_states(batches: Iterable[Any], states: Sequence[Tensor], model: nn.Module | None = None) -> None:
    """Set the generators to the states that `states_of` returned.

    Raises:
        ValueError: if the number of generators differs.
    """
    generators = _generators(batches, model)
    if len(generators) != len(states):
        raise ValueError(
            f"batches and model have {len(generators)} generators of their own, had {len(states)} when the run was "
            "begun: make them as before, or take another folder"
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())


def _generators(batches: Iterable[Any], model: nn.Module | None) -> list[Generator]:
    owned = [getattr(owner, "generator", None) for owner in _parts(batches)]
    owned += [value for module in _modules(model) for value in vars(module).values()]
    return list({id(each): each for each in owned if isinstance(each, Generator)}.values())


def _modules(model: nn.Module | None) -> Iterable[nn.Module]:
    return () if model is None else model.modules()


def warn_of_unsaved(batches: Iterable[Any], model: nn.Module | None = None) -> None:
    """Warn of workers and generators whose numbers are determined neither by seed and epoch nor by `states_of`.

    Examples:
        >>> warn_of_unsaved([])
    """
    told = "a run that is continued draws other numbers than one that was not interrupted"
    for part in [*_parts(batches), *_modules(model)]:
        if getattr(part, "persistent_workers", False):
            log.warning("the workers of the %s are persistent: %s", type(part).__name__, told)
        for name, value in getattr(part, "__dict__", {}).items():
            saved = name == "generator" or isinstance(part, nn.Module)
            if isinstance(value, _UNSAVED) or (isinstance(value, Generator) and not saved):
                log.warning("%s.%s is a generator that is not saved: %s", type(part).__name__, name, told)


def set_epoch(batches: Iterable[Any], epoch: int) -> None:
    """Tell the number of the epoch, from 0, to batches and to the samplers and the data set inside a DataLoader.

    Examples:
        >>> from torch.utils.data import DataLoader, DistributedSampler
        >>> sampler = DistributedSampler([1, 2], num_replicas=1, rank=0)
        >>> set_epoch(DataLoader([1, 2], sampler=sampler), 3)
        >>> sampler.epoch
        3
    """
    for owner in _parts(batches):
        if callable(getattr(owner, "set_epoch", None)):
            owner.set_epoch(epoch)


def _parts(batches: Any) -> Iterator[Any]:
    """The batches, and the samplers and data sets inside them, found by `_PART_NAMES`; each once."""
    seen: set[int] = set()
    left = deque([batches])
    while left:
        part = left.popleft()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        for name in _PART_NAMES:
            inner = getattr(part, name, None)
            # A list may hold tens of thousands of samples, which have no attributes.
            inner = inner if isinstance(inner, list | tuple) else [inner]
            left.extend(each for each in inner if hasattr(each, "__dict__"))
