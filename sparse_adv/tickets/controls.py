"""From a ticket to the network that is trained, and to the controls without which a ticket's merit is not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_adv import masks
from sparse_adv.nn import sparsify, zero_dead_channels


def restore(model: nn.Module, ticket: masks.Ticket, input_shape: Sequence[int], *, weights: bool = True) -> nn.Module:
    """Make a dense model the ticket's sparse network, at its start, in place.

    BatchNorm channels that only a filter without kept weights feeds are set to zero and stay there (the paper's code
    does so too, but by the order of modules, and hits channels that a skip path keeps alive).

    Args:
        model: the architecture that the ticket was found in.
        ticket: see `tickets.search` and `masks.load_ticket`.
        input_shape: [N, C, H, W]; N = 1 will do.
        weights: whether to begin with the ticket's weights; False keeps the model's own, the control "same mask,
            re-initialised".

    Returns:
        The model.

    Raises:
        ValueError: if the ticket is for another architecture, naming what differs; the model is then unchanged.
    """
    _check_architecture(model.state_dict(), ticket.state_dict)
    if weights:
        model.load_state_dict(ticket.state_dict)
    sparsify(model, ticket.masks)
    zero_dead_channels(model, ticket.masks, input_shape)
    return model


def _check_architecture(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    what = ""
    for key in (*given, *own):
        if key not in own:
            what = f"it has {key!r}, which the model has not"
        elif key not in given:
            what = f"it lacks {key!r}"
        elif own[key].shape != given[key].shape:
            what = f"its {key!r} is {tuple(given[key].shape)}, the model's {tuple(own[key].shape)}"
        if what:
            raise ValueError(f"the ticket is for another architecture: {what}")


def shuffle(found: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The control "shuffled mask": in each layer the same number of kept blocks, elsewhere at random.

    Args:
        found: masks keyed by module name.
        seed: of the permutations.

    Returns:
        Masks of the same shapes that obey the same blocks. Smaller blocks at the edges of a layer change places only
        among their like, so that the number of kept weights stays the same.
    """
    generator = torch.Generator().manual_seed(seed)
    return {name: _shuffled(mask, generator) for name, mask in found.items()}


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    block = masks.largest_block(mask)
    new = mask.clone()
    for region in _alike(mask.shape, block):
        whole = new[region]
        sizes = [min(size, length) for size, length in zip(block, whole.shape, strict=False)]
        grid = whole[tuple(slice(None, None, size) for size in sizes)]
        order = torch.randperm(grid.numel(), generator=generator).to(mask.device)
        moved = grid.reshape(-1)[order].view(grid.shape)
        for dim, size in enumerate(sizes):
            moved = moved.repeat_interleave(size, dim)
        new[region] = moved
    return new


def _alike(shape: Sequence[int], block: Sequence[int]) -> list[tuple[slice, ...]]:
    """The regions of a layer whose blocks all have one size: the inner part, and the edges where blocks do not fit."""
    regions: list[tuple[slice, ...]] = [()]
    for length, size in zip(shape, block, strict=False):
        inner = length - length % size
        parts = [slice(begin, end) for begin, end in ((0, inner), (inner, length)) if end > begin]
        regions = [(*region, part) for region in regions for part in parts]
    return regions
