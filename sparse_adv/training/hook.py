"""The interface of methods that change the network during training; `sparse_adv.methods` has such methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sparse_adv.runs import EpochRecord

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from sparse_adv.training.update import Updater


class UpdateHook:
    """Called during a training run; this class does nothing. Pass a subclass to `train`.

    Attributes:
        reads_gradients: whether `after_update` reads the gradients in `.grad`. If so, updates are not captured as CUDA
            graphs, because these leave no gradients.
        config: the settings that decide the hook's result, a dataclass or a dict. They are written to `run.json` with
            the name of the class; a run with other settings is not continued. Other attributes are not compared.
    """

    wants_robust_loss: bool = False
    """Whether `after_epoch` needs `EpochRecord.robust_loss`; evaluations then attack every validation image."""
    reads_gradients: bool = True
    config: DataclassInstance | dict[str, Any] | None = None

    def begin(self, updater: Updater) -> None:
        """Called at the start of a run, before the optimiser and the moving average of the weights are made.

        A hook that is reused for another run must reset its own state here.

        Args:
            updater: of the run. It has `model`, `config` and `device`; in later calls also `optimizer` and `ema` (None
                without a moving average).
        """

    def wants_dense_gradients(self, step: int) -> bool:
        """Return whether the update after `step` others must also compute the gradients of pruned weights."""
        return False

    def after_update(self, step: int, gradients: Mapping[str, Tensor]) -> bool:
        """Called after an update; it may change the model, its optimiser's state and its moving average.

        Modules that it sets to eval mode stay in eval mode. It may freeze and unfreeze parameters, but not in a run of
        several processes.

        Args:
            step: number of updates made, including this one.
            gradients: the gradients that `nn.dense_gradients` collected on this process, if wanted. With float16 they
                contain the factor of the loss scale.

        Returns:
            Whether passes through the network now cost more or less than before.
        """
        return False

    def may_be_result(self) -> bool:
        """Return whether this epoch may be the result of the run; the best epoch is chosen among those that may.

        Called at the end of each epoch, before `after_epoch`; the result must be the same on all processes. A method
        that prunes during training returns False until it is done.
        """
        return True

    def after_epoch(self, record: EpochRecord) -> None:
        """Called after each epoch, between its evaluation and its saving; not for an epoch that is undone.

        It may change what `after_update` may; the epoch's record describes the network before the change.

        Args:
            record: of the epoch; the same on all processes except for seconds and device.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that updates change, besides the states of model, optimiser and moving average.

        It consists of tensors, numbers, text, and dicts, lists and tuples of these. It is saved after each epoch, and
        loaded when the run continues or an epoch is undone. In a run of several processes, the state of rank 0 is
        saved.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from this state; the model, the optimiser and the moving average have been loaded."""
