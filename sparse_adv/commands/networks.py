"""The images and the network that a command's flags, a ticket or an earlier run describe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparse_adv import data, models, runs
from sparse_adv.commands import config
from sparse_adv.training import distributed


def dataset_of(options: argparse.Namespace, device: torch.device) -> data.Dataset:
    """The images that the flags name, on the device."""
    return data.load(options.data, validation=options.validation, limit=options.limit, seed=options.seed, device=device)


def batches_of(options: argparse.Namespace, dataset: data.Dataset) -> data.Batches:
    """The training batches of this process."""
    augment = dataset.input_shape == (3, 32, 32) if options.augment is None else options.augment
    return data.Batches(
        dataset.train,
        options.batch_size,
        augment=augment,
        seed=options.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )


def build(about: Mapping[str, Any], dataset: data.Dataset, seed: int, device: torch.device) -> nn.Module:
    """A dense network at its start, for the images of a data set."""
    model = models.build(
        about["arch"],
        seed,
        width=about.get("width"),
        classes=dataset.classes,
        input_shape=dataset.input_shape,
        data=dataset.name,
    )
    return model.to(device)


def agreed(options: argparse.Namespace, told: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Architecture and width from the flags, or else from a ticket or run.

    Raises:
        ValueError: if the two contradict each other, or nobody names an architecture.
    """
    found = {}
    for name in ("arch", "width"):
        asked, known = getattr(options, name), told.get(name)
        if asked is not None and known is not None and asked != known:
            raise ValueError(f"--{name} {asked} does not fit {source}, whose {name} is {known}")
        found[name] = known if asked is None else asked
    if found["arch"] is None:
        raise ValueError(f"{source} does not say which network it is for: name one with --arch")
    return found


def begin(options: argparse.Namespace, command: str, identity: Mapping[str, Any] | None = None, **facts: Any) -> None:
    """Begin the run in its folder, or make sure that the one begun there is the same; rank 0 writes."""
    if distributed.rank() == 0:
        runs.begin(options.out, {"command": command, **config.settings_of(options), **(identity or {})}, **facts)
        config.write_config(options.out, options)
    distributed.barrier()
