"""Run folders with numbers made up: what the tests of run folders and of reports share."""

from sparse_adv import runs
from sparse_adv.runs import Cost, EpochRecord

FILES = (
    *(runs.RESULT, runs.INFO, runs.EPOCHS, runs.STATE, runs.LAST, runs.BEST, runs.LOCK, runs.IDENTITY, runs.TICKET),
    *("initial.safetensors", "rewind.safetensors", "config.yaml", "result_2.json"),
)
"""Names of the files that a run may write to its folder."""


def epoch_record(epoch: int, **fields) -> EpochRecord:
    """The record of an epoch of 10 s: 8 s of attacks, 2 s of updates; 1 s of evaluation is not counted."""
    defaults = {
        "step": 10 * epoch,
        "learning_rate": 0.1,
        "loss": 1.5,
        "images": 100,
        "device": "cpu",
        "total": Cost(10.0 * epoch, 500_000 * epoch),
        "attack": Cost(8.0, 400_000),
        "update": Cost(2.0, 100_000),
        "evaluation": Cost(1.0, 50_000),
    }
    return EpochRecord(epoch, **(defaults | fields))
