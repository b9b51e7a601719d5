"""Run folders with numbers made up: what the tests of run folders and of reports share."""

from sparse_adv import json_files, runs
from sparse_adv.config import PruneConfig, TrainConfig
from sparse_adv.runs import NO_COST, Cost, Density, EpochRecord, RunInfo, TicketChecks, TrainResult

ATTACK, UPDATE, EVALUATION = Cost(8.0, 400_000), Cost(2.0, 100_000), Cost(1.0, 50_000)

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
        "attack": ATTACK,
        "update": UPDATE,
        "evaluation": EVALUATION,
    }
    return EpochRecord(epoch, **(defaults | fields))


def make(
    folder,
    robust=(0.2, 0.4, 0.5),
    *,
    name=None,
    kind="train",
    objective="pgd",
    weights=1.0,
    before=NO_COST,
    attack=ATTACK,
    update=UPDATE,
    evaluation=EVALUATION,
    epochs=3,
    rounds=1,
    undone_epoch=None,
    test=None,
    ticket=None,
):
    """A run folder with an epoch per accuracy (None: not evaluated); a finished one if there are test accuracies."""
    config, density = TrainConfig(objective, epochs=epochs), Density(weights, weights**0.5)
    prune = PruneConfig(rounds=rounds) if kind == "search" else None
    runs.begin(folder, RunInfo(kind, config, prune, name=name, ticket=ticket, density=density, before=before))
    total, records = before, []
    for epoch, accuracy in enumerate(robust, 1):
        undone = epoch == undone_epoch
        total += attack + update + (attack + update if undone else NO_COST)
        records.append(
            epoch_record(
                epoch,
                total=total,
                attack=attack,
                update=update,
                evaluation=evaluation,
                robust_accuracy=accuracy,
                clean_accuracy=None if accuracy is None else accuracy + 0.25,
                undone_accuracy=0.0 if undone else None,
            )
        )
    json_files.write_lines(folder / runs.EPOCHS, records)
    if test is not None:
        json_files.write(folder / runs.RESULT, TrainResult(total, TicketChecks(), "best", 1, None, test))
    return folder


def read(*folders):
    return [runs.read(folder) for folder in folders]
