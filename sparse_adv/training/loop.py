"""The training loop: any classifier of images in [0, 1], any iterable of batches.

It needs no masks: a dense model trains in the same way. Three functions that training calls treat masked layers
differently: the count of MACs (`nn.count_macs`), the all-reduce of gradients (`nn.register_masked_allreduce_hook`) and
the gradients of pruned weights (`nn.dense_gradients`), which it computes only if an `UpdateHook` asks for them.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.attacks import Graphs
from sparse_adv.attacks.checks import InputValidator, reads_at_once
from sparse_adv.config import SINGLE_STEP, MethodConfig, TrainConfig
from sparse_adv.masks.layers import device_of
from sparse_adv.ops.cudnn_benchmark import fastest_convolutions
from sparse_adv.runs import NO_COST, Cost, EpochRecord, RunInfo
from sparse_adv.training import distributed, identity, objectives, random_numbers
from sparse_adv.training.checks import check_batch_sizes, check_trainable, count_batches, first_pass, pairs_of
from sparse_adv.training.costs import NetworkCosts, Stopwatch, Tally
from sparse_adv.training.evaluation import Accuracy, Images, check_evaluable, clean_accuracy, robust_accuracy
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.modes import set_training_mode
from sparse_adv.training.overfitting import OverfittingMonitor
from sparse_adv.training.random_numbers import Stream
from sparse_adv.training.run_files import RunFiles, begin, resume
from sparse_adv.training.update import Updater
from sparse_adv.training.user_code import described

log = logging.getLogger(__name__)

Batches = Iterable[tuple[Tensor, Tensor]]


class _Trained(NamedTuple):
    """The results of the training of an epoch."""

    loss: float
    correct: int
    """Number of crafted images of the updates that the model classified correctly."""
    images: int
    attack: Cost
    update: Cost


class _Evaluated(NamedTuple):
    """The results of the evaluations after an epoch; None for an evaluation that was not made."""

    clean: Accuracy | None
    robust: Accuracy | None
    monitor: Accuracy | None
    cost: Cost


class Training:
    """A run in progress, epoch by epoch; `train` runs it to its end. Each process of a distributed run makes one.

    Args:
        model, batches, config, validation, folder, before, hook, objective: as in `train`.

    Attributes:
        records: of the epochs so far.
        evaluated: the model that is evaluated and saved: the moving average of the weights if `config` asks for one.
        monitor: the overfitting monitor; None if it is turned off, if there are no validation images, and for
            objectives that are not single-step.

    Raises:
        FileNotFoundError: if the folder has epochs of a run, but not the state to continue from.
        TypeError: if the batches have no length.
        ValueError: if there is no batch, the hook needs validation images and there are none, the processes of a run
            have different configurations or numbers of batches, or the folder holds another run: one with another
            configuration (more epochs are allowed), another network or other images.

    Examples:
        >>> from sparse_adv import data
        >>> images = data.Split(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> training = Training(model, data.Batches(images, 4), TrainConfig("natural", epochs=2))
        >>> [record.step for record in training.epochs()]
        [2, 4]
    """

    @checks_types
    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        *,
        validation: Images | None = None,
        folder: Path | str | None = None,
        before: Cost = NO_COST,
        hook: UpdateHook | None = None,
        objective: Callable[..., objectives.TrainingObjective] | None = None,
    ) -> None:
        self.batches, self.config, self.validation = batches, config, validation
        self.folder = None if folder is None else Path(folder).absolute()
        check_trainable(model)
        if validation is not None:
            check_evaluable("validation", validation, model)
        distributed.check_same(**{**asdict(config), "graphs": None, "len(batches)": count_batches(batches)})
        self.device = device_of(model)
        self.graphs = Graphs()
        self.hook = UpdateHook() if hook is None else hook
        if self.hook.wants_robust_loss and validation is None:
            raise ValueError("validation must have images, because the method follows the loss on them, got None")
        self.updater = Updater(model, config, count_batches(batches), self.device, self.graphs, self.hook, objective)
        self.evaluated = self.updater.evaluated
        self.monitor: OverfittingMonitor | None = None
        if config.overfitting_monitor and config.objective in SINGLE_STEP and validation is not None:
            self.monitor = OverfittingMonitor(validation, config, self.graphs)
        self.validator: InputValidator | None = InputValidator(deferred=not reads_at_once(self.device))
        self.costs: NetworkCosts | None = None
        self.first_batch: Tensor | None = None  # on the meta device
        self.total = before
        self.records: list[EpochRecord] = []
        self.files: RunFiles | None = None
        if self.folder is not None:
            own = identity.of_run(model, batches, validation, config.seed, hook is not None)
            self.files = RunFiles(self.folder, config, batches, self.updater, self.monitor, own)
            self.records = self.files.restore()
        if self.records:
            self.total = self.records[-1].total
            model.eval()

    def epochs(self, on_step: Callable[[int], None] | None = None) -> Iterator[EpochRecord]:
        """Yield the records of the epochs: first those of an earlier call, then each new one after it is trained and
        saved.

        Args:
            on_step: called after each update with the number of updates so far.
        """
        yield from list(self.records)
        with identity.training_of(self.updater.model, self.folder):
            while len(self.records) < self.config.epochs:
                with fastest_convolutions(self.device):
                    record = self._epoch(len(self.records), on_step)
                self.records.append(record)
                self.hook.after_epoch(record)
                if type(self.hook).after_epoch is not UpdateHook.after_epoch:
                    self.costs = None  # it may have changed the network
                if self.files is not None:
                    self.files.save(self.records)
                yield record

    def _epoch(self, epoch: int, on_step: Callable[[int], None] | None) -> EpochRecord:
        """Train and evaluate an epoch, counted from 0; undo and repeat it if the monitor detects overfitting."""
        undone: float | None = None
        while True:
            start = copy.deepcopy(self.updater.state_dict()) if self.monitor else None
            trained = self._train(epoch, on_step)
            evaluated = self._evaluate(epoch)
            self.total += trained.attack + trained.update
            measured = evaluated.monitor
            if self.monitor is None or measured is None:
                return self._record(epoch, trained, evaluated, undone)
            density = None if self.costs is None else self.costs.density
            if not self.monitor.must_undo(measured.fraction, 1.0 if density is None else density.weights):
                self.monitor.warn_of_weak_attack(measured.fraction, trained.correct / trained.images)
                return self._record(epoch, trained, evaluated, undone)
            log.warning(
                "epoch %d: catastrophic overfitting (accuracy under attack fell from %.1f %% to %.1f %%); "
                "the epoch is undone and repeated with PGD",
                epoch + 1,
                100 * self.monitor.best,
                100 * measured.fraction,
            )
            assert start is not None
            self.updater.load_state_dict(start)
            self.costs = None  # a hook may have changed the network in the epoch
            undone = measured.fraction

    def _train(self, epoch: int, on_step: Callable[[int], None] | None) -> _Trained:
        config, updater = self.config, self.updater
        objective = updater.objective
        if self.monitor is not None and self.monitor.pgd_epochs:
            objective = objectives.build(replace(config, objective="pgd", alpha=None), graphs=self.graphs)
        objective.begin_epoch(epoch)
        watch = Stopwatch(self.device)
        generator = torch.Generator().manual_seed(distributed.own_seed(config.seed, Stream.ATTACKS, epoch))
        random_numbers.set_epoch(self.batches, epoch)
        loss_sum, tally = torch.zeros((), dtype=torch.float64, device=self.device), Tally()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        set_training_mode(updater.model, updater.frozen)
        # Batches and layers that draw from the global generators get numbers that depend only on seed and epoch.
        with random_numbers.seeded(distributed.own_seed(config.seed, Stream.BATCHES, epoch), self.device):
            for x, y in pairs_of(self.batches):
                if not len(y):
                    raise ValueError("batches must have images in each batch, got one without any")
                x, y = updater.to_device(x, y)
                costs = self._costs_for(x)
                if self.validator is not None:
                    y = self.validator.check(x, y, costs.classes)
                if updater.step == 0:
                    check_batch_sizes(updater.model, self.batches, x)
                updater.prepare(x)
                for _ in range(objective.updates):
                    updated = updater.update(objective, x, y, generator, watch)
                    loss_sum += updated.loss * len(y)
                    correct += updated.correct
                    tally.add(len(y), costs, updated.passes)
                    if updated.new_costs:
                        self.costs = None
                        costs = self._costs_for(x)
                    if on_step:
                        on_step(updater.step)
        if self.validator is not None:
            self.validator.raise_deferred()
            self.validator = None  # all batches were validated once
        updater.end_epoch(epoch)
        (total_loss, total_correct), images = tally.summed([float(loss_sum), float(correct)], self.device)
        loss = total_loss / images
        self._check_finite(epoch, loss)
        attack = Cost(watch.seconds("attack"), tally.attack())
        update = Cost(watch.seconds("update"), tally.update())
        return _Trained(loss, int(total_correct), images, attack, update)

    def _check_finite(self, epoch: int, loss: float) -> None:
        """Raise FloatingPointError if training has diverged."""
        are_finite = [p.isfinite().all() for p in self.updater.model.parameters() if p.requires_grad]
        if not math.isfinite(loss):
            what = f"loss {loss}"
        elif not all(torch.stack(are_finite).tolist() if are_finite else ()):
            what = "weights are not finite"
        else:
            return
        raise FloatingPointError(f"training diverged in epoch {epoch + 1}: {what} at lr {self.updater.learning_rate:g}")

    def _costs_for(self, x: Tensor) -> NetworkCosts:
        """The costs for batches as large as the first, measured at first and whenever they change; the host waits for a
        GPU.

        A smaller last batch may run other kernels.
        """
        if self.costs is None:
            if self.first_batch is None:
                self.first_batch = torch.empty_like(x, device="meta")
            with self.updater.autocast(), first_pass(x), random_numbers.seeded(0, self.device):
                self.costs = NetworkCosts(self.updater.model, torch.zeros_like(self.first_batch, device=x.device))
        return self.costs

    def _evaluate(self, epoch: int) -> _Evaluated:
        config, model = self.config, self.evaluated
        clean = robust = monitor = None
        watch = Stopwatch(self.device)
        with watch.phase("evaluation"):
            if self.monitor is not None:
                monitor = self.monitor.measure(self.updater.model)
            due = (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs
            if self.validation is not None and due:
                clean = clean_accuracy(model, self.validation)
                robust = robust_accuracy(
                    model,
                    self.validation,
                    eps=config.eps,
                    norm=config.norm,
                    steps=config.evaluation_steps,
                    seed=config.seed,
                    graphs=self.graphs,
                    engine=config.engine,
                    every_image=self.hook.wants_robust_loss,
                )
        measured = [accuracy for accuracy in (clean, robust, monitor) if accuracy is not None]
        assert self.costs is not None
        cost = Cost(watch.seconds("evaluation"), self.costs.evaluation(measured))
        return _Evaluated(clean, robust, monitor, cost)

    def _record(self, epoch: int, trained: _Trained, evaluated: _Evaluated, undone: float | None) -> EpochRecord:
        assert self.costs is not None
        sent = None if self.updater.exchange is None else self.updater.exchange.stats
        clean, robust, monitor = evaluated.clean, evaluated.robust, evaluated.monitor
        return EpochRecord(
            epoch=epoch + 1,
            step=self.updater.step,
            learning_rate=self.updater.learning_rate,
            loss=trained.loss,
            images=trained.images,
            device=str(self.updater.device),
            total=self.total,
            attack=trained.attack,
            update=trained.update,
            evaluation=evaluated.cost,
            density=self.costs.density,
            may_be_result=bool(self.hook.may_be_result()),
            clean_accuracy=None if clean is None else clean.fraction,
            robust_accuracy=None if robust is None else robust.fraction,
            robust_loss=None if robust is None or not math.isfinite(robust.loss or 0.0) else robust.loss,
            train_accuracy=trained.correct / trained.images,
            monitor_accuracy=None if monitor is None else monitor.fraction,
            undone_accuracy=undone,
            bytes_sent=None if sent is None else sent.bytes_sent,
            bytes_dense=None if sent is None else sent.bytes_dense,
        )


@checks_types
def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    validation: Images | None = None,
    folder: Path | str | None = None,
    before: Cost = NO_COST,
    hook: UpdateHook | None = None,
    objective: Callable[..., objectives.TrainingObjective] | None = None,
    on_epoch: Callable[[EpochRecord], object] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[EpochRecord]:
    """Train a model in place, with SGD, on the images that the configured objective crafts.

    With a folder the run can be stopped at any moment, even by kill -9: the same call continues after the last whole
    epoch, and on a CPU ends with the same weights, bit for bit; on a GPU only under `training.deterministic()`. A call
    with more epochs extends the run; from there on, the schedule is that of the new number of epochs. Under `torchrun`
    (see `training.distributed.group`) each process passes its own part of the batches.

    Code that draws from the global generators of PyTorch, NumPy and Python gets numbers that depend only on
    `config.seed` and the epoch. So do workers of a DataLoader, unless they are persistent. Generators of a DataLoader
    or its sampler, and torch generators of modules, are saved with the run. If a loader, data set, transform or module
    has other generators, these are not saved, and a log message says so.

    Args:
        model: any classifier of images [N, C, H, W] in [0, 1]; after training it is in eval mode. Modules in eval mode
            inside a model in training mode, such as a frozen BatchNorm, stay in eval mode.
        batches: (float images in [0, 1], int64 labels), with a length, iterated once an epoch: `data.Batches`, a
            DataLoader, a list. Before each epoch `set_epoch(epoch)` is called if the batches, or a DataLoader's sampler
            or data set, have this method.
        config: the hyperparameters.
        validation: a `data.Split` or batches of images that are not trained on. They are needed for evaluations, to
            choose the best epoch and for the overfitting monitor.
        folder: where to write records, weights and state, see `sparse_adv.runs`; None to write nothing.
        before: cost of the ticket search that the run builds on.
        hook: a method that changes the network during training, such as `methods.SparseTraining`, or your own code.
        objective: a subclass of `TrainingObjective`, or a function that makes an objective from the same arguments;
            None for `config.objective`. Even with your own objective, `config.objective` decides the defaults of alpha
            and beta, whether there is an overfitting monitor, and which accuracy selects the best epoch.
        on_epoch: called with the record of each epoch after it is saved; epochs of an earlier call come first. If it
            returns True in any process, training ends in all processes of the run.
        on_step: called after each update with the number of updates so far. After an update that was replayed as a CUDA
            graph, gradients are None.

    Returns:
        A record per epoch.

    Raises:
        BlockingIOError: if another process or thread writes to the folder.
        FileNotFoundError: if the folder has epochs of a run, but not the state to continue from, or if it was deleted
            or replaced during the run.
        FloatingPointError: if the loss or a weight is not finite; the folder keeps the earlier epochs.
        TypeError: if the batches have no length or wrong dtypes, the validation images can be iterated only once, the
            model returns anything but logits, `objective` does not make an objective, or the settings of hook or
            objective are neither a dataclass nor a dict.
        ValueError: if a batch has values out of range, the last one has one image and BatchNorm cannot take it, these
            settings hold values that JSON cannot, or the folder holds another run: one with another configuration,
            network, hook, objective, other initial weights or other images.

    Examples:
        >>> from sparse_adv import data
        >>> images = data.Split(torch.rand(8, 1, 2, 2), torch.arange(8) % 2)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> records = train(model, data.Batches(images, 4), TrainConfig("natural", epochs=3), validation=images)
        >>> [record.epoch for record in records], 0 <= records[-1].robust_accuracy <= 1
        ([1, 2, 3], True)
    """
    folder = None if folder is None else Path(folder)
    info = RunInfo("train", config, world_size=distributed.world_size(), before=before)
    if folder is not None and hook is not None:
        if isinstance(hook.config, MethodConfig):
            info = replace(info, method=hook.config, block=hook.config.block)
        else:
            info = replace(info, hook=described("hook.config", hook, hook.config))
    if folder is not None and objective is not None:
        own = objectives.build(config, own=objective)
        info = replace(info, objective=described("objective.settings", own, own.settings))
    lock = begin(folder, info)
    training = Training(
        model, batches, config, validation=validation, folder=folder, before=before, hook=hook, objective=objective
    )
    del lock  # `training` holds it
    resume(folder, info)
    records = []
    for record in training.epochs(on_step):
        records.append(record)
        ends = None if on_epoch is None else on_epoch(record)
        if any(distributed.collect(isinstance(ends, bool | np.bool_) and bool(ends))):
            break
    return records
