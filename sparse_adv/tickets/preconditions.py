"""What a ticket search needs of a model, its images and its settings."""

from __future__ import annotations

import torch
from torch import nn

from sparse_adv.argument_types import checks_types
from sparse_adv.config import PruneConfig, TrainConfig
from sparse_adv.masks.dependency_graph import dependency_groups
from sparse_adv.masks.pruning import Candidates
from sparse_adv.masks.ticket import check_masks_fit
from sparse_adv.tickets.early_stopping import check_threshold
from sparse_adv.tickets.half_resolution import check_takes
from sparse_adv.training.checks import pairs_of
from sparse_adv.training.loop import Batches
from sparse_adv.training.update import updates_of


@checks_types
def check_fits(
    model: nn.Module, batches: Batches, train_config: TrainConfig, prune_config: PruneConfig
) -> tuple[int, ...] | None:
    """Check before any training or writing that a search can prune and rewind a model; `search` does so itself.

    Args:
        model, batches, train_config, prune_config: as in `search`.

    Returns:
        Shape [1, C, H, W] of the images that the search trains on; None if there is no batch or it is not needed.

    Raises:
        TypeError: if the batches have no length, but the number of updates matters.
        ValueError: if the configuration of the pruning does not fit the model or the training, or a module of the model
            has extra state, because a ticket cannot hold that.

    Examples:
        >>> check_fits(nn.Linear(4, 2), [], TrainConfig(), PruneConfig(score="taylor"))
        Traceback (most recent call last):
        ...
        ValueError: score must be a function or one of magnitude, relative_magnitude, got 'taylor'
    """
    check_masks_fit({}, model.state_dict())
    # A score function may need results of the training, so it is not called here.
    score = "magnitude" if callable(prune_config.score) else prune_config.score
    density = prune_config.density_of_round(1)
    candidates = Candidates.of(model, density, prune_config.scope, score, (), prune_config.linear)
    for name in candidates.shapes:
        candidates.scores(name)
    check_threshold(prune_config, train_config.epochs)
    step = prune_config.rewind_step
    if step and step > (updates := updates_of(train_config, batches)):
        raise ValueError(f"rewind_step must be an update of the first round, which has {updates}, got {step}")
    if not prune_config.permute_channels and not prune_config.half_resolution:
        return None
    shape = image_shape(batches)
    if shape is None:
        return None
    if prune_config.half_resolution:
        shape = (*shape[:2], shape[2] // 2, shape[3] // 2)
        check_takes(model, shape)
    if prune_config.permute_channels:
        dependency_groups(model, shape)  # raises ValueError if the model cannot be traced
    return shape


def image_shape(batches: Batches) -> tuple[int, ...] | None:
    """Shape [1, C, H, W] of the images; None if there is no batch."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws a random number when it is iterated
        batch = next(pairs_of(batches), None)
    return None if batch is None else (1, *batch[0].shape[1:])
