"""Ticket search: train cheaply, prune, and rewind the weights."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_adv import json_files, masks, runs
from sparse_adv.argument_types import checks_types
from sparse_adv.config import PruneConfig, TrainConfig
from sparse_adv.json_files import JSONObject
from sparse_adv.masks.algebra import of_distinct_weights
from sparse_adv.nn import densify, mac_density, sparsify
from sparse_adv.nn.masked_layer import masked_layers
from sparse_adv.runs import NO_COST, Cost, Density, EpochRecord, RunInfo, SearchResult, TicketChecks
from sparse_adv.tickets import checks
from sparse_adv.tickets.early_stopping import EarlyStopping
from sparse_adv.tickets.half_resolution import Halved, halved
from sparse_adv.tickets.preconditions import check_fits, image_shape
from sparse_adv.tickets.provenance import SearchRecord, check_metadata, record_of
from sparse_adv.training import distributed, identity, random_numbers, train
from sparse_adv.training.checkpoint import read_state, read_weights, write_state, write_weights
from sparse_adv.training.evaluation import Images, check_evaluable
from sparse_adv.training.folder_lock import FolderLock
from sparse_adv.training.loop import Batches
from sparse_adv.training.modes import frozen_modules, set_training_mode
from sparse_adv.training.run_files import begin

log = logging.getLogger(__name__)


@checks_types
def search(
    model: nn.Module,
    batches: Batches,
    train_config: TrainConfig,
    prune_config: PruneConfig | None = None,
    *,
    validation: Images | None = None,
    folder: Path | str | None = None,
    metadata: JSONObject | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> masks.Ticket:
    """Find a ticket: train the dense model cheaply, prune it, and return to the initial weights or keep the trained
    ones.

    With a folder, a stopped search continues when it is called again, and a finished one returns at once.

    Args:
        model: a dense model with its initial weights; after the search it has them again, including BatchNorm.
        batches, validation, on_step: as in `training.train`.
        train_config: of the training in each round; the paper uses a small constant learning rate without warm-up.
        prune_config: of the pruning; None for the paper's, one-shot to density 0.2.
        folder: as in `training.train`; it gets a folder for each round, and at the end `ticket.safetensors` and
            `result.json`.
        metadata: JSON object for the ticket's provenance, such as network and data; a `SearchRecord` is added to it.
        on_epoch: called with the record of each epoch after it is saved; epochs are counted through all rounds.

    Returns:
        The ticket; `tickets.restore(model, ticket, images)` makes the sparse network. Its weights are those before the
        first update, or after update `rewind_step`, or with `keep_weights` those at the end of the last round, always
        with the statistics of BatchNorm. They are never the moving average that `ema_decay` asks for. With
        `permute_channels` their channels have another order, in which the network computes the same function.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        FileNotFoundError: if an unfinished round in the folder has epochs, but not the state to continue from, or if
            the folder was deleted or replaced during the search.
        ValueError: before any training, if the model has masks, `prune_config` does not fit it, `metadata` are not JSON
            data or have a key of `SearchRecord`, or the folder holds another search: one with other settings, initial
            weights or images.
        TicketInvariantError: if an invariant of `tickets.checks` does not hold.

    Source: Li et al., "Towards practical lottery ticket hypothesis for adversarial training" (arXiv 2003.05733),
    section 3.1, without the defects of its code; Chen et al., "Sparsity winning twice" (ICLR 2022), section 3, for
    kept weights (Robust Bird).

    Examples:
        >>> from sparse_adv import data
        >>> images = data.Split(torch.rand(8, 1, 4, 4), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> train_config = TrainConfig("fgsm-rs", epochs=1, eps=0.1)
        >>> ticket = search(model, data.Batches(images, 4), train_config, PruneConfig(density=0.25))
        >>> masks.density(ticket.masks)  # of 36 + 32 weights
        0.25
    """
    prune_config = prune_config or PruneConfig()
    check_metadata(metadata or {})
    shape = check_fits(model, batches, train_config, prune_config)
    seen = halved(validation) if prune_config.half_resolution else validation
    if seen is not None:
        check_evaluable("validation", seen, model)
    folder = None if folder is None else Path(folder).absolute()
    if folder is None or not (folder / runs.IDENTITY).exists():  # a search that began here may have left its masks
        _check_dense(model)
    lock = begin(folder, RunInfo("search", train_config, prune_config.named(), world_size=distributed.world_size()))
    if folder is not None:
        _check_same(folder, model, identity.of_run(model, batches, validation, train_config.seed))
    if folder is not None and (folder / runs.TICKET).exists():
        ticket = _finished(folder, train_config, prune_config)
    else:
        images = Halved(batches) if prune_config.half_resolution else batches
        run = _Search(model, images, train_config, prune_config, seen, shape, folder, lock, on_epoch, on_step)
        with identity.training_of(model, folder):
            ticket = run.run(metadata or {})
    if folder is not None:
        _write_result(folder, lock, ticket, model, batches)
    return ticket


class _Search:
    """A search in progress; the arguments are those of `search`, and the shape [1, C, H, W] of images, if known."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        train_config: TrainConfig,
        prune_config: PruneConfig,
        validation: Images | None,
        shape: tuple[int, ...] | None,
        folder: Path | None,
        lock: FolderLock,
        on_epoch: Callable[[EpochRecord], object] | None,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self.model, self.batches, self.train_config, self.prune_config = model, batches, train_config, prune_config
        self.validation, self.folder, self.on_epoch, self.on_step = validation, folder, on_epoch, on_step
        self.shape, self.lock = shape, lock
        self.frozen = frozen_modules(model)
        self.initial = self._first_version(runs.INITIAL, model.state_dict())
        self._begin: dict[str, Tensor] | None = None if prune_config.rewind_step else self.initial
        if folder is not None and (folder / runs.REWIND).exists():
            self._begin = read_weights(folder / runs.REWIND)[0]
        self.masks: dict[str, Tensor] = {}
        self.records: list[EpochRecord] = []
        self.cost = NO_COST
        self.checks = TicketChecks()

    def run(self, metadata: JSONObject) -> masks.Ticket:
        for number in range(1, self.prune_config.rounds + 1):
            self._round(number)
        densify(self.model)
        start = self._start()
        if not self.prune_config.keep_weights:
            self.model.load_state_dict(start)
            checks.check_reset(self.model, start)
            self.checks = replace(self.checks, reset=True)
        self.model.load_state_dict(self.initial)
        provenance = self._provenance()
        log.debug("found a ticket of density %.3f in %.1f s", provenance["density"], self.cost.seconds)
        ticket = masks.Ticket(self.masks, start, provenance | metadata)
        return self._saved(ticket, self.folder)

    def _round(self, number: int) -> None:
        """Train, then prune; if an earlier call finished the round, read it from its ticket."""
        folder = self.folder / f"round_{number}" if self.folder is not None else None
        if folder is not None and (folder / runs.TICKET).exists():
            return self._restore(folder)
        self.model.load_state_dict(self.initial if number == 1 else self._start())
        sparsify(self.model, self.masks)
        self._train(number, folder)
        begin = time.perf_counter()
        if self.prune_config.permute_channels and self.shape and number == 1:
            order = _channel_permutation(self.model, self.prune_config, self.shape)
            order.apply(self.model)
            self._begin = order.permute_state_dict(self._start())
            self.checks = replace(self.checks, retained=order.retained)
        if self.prune_config.keep_weights:
            trained = self.model.state_dict()
            self._begin = {key: trained[key].clone() for key in self.initial}  # without the masks
        start = self._start()
        new = _prune(self.model, self.prune_config, number, self.masks)
        self.cost = self.records[-1].total + Cost(seconds=time.perf_counter() - begin)
        checks.check_pruned_weights(self.model, self.masks)
        checks.check_nested(new, self.masks)
        weights, kept, requested = checks.check_density(of_distinct_weights(new, self.model), self.prune_config, number)
        self.checks = replace(
            self.checks,
            pruned_weights_zero=True,
            nested=True,
            weights=weights,
            weights_kept=kept,
            weights_requested=requested,
        )
        self.masks = new
        self._saved(masks.Ticket(new, start, self._provenance()), folder)

    def _train(self, number: int, folder: Path | None) -> None:
        """Train for a round, and keep the records of its epochs."""
        done = len(self.records)
        stopping = EarlyStopping(self.prune_config.early_stop_distance, folder)

        def after_epoch(record: EpochRecord) -> bool:
            epoch = done + record.epoch
            stop = stopping.should_stop(epoch, lambda: _prune(self.model, self.prune_config, number, self.masks))
            self._remember(replace(record, epoch=epoch, round=number, mask_distance=stopping.distance))
            return stop

        set_training_mode(self.model, self.frozen)
        train(
            self.model,
            self.batches,
            self.train_config,
            validation=self.validation,
            folder=folder,
            before=self.cost,
            on_epoch=after_epoch,
            on_step=self._at_step if number == 1 else self.on_step,
        )

    def _at_step(self, step: int) -> None:
        if step == self.prune_config.rewind_step:
            if self.folder is not None and distributed.rank() == 0:
                self.lock.check()
                # An existing file is from an epoch that was undone or never finished.
                (self.folder / runs.REWIND).unlink(missing_ok=True)
            state = copy.deepcopy(dict(self.model.state_dict()))
            names = [name for name, buffer in self.model.named_buffers() if buffer.is_floating_point()]
            # During an epoch each process has the statistics of its own images.
            distributed.average_each([state[name] for name in names if name in state])
            self._begin = self._first_version(runs.REWIND, state)
        if self.on_step:
            self.on_step(step)

    def _start(self) -> dict[str, Tensor]:
        """The weights at the beginning of each round after the first, and of the ticket's training."""
        if self._begin is None:  # an early stop, or fewer updates where an epoch of `free` was undone
            step = self.prune_config.rewind_step
            raise ValueError(f"rewind_step must be an update of the first round, which did not make it, got {step}")
        return self._begin

    def _first_version(self, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Write weights to a file and return a copy; if an earlier call wrote the file, return the file's weights."""
        if self.folder is None:
            return copy.deepcopy(dict(state_dict))
        path = self.folder / name
        if distributed.rank() == 0 and not path.exists():
            self.lock.check()
            write_weights(path, state_dict, {})
        distributed.barrier()
        return read_weights(path)[0]

    def _remember(self, record: EpochRecord) -> None:
        self.records = [*self.records[: record.epoch - 1], record]
        if self.folder is not None and distributed.rank() == 0:
            self.lock.check()
            json_files.write_lines(self.folder / runs.EPOCHS, self.records)
        if self.on_epoch:
            self.on_epoch(record)

    def _provenance(self) -> JSONObject:
        record = SearchRecord(self.train_config, self.prune_config.named(), self.records, self.cost, self.checks)
        return {"density": masks.density(self.masks, self.model), **json_files.to_json(record)}

    def _restore(self, folder: Path) -> None:
        """Continue after the round of this folder."""
        ticket = masks.load_ticket(folder / runs.TICKET)
        record = record_of(ticket, folder / runs.TICKET)
        self.masks, self._begin = ticket.masks, ticket.state_dict
        self.records, self.cost, self.checks = record.epochs, record.cost, record.checks
        if (folder / runs.STATE).exists():  # a DataLoader's own generator continues from it
            state = read_state(folder / runs.STATE, torch.device("cpu"), ["generators"])
            random_numbers.load_states(self.batches, state["generators"][distributed.rank()], self.model)

    def _saved(self, ticket: masks.Ticket, folder: Path | None) -> masks.Ticket:
        """The ticket, read back from the folder after rank 0 has written it."""
        if folder is None:
            return ticket
        if distributed.rank() == 0:
            self.lock.check()
            masks.save_ticket(folder / runs.TICKET, ticket)
        distributed.barrier()
        return masks.load_ticket(folder / runs.TICKET)


def _prune(
    model: nn.Module, config: PruneConfig, number: int, before: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The masks at the end of a round (counted from 1), within the masks of the round before."""
    return masks.prune(
        model,
        density=config.density_of_round(number),
        block=config.block,
        scope=config.scope,
        score=config.score,
        linear=config.linear,
        within=before,
    )


def _channel_permutation(model: nn.Module, config: PruneConfig, shape: Sequence[int]) -> masks.ChannelPermutation:
    """The order of a trained dense model's channels with which the blocks of the last round keep the highest scores."""
    return masks.permute_channels(
        model, config.density, config.block, shape, scope=config.scope, score=config.score, linear=config.linear
    )


def _write_result(folder: Path, lock: FolderLock, ticket: masks.Ticket, model: nn.Module, batches: Batches) -> None:
    """Write `result.json`, with the densities for images of full size."""
    shape = image_shape(batches)
    assert shape is not None
    density = Density(masks.density(ticket.masks, model), mac_density(model, ticket.masks, shape))
    if distributed.rank() == 0:
        record = record_of(ticket)
        lock.check()
        json_files.write(folder / runs.RESULT, SearchResult(record.cost, record.checks, density))
    distributed.barrier()


def _check_dense(model: nn.Module) -> None:
    if masked := list(masked_layers(model)):
        raise ValueError(f"model must be dense, got a mask in {masked[0]!r}: call densify(model) first")


def _check_same(folder: Path, model: nn.Module, own: identity.Identity) -> None:
    """Raises ValueError if the folder holds a search of another network or other images; describes a new search."""
    path = folder / runs.IDENTITY
    if not path.exists():
        of_ranks = distributed.collect(own)
        if distributed.rank() == 0:
            write_state(path, {"identity": of_ranks})
        distributed.barrier()
        return
    of_ranks = read_state(path, torch.device("cpu"), ["identity"])["identity"]
    begun: identity.Identity = of_ranks[distributed.rank()]
    if identity.was_interrupted(model, folder):  # in the middle of a round, when the network has masks
        own = own | {"network": begun["network"]}
    identity.check_same(folder, own, begun, model)


def _finished(folder: Path, train_config: TrainConfig, prune_config: PruneConfig) -> masks.Ticket:
    """The ticket in the folder, if a search with these configurations found it."""
    ticket = masks.load_ticket(folder / runs.TICKET)
    record = record_of(ticket, folder / runs.TICKET)
    train = replace(record.train, graphs=train_config.graphs)
    if (train, record.prune) != (train_config, prune_config.named()):
        name = "training" if train != train_config else "pruning"
        raise ValueError(f"{folder} holds a ticket of another {name} configuration: take another folder, or delete it")
    return ticket
