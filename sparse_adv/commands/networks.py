"""The network of a command: from its flags, else from a ticket or an earlier run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparse_adv import data, experiment, masks, runs
from sparse_adv.config import DataConfig, NetworkConfig
from sparse_adv.models.checkpoints import sizes_of
from sparse_adv.training import distributed

log = logging.getLogger(__name__)


def agreed(arch: str | None, width: int | None, known: Mapping[str, Any], source: str) -> NetworkConfig:
    """Return architecture and width from the flags, else from a ticket or run.

    Args:
        arch, width: the flags; None if they are left out.
        known: architecture and width in the record of the ticket or the run, if they are there.
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
    """Return the file of weights in a run's folder, from its best or its last epoch; a file is returned itself.

    Args:
        what: folder of a run, or a file.
        weights: which; None for those that the run tests: from its best epoch or, if there is none, its last.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if the run is a search.
    """
    if not what.is_dir():
        return what
    run = runs.read(what)
    if weights is None and isinstance(run.result, runs.TrainResult):
        weights = run.result.tested
    elif weights is None:
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
        ValueError: if the weights do not fit the network, no network is named, or it was trained on images of other
            classes.
    """
    _check_class_names(pruned, dataset, source)
    return experiment.load_network(agreed(arch, width, pruned.provenance, source), dataset, pruned, normalize)


def check_images(ticket: masks.Ticket, arch: str, dataset: data.Dataset, images: str, source: str) -> None:
    """Raise ValueError if a ticket is for other images or classes than those that the command reads.

    The digits may be read only because they are the default, so with them any other shape is refused; else only another
    number of channels is.

    Args:
        ticket: the ticket.
        arch: its architecture.
        dataset: the images that the command reads.
        images: the value of --data.
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


def warn_of_trained_images(ticket: masks.Ticket, images: DataConfig, seed: int, source: str) -> None:
    """Log a warning if the weights of a ticket were trained on images that may now be among those for validation.

    Args:
        ticket: the ticket, whose weights are to be trained further.
        images: those of the training.
        seed: of the training.
        source: name of the ticket, for the warning.
    """
    then, pruning = experiment.images_of(ticket, source), ticket.provenance.get("prune")
    if then is None or Path(then.data).name != Path(images.data).name or distributed.rank() > 0:
        return
    if isinstance(pruning, dict) and not pruning.get("keep_weights"):
        return
    before = {"seed": ticket.provenance.get("seed", seed), "limit": then.limit, "validation": then.validation}
    now = {"seed": seed, "limit": images.limit, "validation": images.validation}
    if changes := ", ".join(f"{name} {value}, now {now[name]}" for name, value in before.items() if value != now[name]):
        log.warning(
            "%s has weights that were trained with other settings of the images (%s): unless these have validation "
            "images of their own, the choice of the best epoch sees images that the weights were trained on",
            source,
            changes,
        )


def _check_class_names(pruned: masks.Ticket, dataset: data.Dataset, source: str) -> None:
    """Raise ValueError if the classes of the images have other names than those of a network's training."""
    known, names = pruned.provenance.get("class_names"), dataset.class_names
    if not isinstance(known, list) or names is None:
        return
    if different := sorted(set(map(str, known)) ^ set(names)):
        raise ValueError(f"{source} and its images must have the same classes, only one has {different[0]!r}")
