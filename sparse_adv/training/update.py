"""One update of training (attack, loss, backward pass, optimiser step) and all the state that updates change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from sparse_adv import engine
from sparse_adv.attacks import Graphs
from sparse_adv.attacks.success import is_correct
from sparse_adv.config import TrainConfig
from sparse_adv.nn import dense_gradients
from sparse_adv.ops.random_start import as_philox_state
from sparse_adv.training import distributed, objectives, sgd
from sparse_adv.training.awp import perturbed_weights, weights_to_perturb
from sparse_adv.training.captured import CapturedUpdates
from sparse_adv.training.checks import count_batches
from sparse_adv.training.costs import Stopwatch
from sparse_adv.training.ema import EMA
from sparse_adv.training.gradient_exchange import GradientExchange
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.modes import frozen_modules, names_in_eval_mode
from sparse_adv.training.objectives import Passes

log = logging.getLogger(__name__)


def updates_of(config: TrainConfig, batches: Iterable[Any]) -> int:
    """Return the number of updates of a training run.

    Raises:
        TypeError: if the batches have no length.
        ValueError: if there is no batch.

    Examples:
        >>> updates_of(TrainConfig("free", epochs=3, replays=4), [(torch.rand(2, 1, 4, 4), torch.arange(2))])
        12
    """
    return config.epochs * count_batches(batches) * objectives.build(config).updates


class Updated(NamedTuple):
    """The results of an update."""

    loss: Tensor
    """A scalar on the device."""
    correct: Tensor
    """Number of crafted images that the model classified correctly; an int64 scalar on the device."""
    passes: Passes
    """The passes that the update took."""
    new_costs: bool
    """Whether passes through the network now cost more or less than before."""


class _Fused(nn.Module):
    """A model as `engine.fuse_for_training` returns it for each batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return engine.fuse_for_training(self.model, x)(x)


class Updater:
    """Updates a model with SGD on the images that an objective crafts.

    Args:
        model: trained in place; on tensor cores with 16-bit precision it becomes channels_last.
        config: of the training.
        batches: number of batches of an epoch.
        device: of the model.
        graphs: CUDA graphs of attacks to use again; graphs of updates are added.
        hook: called at each update.
        objective: makes an objective in place of the configured one, see `train`.

    Attributes:
        step: number of updates made.
        frozen: names of modules that stay in eval mode in training, including those that a hook has set to eval mode.
        trained: the module that the loss calls in place of the model.
        evaluated: the model to evaluate and save: the moving average if the configuration asks for one.
        image_shape: shape [1, C, H, W] of an image; None before the first batch.
        exchange: averages the gradients over processes; None before the first batch and in a run of one process.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        batches: int,
        device: torch.device,
        graphs: Graphs,
        hook: UpdateHook,
        objective: Callable[..., objectives.TrainingObjective] | None = None,
    ) -> None:
        self.model, self.config, self.device, self.hook = model, config, device, hook
        self.objective = objectives.build(config, graphs=graphs, own=objective)
        self.steps_per_epoch = batches * self.objective.updates
        self.step = 0
        self.frozen = frozen_modules(model)
        hook.begin(self)
        if config.awp_gamma:
            weights_to_perturb(model)  # refused before the warm-up, not after it
        if device.type == "cpu" and config.precision == "float16" and distributed.rank() == 0:
            log.warning("precision 'float16' is slow on a CPU: 6 to 60 times as long as float32, as measured")
        self.channels_last = wants_channels_last(device, config.precision)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = sgd.build(model, config)
        self.scaler = self._new_scaler()
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.evaluated = model if self.ema is None else self.ema.module
        self.device_numbers = sgd.DeviceNumbers(
            device,
            wanted=graphs.cache.captures_on(device) and sgd.is_fused(self.optimizer),
            momentum=config.schedule == "onecycle" and not self.scaler.is_enabled(),
        )
        self.captured = CapturedUpdates(self, graphs.cache, config.graphs)
        self.trained: nn.Module = _Fused(model) if config.engine else model
        self.image_shape: tuple[int, ...] | None = None
        self.exchange: GradientExchange | None = None

    def prepare(self, x: Tensor) -> None:
        """Before an update, note the shape of its images; before the first, set up the averaging of gradients over
        processes.

        Args:
            x: a batch from `to_device`; only its shape, dtype and memory layout matter.
        """
        self.image_shape = (1, *x.shape[1:])
        if distributed.world_size() > 1 and self.exchange is None:
            with self.autocast():
                self.exchange = GradientExchange(self.model, self.trained, x)
            self.trained = self.exchange.trained

    def to_device(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch on the model's device, in its memory layout; the host does not wait for the copy."""
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        if self.channels_last and x.dim() == 4:
            x = x.to(memory_format=torch.channels_last)
        return x, y

    def update(
        self, objective: objectives.TrainingObjective, x: Tensor, y: Tensor, generator: Generator, watch: Stopwatch
    ) -> Updated:
        """Make one update.

        Args:
            objective: `self.objective`, or another for this epoch.
            x, y: a batch from `to_device`.
            generator: of the attack's random start.
            watch: gets the seconds of the phases "attack" and "update".
        """
        hook, numbers = self.hook, self._numbers()
        sgd.set_numbers(self.optimizer, numbers.learning_rate, numbers.momentum)
        start = as_philox_state(generator) if objective.draws(x) else None
        collect = hook.wants_dense_gradients(self.step)
        gradients: dict[str, Tensor] = {}
        done = None if collect else self.captured.run(objective, x, y, start, numbers, watch)
        if done is None:
            with watch.phase("attack"):
                adv = self.craft(objective, x, y, start)
            with watch.phase("update"):
                collected = gradients if collect else None
                done = self.learn(objective, x, adv, y, self.device_numbers.of(numbers), collected)
        loss, correct = done
        passes = self._passes(objective, collect)
        objective.count_update()
        if self.ema is not None:
            self.ema.count()
        self.step += 1
        with watch.phase("update"):
            new_costs = hook.after_update(self.step, gradients)
        if new_costs:
            self.captured.forget()
        if self.exchange is not None:
            self.exchange.check_trained()
        return Updated(loss, correct, passes, new_costs)

    def _numbers(self) -> sgd.Numbers:
        step, length = self.step, self.steps_per_epoch
        share = 0.0 if self.ema is None else self.ema.share(step)
        return sgd.Numbers(self.config.learning_rate(step, length), self.config.momentum_of(step, length), share)

    def craft(self, objective: objectives.TrainingObjective, x: Tensor, y: Tensor, noise: Tensor | None) -> Tensor:
        """The images of an update; noise is the Philox state of its random start."""
        with self.autocast():
            return objective.craft(self.model, x, y, noise)

    def learn(
        self,
        objective: objectives.TrainingObjective,
        x: Tensor,
        adv: Tensor,
        y: Tensor,
        numbers: sgd.Numbers,
        collected: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Make the training step of an update; return its loss and the number of images classified correctly.

        If it is given, `collected` gets the gradients of all weights of masked layers.

        A replay of its CUDA graph runs none of this code. So everything that must happen in each update, except changes
        of tensors in place, is done in `update`.
        """
        self.optimizer.zero_grad()
        collecting: AbstractContextManager[dict[str, Tensor]] = nullcontext({})
        if collected is not None:
            collecting = dense_gradients(self.model)
        with self._perturbed(objective, x, adv, y), collecting as gradients:
            with self.autocast(), _counting_correct(self.trained, adv, y) as correct:
                loss = objective.loss(self.trained, x, adv, y)
            self.scaler.scale(loss).backward()
        if collected is not None:
            collected.update(gradients)
        if self.config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        with sgd.reading(self.optimizer, numbers):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        objective.after_update()
        if self.ema is not None:
            self.ema.move(self.model, numbers.share)
        return loss.detach(), correct[-1]

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "float16")

    def restart_scaler(self) -> None:
        """Let an update begin anew after one that failed in the middle, with the present scale of the loss."""
        state, self.scaler = self.scaler.state_dict(), self._new_scaler()
        self.scaler.load_state_dict(state)
        for name in ("grad_scale", "found_inf"):  # the scaler sets these during a step
            vars(self.optimizer).pop(name, None)

    def _passes(self, objective: objectives.TrainingObjective, dense_gradients: bool) -> Passes:
        """The passes of an update with this objective; AWP computes the gradients of kept weights once more."""
        passes = Passes(*objective.passes)
        return passes._replace(
            update=passes.update * (2 if self.awp_gamma else 1),
            dense_gradients=passes.update if dense_gradients else 0,
        )

    def _perturbed(
        self, objective: objectives.TrainingObjective, x: Tensor, adv: Tensor, y: Tensor
    ) -> AbstractContextManager[None]:
        """A context with the weights at which the gradient of an update is computed; without AWP, the model's own."""
        if not self.awp_gamma:
            return nullcontext()

        def loss(model: nn.Module) -> Tensor:
            with self.autocast():
                return self.scaler.scale(objective.loss(model, x, adv, y))

        return perturbed_weights(self.model, loss, self.awp_gamma)

    def end_epoch(self, epoch: int) -> None:
        """Prepare for evaluation: eval mode, and BatchNorm statistics averaged over processes."""
        # The schedule counts whole epochs, even if a run of "free" trained this one with PGD in fewer updates.
        self.step = (epoch + 1) * self.steps_per_epoch
        self.frozen = names_in_eval_mode(self.model)
        self.model.eval()
        distributed.average_buffers(self.model)
        if self.ema is not None:
            distributed.average_buffers(self.ema.module)
            self.ema.copy_buffers(self.model)

    def autocast(self) -> torch.autocast:
        """Return the context of mixed precision; float32 has none."""
        dtype = getattr(torch, self.config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def awp_gamma(self) -> float:
        """Size of the perturbation of the weights in the next update: 0 in the warm-up."""
        config = self.config
        return 0.0 if self.step < config.awp_warmup_epochs * self.steps_per_epoch else config.awp_gamma

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that updates change; its tensors are those in use, not copies."""
        return {
            "step": self.step,
            "frozen": list(self.frozen),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "objective": objectives.state_of(self.objective),
            "hook": (type(self.hook).__qualname__, self.hook.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this state."""
        self.captured.forget()  # the optimiser's state gets other memory
        self.step, self.frozen = state["step"], state["frozen"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.objective.load_state_dict(state["objective"])
        name, of_hook = state["hook"]
        own = type(self.hook).__qualname__
        if name != own and (of_hook or self.hook.state_dict()):
            raise ValueError(f"hook must be of class {name}, as before, got {own}: take another folder, or delete it")
        self.hook.load_state_dict(of_hook)


@contextmanager
def _counting_correct(model: nn.Module, images: Tensor, labels: Tensor) -> Iterator[list[Tensor]]:
    """While the block runs, collect for each forward pass on these images how many are classified correctly."""
    correct: list[Tensor] = []

    def count(model: nn.Module, inputs: tuple[Tensor, ...], logits: object) -> None:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"model must return logits [{len(images)}, classes] in training mode too, "
                f"got a {type(logits).__name__}: leave out what else it returns, such as auxiliary logits"
            )
        if inputs[0] is images:
            correct.append(is_correct(logits.detach(), labels).sum())

    handle = model.register_forward_hook(count)
    try:
        yield correct
    finally:
        handle.remove()
    if not correct:
        raise ValueError("loss must call model(adv), from whose logits the accuracy is counted, and did not")


def wants_channels_last(device: torch.device, precision: str) -> bool:
    """Return whether convolutions run on tensor cores; these need 16-bit images in channels_last.

    Examples:
        >>> wants_channels_last(torch.device("cuda"), "bfloat16"), wants_channels_last(torch.device("cpu"), "bfloat16")
        (True, False)
    """
    return device.type == "cuda" and precision != "float32"
