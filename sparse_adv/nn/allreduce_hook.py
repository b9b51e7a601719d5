"""A communication hook for DistributedDataParallel that averages only the gradients of weights kept by the masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sparse_adv.nn import mask_agreement
from sparse_adv.nn.optimizer_hook import version_of


@dataclass
class CommStats:
    """Counts of what one process passed to all-reduce since the hook was registered; they grow with every step."""

    steps: int = 0
    """Backward passes that averaged gradients (those under `no_sync` average none)."""
    bytes_sent: int = 0
    """Bytes of gradients passed to all-reduce. Comparing the masks adds 16 bytes per parameter and step."""
    bytes_dense: int = 0
    """Bytes that DistributedDataParallel passes to all-reduce without this hook."""


def register_masked_allreduce_hook(model: DistributedDataParallel) -> CommStats:
    """Make DistributedDataParallel average only the gradients of kept weights: at density 0.1, a tenth of the bytes.

    For a weight under a mask (a layer with a Parameter `weight` and a bool buffer `weight_mask`), the kept entries are
    packed, averaged and unpacked, and the others become 0. All entries of all other parameters are averaged. The
    averages equal those of plain DistributedDataParallel. Masks may change between steps, in the same way on all
    processes. This call and each step first compare the processes' masks, because with different masks packed gradients
    would be added at the wrong places, or all-reduce would wait for ever. So all processes must call it.

    Args:
        model: a model without a communication hook, on any backend; it may be sparse now, later or never.

    Returns:
        The counts of this process, which grow with every step.

    Raises:
        TypeError: if the model is not wrapped in DistributedDataParallel.
        ValueError: if it has a communication hook already, or the processes' masks differ, now or in a backward pass.

    Examples:
        >>> register_masked_allreduce_hook(nn.Linear(2, 2))
        Traceback (most recent call last):
        TypeError: model must be wrapped in DistributedDataParallel, got Linear
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be wrapped in DistributedDataParallel, got {type(model).__name__}")
    mask_agreement.compare(model.module, model.process_group)
    state = _HookState(model.module, model.process_group)
    try:
        # A lambda, because DistributedDataParallel compares a hook's annotations with types, and ours are strings.
        model.register_comm_hook(state, lambda state, bucket: state.average(bucket))
    except RuntimeError as error:
        raise ValueError("model has a communication hook already, and DistributedDataParallel takes one") from error
    return state.stats


class _HookState:
    """The state of the hook on one process."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        self.module, self.group = module, group
        self.stats = CommStats()
        self.masks: dict[Tensor, Tensor] = {}
        """The mask of each masked weight."""
        self.mask_versions: list[tuple[int, int, object]] | None = None
        self.checksums: dict[Tensor, int] = {}
        self.kept_indices: dict[int, tuple[list[int], Tensor | None]] = {}
        """Maps the index of a bucket to the ids of its parameters and the result of `_indices`. The parameters of a
        bucket change once, after the first step."""

    def average(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Average one bucket of gradients; called in the same order on all processes."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._read_masks()
            # In every step, because a process cannot know whether another one's masks have changed.
            mask_agreement.check_equal(self.module, self.checksums, buffer.device, self.group)
        indices = self._indices_of(bucket)
        # Divide before the sum, as DistributedDataParallel does, because a sum of 16-bit gradients might overflow.
        packed = (buffer if indices is None else buffer.index_select(0, indices)).div_(self.group.size())
        self.stats.bytes_sent += packed.numel() * packed.element_size()
        self.stats.bytes_dense += buffer.numel() * buffer.element_size()
        self.stats.steps += bucket.is_last()

        def unpack(averaged: Future[list[Tensor]]) -> Tensor:
            values = averaged.value()[0]
            return values if indices is None else buffer.zero_().index_copy_(0, indices, values)

        return dist.all_reduce(packed, group=self.group, async_op=True).get_future().then(unpack)

    def _read_masks(self) -> None:
        masks = mask_agreement.masks_of(self.module)
        # `self.masks` still refers to the masks of the last step, so no new mask can have the id of an old one.
        versions = [(id(w), id(m), version_of(m)) for w, m in masks.items()]
        if versions != self.mask_versions:
            self.masks, self.mask_versions = masks, versions
            self.checksums = {weight: mask_agreement.checksum(mask) for weight, mask in masks.items()}
            self.kept_indices.clear()

    def _indices_of(self, bucket: dist.GradBucket) -> Tensor | None:
        parameters = bucket.parameters()
        identities = [id(parameter) for parameter in parameters]
        known, indices = self.kept_indices.get(bucket.index(), (None, None))
        if known != identities:
            indices = self._indices(parameters)
            self.kept_indices[bucket.index()] = identities, indices
        return indices

    def _indices(self, parameters: list[Tensor]) -> Tensor | None:
        """The indices in the bucket's buffer of the gradients to average; None: all."""
        if not any(parameter in self.masks for parameter in parameters):
            return None
        flags = [_in_memory_order(self.masks.get(parameter), parameter) for parameter in parameters]
        return torch.cat(flags).nonzero().squeeze(1)


def _in_memory_order(mask: Tensor | None, weight: Tensor) -> Tensor:
    """The mask, flattened in the order in which the bucket stores the weight's gradient; None: all true.

    The bucket gives the gradient the weight's strides, or contiguous ones if the weight's memory has gaps.
    """
    if mask is None:
        return torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    dense = torch.ops.aten.is_non_overlapping_and_dense(weight)
    layout = torch.preserve_format if dense else torch.contiguous_format
    copy = torch.empty_like(weight, dtype=torch.bool, memory_format=layout).copy_(mask)
    return copy.as_strided((copy.numel(),), (1,))
