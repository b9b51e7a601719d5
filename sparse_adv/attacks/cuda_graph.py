"""Attacks as CUDA graphs: the whole loop is captured once and then replayed with one launch.

Without a graph, each of the few hundred kernels of an attack step waits for Python to launch it. A graph replays the
captured kernels on the captured addresses. It therefore uses the current weights (masking, casting and packing them is
part of the graph), but the batch must be copied into buffers of the graph. No Python code runs in a replay: branches in
a model's code are decided when the graph is captured.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.checks import LabelRange, check_label_range
from sparse_adv.attacks.loop import PGDLoop
from sparse_adv.nn import MaskedConv2d
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.ops.cuda_graph import CallCache, Capturer, inside_a_call


class Graphs:
    """A cache of attacks captured as CUDA graphs; pass one to every call of an attack, `pgd(..., graphs=graphs)`.

    Two attacks have the same graph if all of these are equal: the options, shape and layout of the batch, the modules
    of the model, the addresses of its weights, its masks, and the settings of autocast and of the backends. An attack
    runs step by step the first two times, is captured in the second call and replayed from the third call on; the
    results are the same, bit for bit. A model that cannot be captured, because it reads a number back from the GPU or
    draws random numbers on the CPU, is attacked step by step and a warning says so. On other devices than CUDA all
    attacks run step by step.

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
        check_count("capacity", capacity, least=1)
        self.cache = CallCache(capacity, self.capturer)
        """The attacks, and with `training.train` its updates: they share stream and memory."""

    def __repr__(self) -> str:
        return f"Graphs(capacity={self.cache.capacity})"

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return type(self), (self.cache.capacity,)  # graphs cannot be copied or pickled: a copy is an empty cache

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
        call = self.cache.find(*_key(loop, images, labels, label_range))
        if call.replays and call.facts is not None:
            check_label_range(label_range, call.facts)
        result: Tensor = self.cache.run(
            call,
            f"attacks on this {type(loop.model).__name__}",
            {"attack": lambda images, labels, philox_state: loop.run(images, labels, philox_state, label_range)},
            (images, labels, philox_state),
            images.device,
        )
        if loop.classes is not None:
            call.facts = loop.classes
        return result

    def _can_capture(self, loop: PGDLoop, images: Tensor, labels: Any) -> bool:
        if not self.cache.captures_on(images.device) or inside_a_call() or is_frozen(loop.model):
            return False
        return labels is None or (isinstance(labels, Tensor) and labels.device == images.device)


def is_frozen(model: nn.Module) -> bool:
    """Whether the model is inside of `nn.frozen_weights`: its packed weights have addresses that end with that."""
    return any(isinstance(layer, MaskedLayer) and layer.frozen_operands for layer in model.modules())


def key_of_model(model: nn.Module, device: str) -> tuple[Hashable, object]:
    """Return what of a model and of PyTorch's settings a captured pass depends on, and the objects to keep alive.

    The modes of modules are left out, because attacks set them.
    """
    modules = list(model.modules())
    masks = [module.weight_mask for module in modules if isinstance(module, MaskedLayer)]
    patterns = [module.pattern for module in modules if isinstance(module, MaskedConv2d)]
    key = (
        tuple((id(module), getattr(module, "track_running_stats", None)) for module in modules),
        tuple((t.data_ptr(), t.dtype, t.stride()) for t in (*model.parameters(), *model.buffers())),
        tuple(-1 if mask.is_inference() else mask._version for mask in masks),
        tuple(id(pattern) for pattern in patterns),
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        torch.are_deterministic_algorithms_enabled(),
        (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision),  # type: ignore
    )
    return key, (modules, masks, patterns)


def key_of_batch(*tensors: Tensor | None) -> Hashable:
    """Return all of a batch that a captured call depends on: devices, dtypes, shapes and layouts of its tensors."""
    return tuple(None if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in tensors)


def _key(loop: PGDLoop, images: Tensor, labels: Tensor | None, label_range: LabelRange) -> tuple[Hashable, object]:
    """Return the key of an attack, and the objects that must stay alive while it is in use."""
    options = loop.options
    of_model, keep_alive = key_of_model(loop.model, images.device.type)
    key = (
        (options.start, options.ball, options.alpha, options.steps, options.restarts, options.bn_mode, options.engine),
        (options.loss if isinstance(options.loss, str) else id(options.loss), options.targeted, options.early_stop),
        label_range is None,
        key_of_batch(images, labels),
        of_model,
    )
    # Not the loop: its options refer to the Graphs object, which would then live until the garbage collector runs.
    return key, (options.loss, keep_alive)
