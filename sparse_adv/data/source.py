"""What a reader brings, before validation images are held out of it."""

from __future__ import annotations

from typing import NamedTuple

from sparse_adv.data.dataset import Split


class Source(NamedTuple):
    """The parts that a data set comes in, on the CPU."""

    train: Split
    test: Split
    classes: int
    name: str
    validation: Split | None = None
    """Where the data set has validation images of its own."""
