"""The final test of a run on images that were not used in any other way, and its `result.json`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sparse_adv import json_files, runs
from sparse_adv.argument_types import checks_types
from sparse_adv.config import TrainConfig
from sparse_adv.data import Split
from sparse_adv.runs import EpochRecord, TicketChecks, TrainResult
from sparse_adv.training import distributed
from sparse_adv.training.checkpoint import read_weights
from sparse_adv.training.evaluation import Images, clean_accuracy, fgsm_accuracy, robust_accuracy
from sparse_adv.training.folder_lock import hold

log = logging.getLogger(__name__)

TEST_STEPS = 20


@checks_types
def final_test(
    model: nn.Module,
    folder: Path | str,
    records: Sequence[EpochRecord],
    config: TrainConfig,
    test: Images,
    checks: TicketChecks | None = None,
) -> TrainResult:
    """Measure a finished run on the test images (clean, under FGSM and under PGD-20) and write its `result.json`.

    Args:
        model: gets the tested weights: those of the best epoch, see `runs.best`, or the last ones if there were no
            validation images or if no epoch had reached the method's density.
        folder: of the run.
        records: of all epochs, from `training.train`.
        config: gives radius and norm of the attacks and the seed of the random start; PGD's step size is eps / 4.
        test: images that were not used in any other way.
        checks: to write into the result.

    Returns:
        The result that was written.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        FileNotFoundError: if the folder lacks the weights, or was deleted or replaced during the test.
        ValueError: if the weights are from another epoch, or there is no test image.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from sparse_adv import data, training
        >>> images = data.Split(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> model, config = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), TrainConfig("natural", epochs=1, eps=0.1)
        >>> folder = Path(tempfile.mkdtemp())
        >>> records = training.train(model, data.Batches(images, 4), config, folder=folder)
        >>> result = final_test(model, folder, records, config, images)
        >>> result.tested, sorted(result.test)
        ('last', ['clean', 'fgsm', 'pgd-20'])
    """
    folder = Path(folder)
    lock = hold(folder)
    best = runs.best(records, config)
    epoch, path = (records[-1], folder / runs.LAST) if best is None else (best, folder / runs.BEST)
    weights, metadata = read_weights(path)
    if metadata.get("epoch") != epoch.epoch:
        raise ValueError(
            f"{str(path)!r} must hold the weights of epoch {epoch.epoch} to test them, got those of epoch "
            f"{metadata.get('epoch')}"
        )
    model.load_state_dict(weights)
    count = f"{len(test.labels):,} " if isinstance(test, Split) else ""
    log.info("%s: testing on %simages: clean, fgsm, pgd-%d", folder, count, TEST_STEPS)
    accuracies = {
        "clean": clean_accuracy(model, test),
        "fgsm": fgsm_accuracy(model, test, eps=config.eps, norm=config.norm, engine=config.engine),
        f"pgd-{TEST_STEPS}": robust_accuracy(
            model, test, eps=config.eps, norm=config.norm, steps=TEST_STEPS, seed=config.seed, engine=config.engine
        ),
    }
    result = TrainResult(
        total=records[-1].total,
        checks=checks or TicketChecks(),
        tested="last" if best is None else "best",
        tested_epoch=epoch.epoch,
        validation_robust_accuracy=epoch.robust_accuracy,
        test={attack: accuracy.fraction for attack, accuracy in accuracies.items()},
    )
    if distributed.rank() == 0:
        lock.check()
        json_files.write(folder / runs.RESULT, result)
    distributed.barrier()
    return result
