"""The end of a run: the one look at the test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparse_adv import runs
from sparse_adv.config import TrainConfig
from sparse_adv.runs import Record
from sparse_adv.training import distributed
from sparse_adv.training.checkpoint import read_weights
from sparse_adv.training.evaluation import Images, clean_accuracy, fgsm_accuracy, robust_accuracy

TEST_STEPS = 20


def conclude(
    model: nn.Module,
    folder: Path,
    records: Sequence[Record],
    config: TrainConfig,
    test: Images | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Test the best weights of a finished run, those of the best epoch on held-out images, and write its result.

    Args:
        model: takes the best weights, and keeps them.
        folder: the run's; it gets `result.json`, which says that the run is finished.
        records: see `training.train`.
        config: gives ball and seed of the test attacks: FGSM, and PGD-20 of step size eps / 4.
        test: images that nothing of the run has seen; None tests nothing.
        facts: more JSON data for the result.

    Returns:
        The result: "seconds", "multiply_adds", "best_epoch", "best_robust_accuracy" and "test" by attack, and `facts`.
    """
    best = folder / runs.BEST
    weights, told = read_weights(best if best.exists() else folder / runs.LAST)
    model.load_state_dict(weights)
    result = {
        "seconds": records[-1]["seconds"],
        "multiply_adds": records[-1]["multiply_adds"],
        "tested": "best" if best.exists() else "last",
        "best_epoch": told["epoch"],
        "best_robust_accuracy": told.get("robust_accuracy"),
        **facts,
    }
    if test is not None:
        result["test"] = {
            "clean": clean_accuracy(model, test),
            "fgsm": fgsm_accuracy(model, test, eps=config.eps, norm=config.norm),
            f"pgd-{TEST_STEPS}": robust_accuracy(
                model, test, eps=config.eps, norm=config.norm, steps=TEST_STEPS, seed=config.seed
            ),
        }
    if distributed.rank() == 0:
        runs.write_json(folder / runs.RESULT, result)
    distributed.barrier()
    return result
