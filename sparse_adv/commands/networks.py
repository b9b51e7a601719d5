"""The network of a command: from its flags, or else from a ticket or an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_adv.config import NetworkConfig


def agreed(arch: str | None, width: int | None, known: Mapping[str, Any], source: str) -> NetworkConfig:
    """Return architecture and width from the flags, or else from a ticket or run.

    Args:
        arch, width: the flags; None where they are left out.
        known: architecture and width that the ticket or the run records, if it does.
        source: name of the ticket or the run, for errors.

    Raises:
        ValueError: if the two contradict each other, or neither names an architecture.
    """
    network: dict[str, Any] = {}
    for name, flag in (("arch", arch), ("width", width)):
        value = known.get(name)
        if flag is not None and value is not None and flag != value:
            raise ValueError(f"--{name} {flag} does not fit {source}, whose {name} is {value}")
        network[name] = value if flag is None else flag
    if network["arch"] is None:
        raise ValueError(f"{source} does not say which network it is for: name one with --arch")
    return NetworkConfig(**network)
