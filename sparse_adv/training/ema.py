"""An exponential moving average of the weights of a model in training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparse_adv.nn.masked_layer import MaskedLayer


class EMA(AveragedModel):
    """Moving average of weights and floating buffers: after each update, theta' <- d theta' + (1 - d) theta.

    After t updates d is min(decay, t / (t + 9)): the first average is the weights after the first update, and the
    average always covers the last tenth of the updates or less. With d = 0.9995 from the start, the first weights would
    still make up 61 % of it after 1,000 updates. If 1 / (1 - decay) is small compared with the number of updates, the
    end result is the same as without this warm-up.

    BatchNorm's running statistics are averaged too, as in the FastAT Benchmark. Differences from `AveragedModel`: an
    update never makes the host wait for a GPU. Other buffers are copied only by `copy_buffers`, and only if they
    differ, because masked layers recompile a mask after a write to it.

    Args:
        model: the model to follow; `module` is the average.
        decay: in [0, 1).

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization" (UAI 2018), section 3,
    there with equal weights; the warm-up is that of `tf.train.ExponentialMovingAverage(num_updates=t - 1)`.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = EMA(model, decay=0.75)
        >>> for updates, value in ((0, 1.0), (999, 5.0)):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.move(model, average.share(updates))
        >>> average.module.weight.item()  # 0.75 * 1 + 0.25 * 5
        2.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay

    def share(self, updates: int) -> float:
        """The share of the present weights, 1 - d, in the update after this many updates."""
        return 1 - min(self.decay, updates / (updates + 9))

    @torch.no_grad()
    def move(self, model: nn.Module, share: float | Tensor) -> None:
        """Move the average towards the present weights and floating buffers by this share of the way.

        A share that is a tensor [] gives the same bits, and may differ in each replay of a CUDA graph. On CUDA it needs
        a kernel for each tensor; a number needs one for many tensors.
        """
        own, present = _averaged(self.module), _averaged(model)
        if isinstance(share, Tensor):
            shares = {dtype: share.to(dtype) for dtype in {tensor.dtype for tensor in own}}
            torch._foreach_lerp_(own, present, [shares[tensor.dtype] for tensor in own])
        else:
            torch._foreach_lerp_(own, present, share)

    def count(self) -> None:
        """Count an update on the CPU, because a replay of what `move` launches on a GPU does not run `move`."""
        self.n_averaged += 1

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Copy the buffers that are not averaged, such as masks, where they differ; waits for a GPU."""
        for (name, own), followed in zip(self.module.named_buffers(), model.buffers(), strict=True):
            if own.is_floating_point() or own.equal(followed):
                continue
            place, _, buffer = name.rpartition(".")
            layer = self.module.get_submodule(place)
            if isinstance(layer, MaskedLayer) and buffer == "weight_mask":
                layer.set_mask(followed.clone())  # compiled code would not see a write to the buffer
            else:
                own.copy_(followed)


def _averaged(model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
