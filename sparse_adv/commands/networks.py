"""The network of a command: from its flags, or else from a ticket or an earlier run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparse_adv import data, experiment, masks, runs
from sparse_adv.config import DataConfig, NetworkConfig
from sparse_adv.models.checkpoints import sizes_of


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


def weights_of(what: Path, weights: Literal["best", "last"] | None = None) -> Path:
    """Return the file of weights of a run's folder, those of its best or of its last epoch; of a file itself.

    Args:
        what: folder of a run, or a file.
        weights: which; None for those that the run tests, of its best epoch or, where there is none, of its last.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the run is a search.
    """
    if not what.is_dir():
        return what
    run = runs.read(what)
    if weights is None:
        weights = "best" if runs.best(run.records, run.info.train) else "last"
    path = what / (runs.BEST if weights == "best" else runs.LAST)
    if run.info.kind == "search" and not path.exists():
        raise ValueError(f"{what} is a search: evaluate its {runs.TICKET}, or a run that has trained it")
    return path


def trained(
    pruned: masks.Ticket,
    dataset: data.Dataset,
    source: str,
    *,
    arch: str | None,
    width: int | None,
    normalize: str | None,
) -> nn.Module:
    """Return the network with the weights of a run or a file; layers that have masks there are sparse.

    Args:
        pruned: from `experiment.read_pruned`.
        dataset: the images that the network is for.
        source: name of the run or the file, for errors.
        arch, width, normalize: the flags; None where they are left out.

    Raises:
        ValueError: if the weights do not fit the network, nothing says which one it is, or it was trained on images of
            other classes.
    """
    _check_class_names(pruned, dataset, source)
    return experiment.load_network(agreed(arch, width, pruned.provenance, source), dataset, pruned, normalize)


def check_images(ticket: masks.Ticket, arch: str, dataset: data.Dataset, images: str, source: str) -> None:
    """Raise ValueError if a ticket is for other images than those that the command reads, or for other classes.

    Where these may be the default, which the digits are, other images are those of any other shape; else those of
    another number of channels.

    Args:
        ticket: the ticket.
        arch: its architecture.
        dataset: the images that the command reads.
        images: what --data says.
        source: name of the ticket, for errors.
    """
    _check_class_names(ticket, dataset, source)
    shape, channels = ticket.provenance.get("input_shape"), sizes_of(ticket.state_dict, arch)[1]
    if images == DataConfig().data and shape not in (None, list(dataset.input_shape)):
        known = ticket.provenance.get("data")
        its = f"images of shape {shape}" + (f" of {known}" if known else "")
    elif channels != dataset.input_shape[0]:
        its = f"images of {channels} channels"
    else:
        return
    raise ValueError(
        f"{source} is for {its}, those of {images} have shape {list(dataset.input_shape)}: name its images with --data"
    )


def _check_class_names(pruned: masks.Ticket, dataset: data.Dataset, source: str) -> None:
    """Raise ValueError if the classes of the images have other names than those that a network was trained for."""
    known, names = pruned.provenance.get("class_names"), dataset.class_names
    if not isinstance(known, list) or names is None:
        return
    if different := sorted(set(map(str, known)) ^ set(names)):
        raise ValueError(f"{source} and its images must have the same classes, only one has {different[0]!r}")
