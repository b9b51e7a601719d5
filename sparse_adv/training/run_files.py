"""The files of a run, written by rank 0: its settings, and the state, records and weights after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_adv import json_files, runs
from sparse_adv.config import TrainConfig
from sparse_adv.runs import EpochRecord, RunInfo, best
from sparse_adv.training import distributed, identity, random_numbers
from sparse_adv.training.checkpoint import damaged, read_state, write_state, write_weights
from sparse_adv.training.folder_lock import FolderLock, hold
from sparse_adv.training.objectives import state_of
from sparse_adv.training.overfitting import OverfittingMonitor
from sparse_adv.training.update import Updater

log = logging.getLogger(__name__)


def begin(folder: Path | None, info: RunInfo) -> FolderLock:
    """Lock a run's folder, and write its settings or check that it holds a run with the same settings, see
    `runs.begin`.

    Args:
        folder: of the run; None for a run that writes nothing.
        info: of the run.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        ValueError: if it holds another run.
    """
    lock = hold(folder)
    if folder is not None and distributed.rank() == 0:
        runs.begin(folder, info)
    distributed.barrier()
    return lock


def resume(folder: Path | None, info: RunInfo) -> None:
    """Update the settings in a folder that is known to hold this run, see `runs.resume`."""
    if folder is not None and distributed.rank() == 0:
        runs.resume(folder, info)
    distributed.barrier()


class RunFiles:
    """State, records and weights in a run's folder; each process of a distributed run makes one, and rank 0 writes.

    Args:
        folder: of the run.
        config: of the run.
        batches: of this process; the states of their generators are saved.
        updater, monitor: of the run; their states are saved.
        own: what `identity.of_run` returned on this process.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        batches: Iterable[tuple[Tensor, Tensor]],
        updater: Updater,
        monitor: OverfittingMonitor | None,
        own: identity.Identity,
    ) -> None:
        self.folder, self.config, self.batches, self.updater, self.monitor = folder, config, batches, updater, monitor
        self.identity = own
        self.lock = hold(folder)
        random_numbers.warn_of_unsaved(batches, updater.model)

    def save(self, records: list[EpochRecord]) -> None:
        """Write all files, the state first: a run continues after the state's epoch, and `restore` rewrites the other
        files.

        Raises:
            FileNotFoundError: if the folder was deleted or replaced, see `folder_lock`.
        """
        of_ranks = distributed.collect(
            {
                "objective": {key: tensor.cpu() for key, tensor in state_of(self.updater.objective).items()},
                "identity": self.identity,
                "generators": random_numbers.states_of(self.batches, self.updater.model),
            }
        )
        if distributed.rank() == 0:
            self.lock.check()
            write_state(
                self.folder / runs.STATE,
                {
                    "config": asdict(self.config),
                    "records": [json_files.to_json(record) for record in records],
                    "monitor": self.monitor.state_dict() if self.monitor else None,
                    **self.updater.state_dict(),
                    "environment": identity.environment(self.updater.device),
                    "identity": [own["identity"] for own in of_ranks],
                    "generators": [own["generators"] for own in of_ranks],
                    "objective": [own["objective"] for own in of_ranks],
                },
            )
            self._write_records_and_weights(records)
        distributed.barrier()

    def restore(self) -> list[EpochRecord]:
        """Load the state in the folder, and return the records of the epochs up to it; none if there is no state.

        Raises:
            FileNotFoundError: if there are epochs without a state.
            ValueError: if the state is damaged, or belongs to another run: one with another configuration (more epochs
                are allowed), another network or other images.
        """
        runs.check_state(self.folder)
        path = self.folder / runs.STATE
        if not path.exists():
            return []
        device = self.updater.device
        keys = "config", "records", "monitor", "environment", "identity", "generators", *self.updater.state_dict()
        state = read_state(path, device, keys)
        try:
            self.identity = identity.check_continues(self.folder, state, self.config, self.identity, self.updater.model)
            records = self._load(path, state)
            identity.warn_of_changes(self.folder, state["environment"], identity.environment(device))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise damaged(path, error) from error
        if distributed.rank() == 0:
            self._write_records_and_weights(records)
        distributed.barrier()
        log.info("%s: %d of %d epochs are done", self.folder, len(records), self.config.epochs)
        return records

    def _load(self, path: Path, state: dict[str, Any]) -> list[EpochRecord]:
        own = distributed.rank()
        records = [json_files.from_json(EpochRecord, record, str(path)) for record in state["records"]]
        if not records:
            raise KeyError("records")
        self.updater.load_state_dict(state | {"objective": state["objective"][own]})
        random_numbers.load_states(self.batches, state["generators"][own], self.updater.model)
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        return records

    def _write_records_and_weights(self, records: list[EpochRecord]) -> None:
        json_files.write_lines(self.folder / runs.EPOCHS, records)
        record, weights = records[-1], self.updater.evaluated.state_dict()
        for name in (runs.LAST, runs.BEST) if record is best(records, self.config) else (runs.LAST,):
            write_weights(self.folder / name, weights, json_files.to_json(record))
