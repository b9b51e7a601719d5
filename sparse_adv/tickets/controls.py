"""The sparse network of a ticket, and the controls that show what its masks and its weights contribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_adv import masks
from sparse_adv.argument_types import checks_types
from sparse_adv.masks.blocks import block_in, check_structure
from sparse_adv.masks.layers import modules_by_name, owners, parameter_of
from sparse_adv.masks.ticket import check_finite, check_masks_fit
from sparse_adv.nn import dead_channels, sparsify, zero_dead_channels
from sparse_adv.ops.masked_conv2d_mask import block_grid, check_mask, expand_blocks, obeys


@checks_types
def restore(
    model: nn.Module, ticket: masks.Ticket, example_input: Sequence[int] | Tensor, *, weights: bool = True
) -> nn.Module:
    """Turn a dense model, in place, into the sparse network of a ticket, before its training.

    BatchNorm channels whose only input is a filter without any kept weight get weight and bias 0, also during training.
    (The paper's code goes by the order of modules, so it also hits channels that a skip path feeds.)

    Args:
        model: dense, of the architecture that the ticket was found in.
        ticket: from `tickets.search` or `masks.load_ticket`.
        example_input: a batch of the model's input, or the shape [N, C, H, W] of one; N = 1 is enough.
        weights: whether to load the ticket's weights; False keeps the model's own weights, for the control "same mask,
            re-initialised".

    Returns:
        The model.

    Raises:
        TypeError: if a mask is not a bool tensor or is for a module of another kind than a convolution or linear layer.
        ValueError: if the ticket is for another architecture, naming the first difference, or its masks do not fit, a
            weight that it keeps is not finite, or if the weights for the control are the ticket's.

        In each case the model is unchanged.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> ticket = masks.Ticket(masks.prune(model, density=0.5), model.state_dict(), {})
        >>> restore(model, ticket, example_input=(1, 1, 4, 4))[0].density
        0.5
    """
    own = model.state_dict()
    check_masks_fit(ticket.masks, ticket.state_dict)
    _check_architecture(own, ticket.state_dict)
    dead_channels(model, ticket.masks, example_input)  # finds errors in the masks or the input
    if weights:
        check_finite(ticket.masks, ticket.state_dict)
        before = {key: value.clone() for key, value in own.items()}
        model.load_state_dict(ticket.state_dict)
    else:
        _check_other_weights(own, ticket)
        before = own
    try:
        sparsify(model, ticket.masks)
    except (TypeError, ValueError):
        model.load_state_dict(before)
        raise
    zero_dead_channels(model, ticket.masks, example_input)
    return model


def _check_architecture(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    check_masks_fit({}, own)
    for key in (*given, *own):
        if key not in own:
            difference = f"it has {key!r}, which the model lacks"
        elif key not in given:
            difference = f"it lacks {key!r}"
        elif own[key].shape != given[key].shape:
            difference = f"its {key!r} is {tuple(given[key].shape)}, the model's {tuple(own[key].shape)}"
        else:
            continue
        raise ValueError(f"the ticket is for another architecture: {difference}")


def _check_other_weights(own: Mapping[str, Tensor], ticket: masks.Ticket) -> None:
    """Raise ValueError if all weights that the masks keep are the ticket's: the control would be the ticket itself."""
    kept = {parameter_of(name): mask.cpu() for name, mask in ticket.masks.items()}
    given = {key: ticket.state_dict[key].to(own[key]) for key in kept}
    pairs = [(own[key].cpu()[mask], given[key].cpu()[mask]) for key, mask in kept.items()]
    if any(len(mine) for mine, _ in pairs) and all(mine.equal(its) for mine, its in pairs):
        raise ValueError("model has the ticket's weights, which weights=False is to replace: use another seed")


@checks_types
def shuffle(
    ticket_masks: Mapping[str, Tensor],
    seed: int,
    block: Sequence[int] | str | None = None,
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Permute the blocks of each layer's mask at random: the control "shuffled mask".

    Args:
        ticket_masks: bool masks by module name.
        seed: of the permutations.
        block: the weights that were kept or pruned together, as in `masks.prune`; `tickets.block_of(ticket)` if a
            search found the ticket or a run trained it. None takes, for each layer, the largest block with a kernel
            that the layer's mask obeys.
        model: the model that the masks are for. Layers that share a weight then get one mask, and "channel" takes
            grouped convolutions into account. None permutes each mask by itself.

    Returns:
        Masks of the same shapes with the same blocks and numbers of kept weights. Blocks at an edge of a layer can be
        smaller; they change places only with blocks of the same size, so that the number of kept weights stays the
        same.

    Raises:
        TypeError: if a mask is not a bool tensor.
        ValueError: if the block is invalid, a mask does not obey it, or the model lacks a module.

    Examples:
        >>> mask = torch.zeros(4, 6, dtype=torch.bool)
        >>> mask[:, :2] = True
        >>> int(shuffle({"fc": mask}, seed=0)["fc"].sum())
        8
        >>> shuffle({"fc": mask}, seed=0, block="channel")["fc"].all(0).sum()
        tensor(2)
    """
    modules = {} if model is None else modules_by_name(model, ticket_masks)
    owner = owners({name: modules[name] for name in ticket_masks}) if modules else {name: name for name in ticket_masks}
    generator = torch.Generator().manual_seed(seed)
    shuffled: dict[str, Tensor] = {}
    for name, mask in ticket_masks.items():
        if owner[name] == name:
            groups = getattr(modules.get(name), "groups", 1)
            shuffled[name] = _shuffled(mask, _block_of(name, mask, block, groups), generator)
    return {name: shuffled[owner[name]] for name in ticket_masks}


def _block_of(name: str, mask: Tensor, block: Sequence[int] | str | None, groups: int) -> Sequence[int]:
    """The block of a layer's mask; raises ValueError if the mask does not obey it."""
    if block is None:
        return masks.largest_block(mask)
    check_mask(mask, linear=True)
    size = block_in(mask.shape, check_structure(block), groups)
    if not obeys(mask, size):
        raise ValueError(f"block must be one that the mask of {name!r} obeys, got {block!r}")
    return size


def _shuffled(mask: Tensor, block: Sequence[int], generator: torch.Generator) -> Tensor:
    new = mask.clone()
    for region in _regions(mask.shape, block):
        part = new[region]
        sizes = [min(size, length) for size, length in zip(block, part.shape, strict=False)]
        grid = block_grid(part, sizes)
        order = torch.randperm(grid.numel(), generator=generator, device="cpu").to(mask.device)
        permuted = grid.reshape(-1)[order].view(grid.shape)
        new[region] = expand_blocks(permuted, sizes, part.shape)
    return new


def _regions(shape: Sequence[int], block: Sequence[int]) -> list[tuple[slice, ...]]:
    """The regions of a layer with blocks of one size: the inner part, and the edges, where blocks are cut off."""
    regions: list[tuple[slice, ...]] = [()]
    for length, size in zip(shape, block, strict=False):
        inner = length - length % size
        parts = [slice(begin, end) for begin, end in ((0, inner), (inner, length)) if end > begin]
        regions = [(*region, part) for region in regions for part in parts]
    return regions
