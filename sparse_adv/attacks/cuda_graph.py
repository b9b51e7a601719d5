"""Attacks as CUDA graphs: the whole loop is captured once and then replayed with one launch.

Without a graph, each of the few hundred kernels of an attack step waits for Python to launch it. A graph replays the
captured kernels on the captured addresses. So it uses the current weights (masking, casting and packing them is part of
the graph), but the batch must be copied into buffers of the graph. No Python code runs in a replay: the capture decides
branches in a model's code.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import check_count
from sparse_adv.nn import MaskedConv2d
from sparse_adv.nn.masked_layer import MaskedLayer, masked_layers
from sparse_adv.ops.cuda_graph import CallCache, Capturer


class Graphs:
    """A cache of attacks captured as CUDA graphs; pass one to every call of an attack, `pgd(..., graphs=graphs)`.

    Two attacks share a graph if all of these are equal: the options, shape and layout of the batch, the modules of the
    model, the addresses of its weights, its masks, and the settings of autocast and of the backends. An attack runs
    step by step the first two times, is captured in the second call and replayed from the third call on; the results
    are the same, bit for bit. If a model cannot be captured, because it reads a number back from the GPU or draws
    random numbers on the CPU, it is attacked step by step and a warning says so. On devices other than CUDA all attacks
    run step by step.

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
        """The attacks and, in `training.train`, the updates: they share stream and memory."""

    def __repr__(self) -> str:
        return f"Graphs(capacity={self.cache.capacity})"

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return type(self), (self.cache.capacity,)  # graphs cannot be copied or pickled: a copy is an empty cache


def is_frozen(model: nn.Module) -> bool:
    """Whether the model is inside `nn.frozen_weights`; the addresses of its packed weights end with that."""
    return any(layer.frozen_operands for layer in masked_layers(model).values())


def key_of_model(model: nn.Module, device: str) -> tuple[Hashable, object]:
    """Return everything in a model and PyTorch's settings that a captured pass depends on, and the objects to keep
    alive.

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
    """Return what a captured call depends on in a batch: devices, dtypes, shapes and layouts of its tensors."""
    return tuple(None if t is None else (t.device, t.dtype, t.shape, t.stride()) for t in tensors)
