"""The training loop: any classifier of images in [0, 1], on any iterable of batches; knows no mask."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv import runs
from sparse_adv.attacks import Graphs
from sparse_adv.attacks.checks import InputValidator
from sparse_adv.config import TrainConfig
from sparse_adv.nn import CommStats
from sparse_adv.runs import Record
from sparse_adv.training import distributed, objectives
from sparse_adv.training.checkpoint import read_state, write_state, write_weights
from sparse_adv.training.costs import Costs, densities
from sparse_adv.training.devices import reads_at_once, wants_channels_last
from sparse_adv.training.ema import EMA
from sparse_adv.training.evaluation import Accuracy, Images, clean_accuracy, device_of, robust_accuracy
from sparse_adv.training.overfitting import OverfittingMonitor
from sparse_adv.training.sharing import share_gradients
from sparse_adv.training.stopwatch import Stopwatch

log = logging.getLogger(__name__)

Batches = Iterable[tuple[Tensor, Tensor]]
PHASES = ("attack", "update", "evaluation")
ORDER_SEED, NOISE_SEED = 1, 2


class Training:
    """A run in progress: what `train` and `epochs` are made of. All processes of a distributed run make one each."""

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        config: TrainConfig,
        *,
        validation: Images | None = None,
        folder: Path | None = None,
        before: tuple[float, int] = (0.0, 0),
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        if not isinstance(batches, Sized):
            raise TypeError(
                f"batches must have a length and be iterable once an epoch (a list, a DataLoader, data.Batches), got "
                f"{type(batches).__name__}"
            )
        if not len(batches):
            raise ValueError("batches must hold at least one batch, got none")
        self.model, self.batches, self.config, self.validation = model, batches, config, validation
        self.folder, self.on_step = folder, on_step
        self.device = device_of(model)
        self.records: list[Record] = []
        self.seconds: float = before[0]
        self.multiply_adds: int = before[1]
        self.best: dict[str, Any] = {}
        self.step = 0
        self.graphs = Graphs()
        self.validator: InputValidator | None = InputValidator(deferred=not reads_at_once(self.device))
        self.objective = objectives.build(config, graphs=self.graphs)
        self.steps_per_epoch = len(batches) * self.objective.updates
        self.channels_last = wants_channels_last(self.device, config.precision)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        watched = config.overfitting_monitor and config.objective != "natural" and validation is not None
        self.guard = (
            OverfittingMonitor.over(validation, config, self.graphs) if watched and validation is not None else None
        )
        self.wrapped = model
        self.comm_stats: CommStats | None = None
        self.costs: Costs | None = None
        self.densities: dict[str, float | None] = {}
        self._restore()

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one if the config averages."""
        return self.model if self.ema is None else self.ema.module

    def epochs(self) -> Iterator[Record]:
        """The records of the epochs, first those that were there, then each as soon as it is trained and safe."""
        yield from list(self.records)
        while len(self.records) < self.config.epochs:
            self.records.append(self._healthy_epoch(len(self.records)))
            self._save()
            yield self.records[-1]

    def _healthy_epoch(self, epoch: int) -> Record:
        """Train an epoch; one that collapses is undone and trained again with PGD."""
        undone: dict[str, float] = {}
        while True:
            start = copy.deepcopy(self._moving_state()) if self.guard else {}
            record = self._train_epoch(epoch)
            probe = self._probe(record)
            if self.guard is None or probe is None or not self.guard.collapsed(probe):
                self._account(record)
                return record | undone
            told = f"from {self.guard.best:.1%} to {probe:.1%}"
            log.warning("epoch %d: robustness collapsed (%s); undone, trained again with PGD", epoch + 1, told)
            for phase in ("attack", "update"):
                self.seconds += record[f"{phase}_seconds"]
                self.multiply_adds += record[f"{phase}_multiply_adds"]
            self._load_moving_state(start)
            undone = {"rolled_back": True, "undone_accuracy": float(probe)}

    def _train_epoch(self, epoch: int) -> Record:
        config, objective = self.config, self.objective
        if self.guard and self.guard.pgd_epochs:
            objective = objectives.build(replace(config, objective="pgd", alpha=None), graphs=self.graphs)
        watch = Stopwatch(self.device)
        noise = torch.Generator().manual_seed(distributed.own_seed(config.seed, NOISE_SEED, epoch))
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)
        loss_sum, images = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.train()
        # Whatever an iterable or a layer draws from the global generators follows from seed and epoch too.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(distributed.own_seed(config.seed, ORDER_SEED, epoch))
            for x, y in self.batches:
                x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
                if self.channels_last and x.dim() == 4:
                    x = x.to(memory_format=torch.channels_last)
                if self.costs is None:
                    with self._autocast():
                        self.costs = Costs(self.model, x)
                    self.densities = densities(self.model, x)
                if self.validator is not None:
                    y = self.validator.check(x, y, self.costs.classes)
                if distributed.world_size() > 1 and self.comm_stats is None:
                    with self._autocast():
                        self.wrapped, self.comm_stats = share_gradients(self.model, x)
                for _ in range(objective.updates):
                    loss_sum += self._update(objective, x, y, noise, watch) * len(y)
                    images += len(y)
        if self.validator is not None:
            self.validator.raise_deferred()
            self.validator = None  # every batch has been looked at once
        # The schedule goes by whole epochs, also after one of PGD in a run of "free", which makes fewer updates.
        self.step = (epoch + 1) * self.steps_per_epoch
        self.model.eval()
        distributed.average_buffers(self.model)
        if self.ema is not None:
            self.ema.copy_buffers(self.model)
        loss, seen = distributed.all_reduce_sum([float(loss_sum), float(images)], self.device)
        images = int(seen)
        if not math.isfinite(loss):
            rate = self.optimizer.param_groups[0]["lr"]
            raise FloatingPointError(f"training diverged in epoch {epoch + 1} (loss {loss / images}) at lr {rate:g}")
        seconds = watch.seconds()
        assert self.costs is not None
        attack, update = self.costs.training(objective.passes)
        record: Record = {
            "epoch": epoch + 1,
            "step": self.step,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "loss": loss / images,
            "images": images,
            "attack_seconds": seconds.get("attack", 0.0),
            "update_seconds": seconds.get("update", 0.0),
            "attack_multiply_adds": attack * images,
            "update_multiply_adds": update * images,
        }
        if self.comm_stats is not None:
            record |= {"bytes_sent": self.comm_stats.bytes_sent, "bytes_dense": self.comm_stats.bytes_dense}
        return record

    def _update(
        self, objective: objectives.Natural, x: Tensor, y: Tensor, noise: torch.Generator, watch: Stopwatch
    ) -> Tensor:
        """One step of the optimiser; returns the loss, still on the device."""
        config = self.config
        with watch.phase("attack"), self._autocast():
            adv = objective.craft(self.model, x, y, noise)
        with watch.phase("update"):
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate(self.step, self.steps_per_epoch)
            self.optimizer.zero_grad()
            with self._autocast():
                loss = objective.loss(self.wrapped, x, adv, y)
            self.scaler.scale(loss).backward()
            if config.max_grad_norm:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            objective.after_update()
            if self.ema is not None:
                self.ema.follow(self.model, first=self.step == 0)
            self.step += 1
            if self.on_step:
                self.on_step(self.step)
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _probe(self, record: Record) -> Accuracy | None:
        """Evaluate if it is time, and look whether the epoch has collapsed."""
        config, model = self.config, self.evaluated
        watch, spent = Stopwatch(self.device), []
        with watch.phase("evaluation"):
            probe = self.guard.measure(model) if self.guard else None
            last = record["epoch"] == config.epochs
            if self.validation is not None and (last or record["epoch"] % config.evaluate_every == 0):
                clean = clean_accuracy(model, self.validation)
                robust = robust_accuracy(
                    model,
                    self.validation,
                    eps=config.eps,
                    norm=config.norm,
                    steps=config.evaluation_steps,
                    seed=config.seed,
                    graphs=self.graphs,
                )
                record |= {"clean_accuracy": float(clean), "robust_accuracy": float(robust)}
                spent += [clean, robust]
        if probe is not None:
            record["guard_accuracy"] = float(probe)
            spent.append(probe)
        assert self.costs is not None
        record |= {
            "evaluation_seconds": watch.seconds().get("evaluation", 0.0),
            "evaluation_multiply_adds": self.costs.evaluation(spent),
        }
        return probe

    def _account(self, record: Record) -> None:
        """Add the epoch to the running totals, and remember it if it is the best."""
        self.seconds += record["attack_seconds"] + record["update_seconds"]
        self.multiply_adds += record["attack_multiply_adds"] + record["update_multiply_adds"]
        record |= {"seconds": self.seconds, "multiply_adds": self.multiply_adds, **self.densities}
        measure = "clean_accuracy" if self.config.objective == "natural" else "robust_accuracy"
        if record.get(measure, -1.0) > self.best.get(measure, -1.0):
            self.best = {key: record[key] for key in ("epoch", "clean_accuracy", "robust_accuracy")}

    def _moving_state(self) -> dict[str, Any]:
        """All that an epoch changes, but for the guard, which remembers an epoch that was undone."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "objective": self.objective.state_dict(),
        }

    def _load_moving_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.objective.load_state_dict(state["objective"])

    def _save(self) -> None:
        """Make the epoch safe: the one file of the state decides, all others can be made from it."""
        if self.folder is None:
            return
        objectives = distributed.collect(self.objective.state_dict())
        if distributed.rank() == 0:
            if self.best.get("epoch") == len(self.records):
                write_weights(self.folder / runs.BEST, self.evaluated.state_dict(), self.records[-1])
            write_state(
                self.folder / runs.STATE,
                {
                    "recipe": asdict(self.config),
                    "records": self.records,
                    "best": self.best,
                    "totals": [self.seconds, self.multiply_adds],
                    "guard": self.guard.state_dict() if self.guard else None,
                    **self._moving_state(),
                    "objective": objectives,
                },
            )
            self._publish()
        distributed.barrier()

    def _publish(self) -> None:
        assert self.folder is not None
        runs.write_records(self.folder / runs.EPOCHS, self.records)
        write_weights(self.folder / runs.LAST, self.evaluated.state_dict(), self.records[-1])

    def _restore(self) -> None:
        """Continue where the folder's state stands, if there is one."""
        if self.folder is None:
            return
        path = self.folder / runs.STATE
        if not path.exists():
            return
        state = read_state(path, self.device)
        if state["recipe"] != asdict(self.config):
            raise ValueError(f"{self.folder} holds a run of another configuration: take another folder, or delete it")
        if len(state["objective"]) != distributed.world_size():
            raise ValueError(
                f"{self.folder} holds a run of {len(state['objective'])} processes, got {distributed.world_size()}: "
                "start as many"
            )
        self._load_moving_state(state | {"objective": state["objective"][distributed.rank()]})
        self.records, self.best = state["records"], state["best"]
        self.seconds, self.multiply_adds = state["totals"]
        if self.guard:
            self.guard.load_state_dict(state["guard"])
        self.model.eval()
        if distributed.rank() == 0:
            self._publish()
        log.info("%s: %d of %d epochs are done", self.folder, len(self.records), self.config.epochs)


def train(
    model: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    validation: Images | None = None,
    folder: Path | str | None = None,
    before: tuple[float, int] = (0.0, 0),
    on_epoch: Callable[[Record], object] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Record]:
    """Train a model in place, with SGD, on the images that the config's objective crafts.

    With a folder the run can be stopped at any moment, kill -9 included: the same call continues after the last whole
    epoch, and on a CPU ends with the same weights, bit for bit. Under `torchrun` (see `training.distributed.group`)
    each process passes its own part of the batches.

    Args:
        model: any classifier of images [N, C, H, W] in [0, 1]; it ends in eval mode.
        batches: (float images in [0, 1], int64 labels), iterable once an epoch, with a length: `data.Batches`, a
            DataLoader, a list. If it has `set_epoch(epoch)`, that is called before each epoch.
        config: everything else.
        validation: held-out images, a `data.Split` or batches, for the evaluations, the choice of the best epoch and
            the collapse guard; without it there are none of these.
        folder: where to keep records, weights and state (`sparse_adv.runs`); None keeps nothing.
        before: seconds and multiply-adds already spent on this run, by a ticket search.
        on_epoch: called with the record of each epoch as soon as it is safe, in a continued run first with the
            records that were there; if it returns True, training ends.
        on_step: called after each update with the number of updates so far.

    Returns:
        A record per epoch: "epoch" (from 1), "step", "learning_rate", "loss" (mean, on the crafted images), "images",
        "seconds" and "multiply_adds" (of attacks and updates so far, `before` included), for each phase "attack",
        "update" and "evaluation" its own "_seconds" and "_multiply_adds" (executed ones), "density" of the weights of
        convolutions and linear layers and "multiply_add_density" of their work; where evaluated "clean_accuracy" and
        "robust_accuracy"; "guard_accuracy" where guarded, "rolled_back" where an epoch had to be undone.

    Raises:
        FloatingPointError: if the loss is no longer a number; the folder keeps what was safe.
        CatastrophicOverfittingError: if robustness is lost and PGD cannot keep it.
        ValueError: if the folder holds another run.
    """
    where = None if folder is None else Path(folder)
    if where is not None and distributed.rank() == 0 and not (where / runs.FACTS).exists():
        runs.begin(where, {"recipe": asdict(config)})
    training = Training(model, batches, config, validation=validation, folder=where, before=before, on_step=on_step)
    records = []
    for record in training.epochs():
        records.append(record)
        if on_epoch and on_epoch(record) is True:
            break
    return records
