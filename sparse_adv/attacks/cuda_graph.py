"""Attacks as CUDA graphs: the whole loop is captured once and then replayed with one launch.

Without a graph, each of the few hundred kernels of an attack step waits for Python to launch it. A graph replays the
captured kernels on the captured addresses. It therefore uses the current weights (masking, casting and packing them is
part of the graph), but the batch must be copied into buffers of the graph. No Python code runs in a replay: branches in
a model's code are decided when the graph is captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_adv.attacks.checks import LabelRange, check_label_range
from sparse_adv.attacks.loop import PGDLoop
from sparse_adv.nn import MaskedConv2d
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.ops.cuda_graph import Capturer

Call = Callable[[], Tensor]


@dataclass
class _CachedAttack:
    """An attack that has run before."""

    keep_alive: object
    """Objects whose id or address is part of the key, so that no other object can get the same one."""
    classes: int | None
    buffers: Sequence[Tensor | None] = ()
    """Memory that a replay reads: images, labels and Philox state."""
    replay: Call | None = None
    cannot_be_captured: bool = False


class Graphs:
    """A cache of attacks captured as CUDA graphs; pass one to every call of an attack, `pgd(..., graphs=graphs)`.

    Two attacks have the same graph if all of these are equal: the options, shape and layout of the batch, the modules
    of the model, the addresses of its weights, its masks, and the settings of autocast and of the backends. An attack
    runs step by step the first two times, is captured in the second call and replayed from the third call on; the
    results are the same, bit for bit. A model that cannot be captured, because it reads a number back from the GPU,
    is attacked step by step and a warning says so. On other devices than CUDA all attacks run step by step.

    Forward hooks and other Python code of the model do not run in a replay. A graph keeps the memory for the
    activations of one attack, in addition to PyTorch's cache. All calls must come from the same CUDA stream.

    Args:
        capacity: maximum number of graphs; beyond it the least recently used one is deleted.

    Raises:
        ValueError: if capacity is less than 1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model, graphs = models.build("digits_cnn", width=8), attacks.Graphs()
        >>> for _ in range(3):  # on a GPU the third attack is a replay
        ...     adv = attacks.fgsm(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), graphs=graphs)
    """

    capturer: ClassVar[type[Capturer]] = Capturer

    def __init__(self, capacity: int = 8) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._cache: dict[Hashable, _CachedAttack] = {}
        """The most recently used attack is last."""
        self._capturers: dict[torch.device, Capturer] = {}

    def __repr__(self) -> str:
        return f"Graphs(capacity={self.capacity})"

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return type(self), (self.capacity,)  # graphs cannot be copied or pickled: a copy is an empty cache

    def run(
        self,
        loop: PGDLoop,
        images: Tensor,
        labels: Any,
        philox_state: Tensor | None,
        label_range: LabelRange = None,
    ) -> Tensor:
        """Return what `loop.run` returns, by replaying a graph if possible; the result is always a new tensor."""
        if not self._can_capture(loop, images, labels):
            return loop.run(images, labels, philox_state, label_range)
        keep_alive, key = _key(loop, images, labels, label_range)
        capturer = self._capturers.get(images.device)
        if capturer is None:
            capturer = self._capturers[images.device] = self.capturer(images.device)
        call = partial(loop.run, images, labels, philox_state, label_range)
        cached = self._cache.get(key)
        if cached is None:
            result = capturer.run(call)
            cached = _CachedAttack(keep_alive, loop.classes)
        elif cached.cannot_be_captured:
            result = call()
        elif cached.replay is None:
            result, synchronises = capturer.warm_up(call)
            self._capture(capturer, cached, loop, (images, labels, philox_state), synchronises)
        else:
            if cached.classes is not None:
                check_label_range(label_range, cached.classes)
            for buffer, value in zip(cached.buffers, (images, labels, philox_state), strict=True):
                if buffer is not None:
                    buffer.copy_(value.detach(), non_blocking=True)
            result = cached.replay().clone()
        self._cache.pop(key, None)
        self._cache[key] = cached  # now the last one
        if len(self._cache) > self.capacity:
            del self._cache[next(iter(self._cache))]
        return result

    def _can_capture(self, loop: PGDLoop, images: Tensor, labels: Any) -> bool:
        if images.device.type != self.capturer.device:
            return False
        if not (labels is None or (isinstance(labels, Tensor) and labels.device == images.device)):
            return False
        # Inside the caller's `frozen_weights` the packed weights have addresses that end with that context.
        return not any(isinstance(layer, MaskedLayer) and layer.frozen_operands for layer in loop.model.modules())

    def _capture(
        self,
        capturer: Capturer,
        cached: _CachedAttack,
        loop: PGDLoop,
        batch: Sequence[Tensor | None],
        synchronises: bool,
    ) -> None:
        try:
            if synchronises:
                raise RuntimeError("it synchronises with the GPU")
            cached.buffers = [None if tensor is None else tensor.detach().clone() for tensor in batch]
            images, labels, philox_state = cached.buffers
            assert images is not None
            # Autocast caches casts of weights. The graph must not read casts made before it, which no replay would
            # update, and no later code may read casts made in the capture, which have no values before a replay.
            torch.clear_autocast_cache()
            try:
                cached.replay = capturer.capture(partial(loop.run, images, labels, philox_state))
                cached.keep_alive = cached.keep_alive, loop.gradients
            finally:
                torch.clear_autocast_cache()
        except RuntimeError as error:
            cached.cannot_be_captured, cached.buffers = True, ()
            warnings.warn(
                f"attacks on this {type(loop.model).__name__} run step by step and not as a CUDA graph: "
                f"{_first_cause(error)}",
                stacklevel=5,
            )


def _first_cause(error: BaseException) -> str:
    """Return the first line of the original error: ending a failed capture raises further errors."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]


def _key(loop: PGDLoop, images: Tensor, labels: Tensor | None, label_range: LabelRange) -> tuple[object, Hashable]:
    """Return the objects that must stay alive while the key is in use, and the key: all that a capture depends on."""
    model, options, device = loop.model, loop.options, images.device.type
    modules = list(model.modules())
    masks = [module.weight_mask for module in modules if isinstance(module, MaskedLayer)]
    patterns = [module.pattern for module in modules if isinstance(module, MaskedConv2d)]
    batch = [tensor for tensor in (images, labels) if tensor is not None]
    key = (
        (options.start, options.ball, options.alpha, options.steps, options.restarts, options.bn_mode, options.engine),
        (options.loss if isinstance(options.loss, str) else id(options.loss), options.targeted, options.early_stop),
        label_range is None,
        tuple((tensor.device, tensor.dtype, tensor.shape, tensor.stride()) for tensor in batch),
        tuple((id(module), getattr(module, "track_running_stats", None)) for module in modules),
        tuple((t.data_ptr(), t.dtype, t.stride()) for t in (*model.parameters(), *model.buffers())),
        tuple(-1 if mask.is_inference() else mask._version for mask in masks),
        tuple(id(pattern) for pattern in patterns),
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),  # type: ignore
    )
    # Not the loop: its options refer to the Graphs object, which would then live until the garbage collector runs.
    return (options.loss, modules, masks, patterns), key
