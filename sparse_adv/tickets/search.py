"""Ticket search: cheap training finds a mask, and the weights return to where they began."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv import masks, runs
from sparse_adv.config import PruneConfig
from sparse_adv.masks.dependency_graph import channel_groups
from sparse_adv.nn import densify, sparsify
from sparse_adv.runs import Record
from sparse_adv.tickets import checks
from sparse_adv.tickets.early_stop import MaskWatch
from sparse_adv.training import TrainConfig, distributed, train
from sparse_adv.training.checkpoint import read_weights, write_weights
from sparse_adv.training.evaluation import Images
from sparse_adv.training.loop import Batches

log = logging.getLogger(__name__)

INITIAL = "initial.safetensors"
REWIND = "rewind.safetensors"


def search(
    model: nn.Module,
    batches: Batches,
    train_config: TrainConfig,
    prune_config: PruneConfig | None = None,
    *,
    validation: Images | None = None,
    folder: Path | str | None = None,
    about: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Record], object] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> masks.Ticket:
    """Find a boosting ticket: train dense and cheaply, prune, go back to the start.

    With a folder, a search that was stopped continues when called again, and a finished one returns at once.

    Args:
        model: a dense model at its initial state; the search ends with the model there again, BatchNorm included.
        batches, validation, on_step: see `training.train`.
        train_config: the training of each round; the paper takes a small constant learning rate without warm-up.
        prune_config: how to prune; None for the paper's, one-shot to density 0.2. With `permute_channels`
            the ticket's weights are the initial ones in another order of channels: the same function.
        folder: see `training.train`; each round has a folder in it.
        about: JSON data for the ticket's provenance, such as network and data; the search adds its own.
        on_epoch: see `training.train`; epochs are counted through all rounds.

    Returns:
        The ticket: masks, the weights to begin with, and as provenance both configurations, epochs, seconds,
        multiply-adds and the checks that were made. `tickets.restore(model, ticket, shape)` makes the sparse network.

    Raises:
        ValueError: if `prune_config` does not fit the model, before any training, or the folder holds another search.

    Source: Li et al., "Towards practical lottery ticket hypothesis for adversarial training" (arXiv 2003.05733),
    section 3.1; without the defects of its code.
    """
    prune_config = prune_config or PruneConfig()
    # What pruning would refuse it refuses now, not after the training. (A callable may need what training leaves.)
    _prune(model, replace(prune_config, score="magnitude") if callable(prune_config.score) else prune_config, 1)
    where = None if folder is None else Path(folder)
    if where is not None and distributed.rank() == 0 and not (where / runs.FACTS).exists():
        runs.begin(where, {"recipe": asdict(train_config), "rule": asdict(prune_config.named())})
    distributed.barrier()
    if where is not None and (where / runs.TICKET).exists():
        return _finished(where, train_config, prune_config)
    return _Search(model, batches, train_config, prune_config, validation, where, on_epoch, on_step).run(
        dict(about or {})
    )


class _Search:
    """A search in progress: what its rounds hand on."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        train_config: TrainConfig,
        prune_config: PruneConfig,
        validation: Images | None,
        folder: Path | None,
        on_epoch: Callable[[Record], object] | None,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self.model, self.batches, self.train_config, self.prune_config = model, batches, train_config, prune_config
        self.validation, self.folder, self.on_epoch, self.on_step = validation, folder, on_epoch, on_step
        self.input_shape = _input_shape(model, batches) if prune_config.permute_channels else None
        self.initial = self._kept(INITIAL, model.state_dict())
        self.start: dict[str, Tensor] | None = None if prune_config.rewind_step else self.initial
        if folder is not None and (folder / REWIND).exists():
            self.start = read_weights(folder / REWIND)[0]
        self.found: dict[str, Tensor] = {}
        self.records: list[Record] = []
        self.seconds, self.multiply_adds = 0.0, 0
        self.checks: dict[str, Any] = {}

    def run(self, about: dict[str, Any]) -> masks.Ticket:
        for number in range(1, self.prune_config.rounds + 1):
            self._round(number)
        densify(self.model)
        start = self._start()
        self.model.load_state_dict(start)
        self.checks |= checks.reset(self.model, start)
        self.model.load_state_dict(self.initial)
        log.info(
            "ticket that keeps %.1f %% of the weights found in %.1f s", 100 * masks.density(self.found), self.seconds
        )
        ticket = masks.Ticket(self.found, start, about | self._provenance())
        if self.folder is not None:
            if distributed.rank() == 0:
                masks.save_ticket(self.folder / runs.TICKET, *_parts(ticket))
            distributed.barrier()
            ticket = masks.load_ticket(self.folder / runs.TICKET)
        return ticket

    def _round(self, number: int) -> None:
        """Train, prune, and remember what for; a finished round is read from its file."""
        folder = self.folder / f"round_{number}" if self.folder is not None else None
        if folder is not None and (folder / runs.TICKET).exists():
            ticket = masks.load_ticket(folder / runs.TICKET)
            self.found, self.start, told = ticket.masks, ticket.state_dict, ticket.provenance
            self.records, self.checks = told["epochs"], told["checks"]
            self.seconds, self.multiply_adds = told["seconds"], told["multiply_adds"]
            return
        self.model.load_state_dict(self.initial if number == 1 else self._start())
        sparsify(self.model, self.found)
        done, watch = list(self.records), MaskWatch(self.prune_config.early_stop_distance, folder)

        def after_epoch(record: Record) -> bool:
            record = {**record, "epoch": len(done) + record["epoch"], "round": number}
            settled = watch.settled(record["epoch"], lambda: _prune(self.model, self.prune_config, number))
            if watch.distance is not None:
                record["mask_distance"] = watch.distance
            self._remember(record)
            return settled

        train(
            self.model,
            self.batches,
            self.train_config,
            validation=self.validation,
            folder=folder,
            before=(self.seconds, self.multiply_adds),
            on_epoch=after_epoch,
            on_step=self._at_step if number == 1 else self.on_step,
        )
        begin = time.perf_counter()
        if self.input_shape and number == 1:
            order = _channel_permutation(self.model, self.prune_config, self.input_shape)
            order.apply(self.model)
            self.start = order.reorder(self._start())
            self.checks |= {"retained": list(order.retained)}
        start = self._start()
        new = _prune(self.model, self.prune_config, number)
        self.seconds = self.records[-1]["seconds"] + time.perf_counter() - begin
        self.multiply_adds = self.records[-1]["multiply_adds"]
        self.checks |= checks.pruned_weights_are_zero(self.model, self.found)
        self.checks |= checks.nested(new, self.found) | checks.density(new, self.prune_config, number)
        self.found = new
        if folder is not None:
            if distributed.rank() == 0:
                masks.save_ticket(folder / runs.TICKET, *_parts(masks.Ticket(self.found, start, self._provenance())))
            distributed.barrier()

    def _at_step(self, step: int) -> None:
        if step == self.prune_config.rewind_step:
            if self.folder is not None and distributed.rank() == 0:
                (self.folder / REWIND).unlink(missing_ok=True)  # of an epoch that was undone or cut off
            self.start = self._kept(REWIND, self.model.state_dict())
        if self.on_step:
            self.on_step(step)

    def _start(self) -> dict[str, Tensor]:
        """The weights that each round, and the ticket, goes back to."""
        if self.start is None:
            raise ValueError(
                f"rewind_step must come before the first round ends, got {self.prune_config.rewind_step}: it made "
                f"{self.records[-1]['step']} updates"
            )
        return self.start

    def _kept(self, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of the weights, or those of an earlier call that was stopped: the file decides."""
        if self.folder is None:
            return copy.deepcopy(dict(state_dict))
        path = self.folder / name
        if distributed.rank() == 0 and not path.exists():
            write_weights(path, state_dict, {})
        distributed.barrier()
        return read_weights(path)[0]

    def _remember(self, record: Record) -> None:
        self.records = [*self.records[: record["epoch"] - 1], record]
        if self.folder is not None and distributed.rank() == 0:
            runs.write_records(self.folder / runs.EPOCHS, self.records)
        if self.on_epoch:
            self.on_epoch(record)

    def _provenance(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.train_config),
            "rule": asdict(self.prune_config.named()),
            "epochs": self.records,
            "seconds": self.seconds,
            "multiply_adds": self.multiply_adds,
            "checks": self.checks,
        }


def _prune(model: nn.Module, config: PruneConfig, number: int) -> dict[str, Tensor]:
    """The masks at the end of a round, counted from 1."""
    return masks.prune(
        model,
        density=config.density_of_round(number),
        block=config.block,
        scope=config.scope,
        score=config.score,
        linear=config.linear,
    )


def _channel_permutation(model: nn.Module, config: PruneConfig, shape: Sequence[int]) -> masks.ChannelOrder:
    """The order of a trained dense model's channels in which the last round's blocks hold the most of its scores."""
    return masks.gather_channels(
        model, config.density, config.block, shape, scope=config.scope, score=config.score, linear=config.linear
    )


def _input_shape(model: nn.Module, batches: Batches) -> tuple[int, ...] | None:
    """The shape of one image, None if there is none; raises ValueError before any training if tracing fails."""
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws when it is iterated
        batch = next(iter(batches), None)
    if batch is None:
        return None
    shape = (1, *batch[0].shape[1:])
    channel_groups(model, shape)
    return shape


def _finished(folder: Path, train_config: TrainConfig, prune_config: PruneConfig) -> masks.Ticket:
    """The ticket that is there, if it was searched for in this way."""
    ticket = masks.load_ticket(folder / runs.TICKET)
    asked = json.loads(json.dumps({"recipe": asdict(train_config), "rule": asdict(prune_config.named())}))
    for name, wanted in asked.items():
        if ticket.provenance.get(name) != wanted:
            raise ValueError(f"{folder} holds the ticket of another {name}: take another folder, or delete it")
    return ticket


def _parts(ticket: masks.Ticket) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    return ticket.masks, ticket.state_dict, ticket.provenance
