"""The network of a command: from its flags, or else from a ticket or an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sparse_adv import data, experiment, masks, runs
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
    for name, flag in (("arch", arch), ("width", width)):
        value = known.get(name)
        if flag is not None and value is not None and flag != value:
            raise ValueError(f"--{name} {flag} does not fit {source}, whose {name} is {value}")
    arch = known.get("arch") if arch is None else arch
    if arch is None:
        raise ValueError(f"{source} does not say which network it is for: name one with --arch")
    return NetworkConfig(arch, known.get("width") if width is None else width)


def trained(
    what: Path,
    folder: runs.Run | None,
    dataset: data.Dataset,
    *,
    last: bool = False,
    arch: str | None,
    width: int | None,
    normalize: str | None,
    density: float | None,
) -> nn.Module:
    """Return the network with the weights of a run or a file; layers that have masks there are sparse.

    Args:
        what: a run's folder or a file of weights.
        folder: the run, if it is one.
        dataset: the images that the network is for.
        last: the weights of the run's last epoch, and not of its best one.
        arch, width, normalize, density: the flags; None where they are left out.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if they do not fit the network, or nothing says which one it is.
    """
    path = what
    if folder is not None:
        path = what / (runs.LAST if last else runs.BEST)
        if not path.exists() and folder.info.kind == "search":
            raise ValueError(f"{what} is a search: evaluate its {runs.TICKET}, or a run that has trained it")
    pruned = masks.load_pruned(path, dense=True, density=density)
    network = folder.info.network if folder is not None else None
    known = pruned.provenance if network is None else asdict(network)
    return experiment.load_network(agreed(arch, width, known, str(what)), dataset, pruned, normalize)
