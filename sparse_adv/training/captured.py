"""The device work of an update as CUDA graphs: the host launches them without running the update's Python code.

An update is two graphs that are launched one after the other: crafting the images, and the training step on them. There
are two because the seconds of the attack and of the rest are recorded separately. Values that differ from update to
update are copied into the graphs' memory: the batch, the Philox key of the random start and the numbers of the
schedules.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_adv.attacks.cuda_graph import is_frozen, key_of_batch, key_of_model
from sparse_adv.engine.model_state import has_global_hooks, has_hooks, structure_of
from sparse_adv.engine.reads import all_contents_of
from sparse_adv.nn.optimizer_hook import own_hooks
from sparse_adv.ops.cuda_graph import CallCache, warn_of_refusal
from sparse_adv.training import distributed
from sparse_adv.training.costs import Stopwatch
from sparse_adv.training.hook import UpdateHook
from sparse_adv.training.objectives import TrainingObjective, state_of
from sparse_adv.training.sgd import Numbers, is_fused

if TYPE_CHECKING:
    from sparse_adv.training.update import Updater


_MISSES = 16
"""After this many updates in a row without one that is like an earlier one, capturing is given up."""


class CapturedUpdates:
    """Captures and replays the updates of a run; where that is impossible, one warning says why.

    Args:
        updater: makes the updates.
        cache: holds the captured calls.
        wanted: whether to capture at all.
    """

    def __init__(self, updater: Updater, cache: CallCache, wanted: bool) -> None:
        self._updater, self._cache, self._wanted = updater, cache, wanted
        self._misses = 0
        self._repeated: set[Hashable] = set()
        """The kinds of update that were captured, also with masks or a state that no longer exist."""

    def run(
        self,
        objective: TrainingObjective,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None,
        numbers: Numbers,
        watch: Stopwatch,
    ) -> tuple[Tensor, Tensor] | None:
        """Make an update and return its loss and number of correct images, or None if updates are not captured.

        Args:
            objective, x, y, watch: as in `Updater.update`.
            noise: Philox key and offset of the random start, on the CPU.
            numbers: of this update.
        """
        updater = self._updater
        if not self._wanted or not self._cache.captures_on(updater.device):
            return None
        what = f"updates of this {type(updater.model).__name__}"
        kind = objective.variant, key_of_batch(x, y)
        call = self._cache.find(*self._key(kind, objective, numbers))
        self._misses = 0 if call.has_run else self._misses + 1
        if not call.has_run and (reason := _reason_against(updater, self._misses)):
            if distributed.rank() == 0:
                warn_of_refusal(what, reason)
            self._wanted = False
            return None
        adv = x

        def craft(x: Tensor, y: Tensor, noise: Tensor | None, packed: Tensor) -> Tensor:
            nonlocal adv
            adv = updater.craft(objective, x, y, noise)
            return adv

        def learn(x: Tensor, y: Tensor, noise: Tensor | None, packed: Tensor) -> tuple[Tensor, Tensor]:
            return updater.learn(objective, x, adv, y, updater.device_numbers.unpacked(packed, numbers))

        inputs = x, y, noise, updater.device_numbers.packed(numbers)
        stages = {"attack": craft, "update": learn}
        at_once = kind in self._repeated
        result: tuple[Tensor, Tensor] = self._cache.run(
            call, what, stages, inputs, updater.device, watch.phase, at_once
        )
        if call.replays:
            self._repeated.add(kind)
        # After a capture, gradients lie in the pool, where other graphs write; before a replay they are from an older
        # update.
        updater.optimizer.zero_grad()
        if call.reason:
            self._give_up()
        return result

    def forget(self) -> None:
        """Delete all graphs, because their model, optimiser or masks no longer exist."""
        self._cache.clear()

    def _give_up(self) -> None:
        self._wanted = False
        self._updater.restart_scaler()  # the capture may have failed in the middle of a step

    def _key(self, kind: Hashable, objective: TrainingObjective, numbers: Numbers) -> tuple[Hashable, object]:
        """Everything that the code of an update depends on, and the objects whose ids and addresses are in it."""
        updater = self._updater
        of_model, keep_alive = key_of_model(updater.model, updater.device.type)
        state = state_of(objective)
        parameters = list(updater.model.parameters())
        others = [*_tensors_of(updater), *state.values()]
        key = (
            (id(objective), tuple(state)),
            kind,
            of_model,
            structure_of(updater.model),
            all_contents_of(updater.model),
            tuple((p.requires_grad, len(p._backward_hooks or ()), _accumulation_hooks(p)) for p in parameters),
            tuple((tensor.data_ptr(), tensor.shape) for tensor in others),
            None if updater.device_numbers.has_momentum else numbers.momentum,
            tuple(group["weight_decay"] for group in updater.optimizer.param_groups),
            updater.awp_gamma,
        )
        return key, (objective, keep_alive, parameters, others)


def _tensors_of(updater: Updater) -> Iterator[Tensor]:
    """The tensors that an update writes besides the model: the optimiser's state and the moving average."""
    for state in updater.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    if updater.ema is not None:
        yield from updater.ema.module.parameters()
        yield from updater.ema.module.buffers()


def _accumulation_hooks(parameter: Tensor) -> int:
    return len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())


def _reason_against(updater: Updater, misses: int) -> str | None:
    """Why the updates cannot be captured, if that is known before the attempt."""
    hook, model = updater.hook, updater.model
    if distributed.world_size() > 1:
        return "the gradients are averaged over processes"
    if hook.reads_gradients and type(hook).after_update is not UpdateHook.after_update:
        return (
            f"{type(hook).__name__}.after_update may read gradients; if not, set its attribute reads_gradients = False"
        )
    if not is_fused(updater.optimizer):
        return "a parameter has gaps in its memory, for which PyTorch's fused SGD is wrong"
    if updater.config.schedule == "onecycle" and updater.scaler.is_enabled():
        return "the schedule onecycle changes the momentum at every update, which float16 may skip"
    if is_frozen(model):
        return "its weights are frozen"
    if misses == _MISSES:
        return (
            f"each of {misses} updates differs from all before, in the shape of its batch or in what the modules hold"
        )
    if has_global_hooks():
        return "there are hooks for all modules, whose Python code a replay does not run"
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"module {name!r} has hooks, whose Python code a replay does not run"
    for name, parameter in model.named_parameters():
        if len(parameter._backward_hooks or ()) > own_hooks(parameter) or _accumulation_hooks(parameter):
            return f"parameter {name!r} has hooks, whose Python code a replay does not run"
    return None
