"""The images and the network that a command's flags, a ticket or an earlier run describe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from sparse_adv.config import DataConfig, NetworkConfig


def images_of(options: argparse.Namespace) -> DataConfig:
    """The images that the flags describe, and their batches."""
    return DataConfig(
        str(options.data),
        options.limit,
        options.validation,
        getattr(options, "batch_size", DataConfig.batch_size),
        getattr(options, "augment", None),
    )


def agreed(options: argparse.Namespace, told: Mapping[str, Any], source: str) -> NetworkConfig:
    """Architecture and width from the flags, or else from a ticket or run.

    Raises:
        ValueError: if the two contradict each other, or nobody names an architecture.
    """
    found: dict[str, Any] = {}
    for name in ("arch", "width"):
        asked, known = getattr(options, name), told.get(name)
        if asked is not None and known is not None and asked != known:
            raise ValueError(f"--{name} {asked} does not fit {source}, whose {name} is {known}")
        found[name] = known if asked is None else asked
    if found["arch"] is None:
        raise ValueError(f"{source} does not say which network it is for: name one with --arch")
    return NetworkConfig(**found)
