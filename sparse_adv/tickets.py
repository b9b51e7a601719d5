"""Ticket search: cheap training finds a mask, and the weights return to where they began."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

from torch import nn

from sparse_adv import masks
from sparse_adv.data import Dataset
from sparse_adv.training import Recipe, Record, train

log = logging.getLogger(__name__)


def search(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    density: float = 0.2,
    block: Sequence[int] = (1, 1),
    scope: str = "global",
    score: str | masks.Score = "relative_magnitude",
    on_epoch: Callable[[Record], None] | None = None,
) -> masks.Ticket:
    """Find a boosting ticket: train dense and cheaply, prune once, go back to the start.

    Args:
        model: a dense model at its initial state; the search ends with the model there again, BatchNorm included.
        dataset: see `training.train`.
        recipe: of the search; the paper's is a small constant learning rate without warm-up, taking the last weights.
        density, block, scope, score: see `masks.prune`; the defaults are the paper's rule.
        on_epoch: see `training.train`.

    Returns:
        The ticket: masks, initial state, and as provenance the recipe, the pruning rule, the records of the epochs and
        the seconds of training and pruning. `sparse_adv.sparsify(model, ticket.masks)` makes the sparse model.

    Source: Li et al., "Towards practical lottery ticket hypothesis for adversarial training" (arXiv 2003.05733),
    section 3.1.
    """
    prune = partial(masks.prune, model, density=density, block=block, scope=scope)
    # What pruning would refuse it refuses now, not after the training. (A callable may need what training leaves.)
    prune(score="magnitude" if callable(score) else score)
    initial_state = copy.deepcopy(model.state_dict())
    records = train(model, dataset, recipe, on_epoch)
    begin = time.perf_counter()
    found = prune(score=score)
    model.load_state_dict(initial_state)
    seconds = records[-1]["seconds"] + time.perf_counter() - begin
    log.info("ticket that keeps %.1f %% of the weights found in %.1f s", 100 * masks.density(found), seconds)
    provenance = {
        "recipe": asdict(recipe),
        "rule": {"density": density, "block": list(block), "scope": scope, "score": getattr(score, "__name__", score)},
        "epochs": records,
        "seconds": seconds,
    }
    return masks.Ticket(found, initial_state, provenance)
