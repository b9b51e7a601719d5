"""Checks that all processes of a distributed run have the same masks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_compared: WeakSet[DistributedDataParallel] = WeakSet()


def compare_in_first_pass() -> None:
    """Compare the masks of all processes, in the first training pass of a DistributedDataParallel.

    Passes under `no_grad` or `no_sync` are left out: a process may make them alone, and then no other process would
    answer. Equal weights under different masks give each process another network. The masks compared are those under
    which the layers' weights were zeroed, because the wrapper may just have replaced the content of the buffers. A
    process with a dense model takes no part; gloo then ends the processes that wait for it: "distributed collective
    mismatch". Where all processes call `compare`, as in `training.train` or with the hook of this package, this is
    found earlier.

    Raises:
        ValueError: if the processes' masks differ.
    """
    wrapped = DistributedDataParallel._get_active_ddp_module()
    if wrapped is None or wrapped in _compared:
        return
    if not (torch.is_grad_enabled() and wrapped.require_backward_grad_sync):
        return
    if masks_of(wrapped.module):  # none if the masked layer in this pass is not part of the wrapped model
        compare(wrapped.module, wrapped.process_group)
    _compared.add(wrapped)


def compare(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Compare the masks of all processes of a group; all must call this, also those without masks.

    Raises:
        ValueError: if the processes' masks differ.
    """
    masks = masks_of(model)
    for module in model.modules():
        weight, compiled = module._parameters.get("weight"), getattr(module, "_compiled", None)
        if weight in masks and compiled is not None:
            masks[weight] = compiled.mask
    device = next(model.parameters()).device
    check_equal(model, {weight: checksum(mask) for weight, mask in masks.items()}, device, group)


def masks_of(module: nn.Module) -> dict[Tensor, Tensor]:
    """Return the mask of each masked weight: a Parameter `weight` in a module with a bool buffer `weight_mask`."""
    masks: dict[Tensor, Tensor] = {}
    for each in module.modules():
        weight, mask = each._parameters.get("weight"), each._buffers.get("weight_mask")
        if weight is not None and mask is not None and mask.dtype == torch.bool:
            masks[weight] = mask
    return masks


def checksum(mask: Tensor) -> int:
    """Return 56 bits that almost surely differ for different masks."""
    digest = hashlib.blake2b(mask.cpu().numpy().tobytes(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def check_equal(
    module: nn.Module, checksums: Mapping[Tensor, int], device: torch.device, group: dist.ProcessGroup
) -> None:
    """Raise ValueError, in all processes of the group, unless they have the same masks; all must call it.

    Args:
        module: the model.
        checksums: of the masks of its weights.
        device: of the tensors that are exchanged.
        group: of the processes.
    """
    parameters = dict(module.named_parameters())
    own = torch.tensor([checksums.get(parameter, 0) for parameter in parameters.values()], device=device)
    extremes = torch.stack([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    for name, differs in zip(parameters, (extremes[0] != -extremes[1]).tolist(), strict=True):
        if differs:
            raise ValueError(f"the processes have different masks for {name!r}; give all of them the same")
