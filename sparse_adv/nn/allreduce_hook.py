"""Training on several processes: only the gradients of kept weights travel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Traffic:
    """What one process has handed to all-reduce since `exchange_kept_gradients`; counts on as training goes on."""

    steps: int = 0
    """Backward passes that exchanged gradients (those under `no_sync` exchange none)."""
    bytes_sent: int = 0
    """Bytes of gradients exchanged. Comparing the masks adds 16 bytes a parameter and step."""
    bytes_dense: int = 0
    """Bytes that DistributedDataParallel exchanges without this."""


def exchange_kept_gradients(model: DistributedDataParallel) -> Traffic:
    """Let DistributedDataParallel average only the gradients of kept weights: at density 0.1, a tenth of the bytes.

    Of a weight under a mask (a layer with a Parameter `weight` and a bool buffer `weight_mask`) the kept entries are
    packed, exchanged and put back, and the others become 0; of all other parameters everything is exchanged. The
    averages are those of plain DistributedDataParallel. Masks may change between steps, on all processes alike: each
    step begins by comparing them, for packed gradients of unlike masks would be added in the wrong places, or never
    arrive.

    Args:
        model: a model without a communication hook, on any backend; dense or sparse, now or later.

    Returns:
        Counts of this process that grow with every step.

    Raises:
        TypeError: if the model is not wrapped in DistributedDataParallel.
        ValueError: if it has a communication hook already. In a backward pass: if the processes' masks differ.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be wrapped in DistributedDataParallel, got {type(model).__name__}")
    exchange = _Exchange(model.module, model.process_group)
    try:
        # A lambda: DistributedDataParallel compares a hook's annotations with types, and ours are strings.
        model.register_comm_hook(exchange, lambda exchange, bucket: exchange.reduce(bucket))
    except RuntimeError as error:
        raise ValueError("model has a communication hook already, and DistributedDataParallel takes one") from error
    return exchange.traffic


class _Exchange:
    """The state of the hook."""

    def __init__(self, module: nn.Module, group: dist.ProcessGroup) -> None:
        self.module, self.group = module, group
        self.traffic = Traffic()
        self.masks: dict[Tensor, Tensor] = {}
        self.stamp: list[tuple[int, int, int]] | None = None
        self.checksums: dict[Tensor, int] = {}
        self.kept: dict[int, tuple[list[int], Tensor | None]] = {}
        """By the bucket's index, the identities of its parameters (they change after the first step) and `_kept`."""

    def reduce(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Average one bucket of gradients; called in the same order on all processes."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._look_at_masks()
            self._compare_masks(buffer.device)
        kept = self._kept_of(bucket)
        # Divided before it is added up, as DistributedDataParallel does: 16-bit gradients might overflow.
        packed = (buffer if kept is None else buffer.index_select(0, kept)).div_(self.group.size())
        self.traffic.bytes_sent += packed.numel() * packed.element_size()
        self.traffic.bytes_dense += buffer.numel() * buffer.element_size()
        self.traffic.steps += bucket.is_last()

        def unpack(averaged: Future[list[Tensor]]) -> Tensor:
            values = averaged.value()[0]
            return values if kept is None else buffer.zero_().index_copy_(0, kept, values)

        return dist.all_reduce(packed, group=self.group, async_op=True).get_future().then(unpack)

    def _look_at_masks(self) -> None:
        masks: dict[Tensor, Tensor] = {}
        for module in self.module.modules():
            weight, mask = module._parameters.get("weight"), module._buffers.get("weight_mask")
            if weight is not None and mask is not None and mask.dtype == torch.bool:
                masks[weight] = mask
        # The masks last seen are still referred to, so no new one can have an old one's identity.
        stamp = [(id(w), id(m), -1 if m.is_inference() else m._version) for w, m in masks.items()]
        if stamp != self.stamp:
            self.masks, self.stamp = masks, stamp
            self.checksums = {weight: _checksum(mask) for weight, mask in masks.items()}
            self.kept.clear()

    def _compare_masks(self, device: torch.device) -> None:
        """Every step, changed or not: one process cannot know whether another's masks changed."""
        parameters = dict(self.module.named_parameters())
        own = torch.tensor([self.checksums.get(parameter, 0) for parameter in parameters.values()], device=device)
        extremes = torch.stack([own, -own])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self.group)
        for name, differs in zip(parameters, (extremes[0] != -extremes[1]).tolist(), strict=True):
            if differs:
                raise ValueError(f"the processes have different masks for {name!r}; give all of them the same")

    def _kept_of(self, bucket: dist.GradBucket) -> Tensor | None:
        parameters = bucket.parameters()
        identities = [id(parameter) for parameter in parameters]
        known, kept = self.kept.get(bucket.index(), (None, None))
        if known != identities:
            kept = self._kept(parameters)
            self.kept[bucket.index()] = identities, kept
        return kept

    def _kept(self, parameters: list[Tensor]) -> Tensor | None:
        """The places in the bucket's buffer that are exchanged; None: all."""
        if not any(parameter in self.masks for parameter in parameters):
            return None
        flags = [_in_memory_order(self.masks.get(parameter), parameter) for parameter in parameters]
        return torch.cat(flags).nonzero().squeeze(1)


def _in_memory_order(mask: Tensor | None, weight: Tensor) -> Tensor:
    """The mask as the bucket holds the weight's gradient: strided like the weight, if that has no gaps."""
    if mask is None:
        return torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    dense = torch.ops.aten.is_non_overlapping_and_dense(weight)
    layout = torch.preserve_format if dense else torch.contiguous_format
    copy = torch.empty_like(weight, dtype=torch.bool, memory_format=layout).copy_(mask)
    return copy.as_strided((copy.numel(),), (1,))


def _checksum(mask: Tensor) -> int:
    digest = hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
