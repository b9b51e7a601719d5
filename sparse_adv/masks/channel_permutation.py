"""`gather_channels`: an order of channels in which a model computes the same and whole blocks hold more of its scores.

Free of cost: layers hand their channels on in the new order, and nothing is permuted when the model runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.masks.dependency_graph import ChannelGroup, channel_groups
from sparse_adv.masks.pruning import (
    Candidates,
    Score,
    block_sizes,
    block_sums,
    candidates,
    four_sizes,
    keep_blocks,
)
from sparse_adv.ops.masked_conv2d_mask import check_block

_SOFT_ROUNDS, _SOFT_POWER = 4, 4
"""Rounds in which every block counts, by this power of its mean squared score, before it is kept or pruned; tried."""
_LEAST_GAIN = 1e-5
"""Share of the total score that a further round must gain."""

_TENSORS = {0: ("weight", "weight_mask", "bias", "running_mean", "running_var"), 1: ("weight", "weight_mask")}
"""What of a module has channels in this dimension."""
_KNOWN = {*_TENSORS[0], "num_batches_tracked"}


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """An order of a model's channels that leaves its function as it is."""

    channels: dict[ChannelGroup, Tensor]
    """Of each group of channels that belong together, the old channel at each new position, int64 [width]."""
    retained: tuple[float, float]
    """Share of the squared scores that the kept blocks hold, before and after."""

    def apply(self, model: nn.Module) -> None:
        """Reorder a model in place, dense or sparse: its Parameters stay the same objects.

        What an optimiser remembers of them, such as momentum, does not follow: make a new one.

        Raises:
            ValueError: if the model is of another architecture or has parametrised weights; it is then unchanged.
        """
        model.load_state_dict(self.reorder(model.state_dict()))

    def reorder(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict in this order; tensors without channels of these groups are those that were given.

        Raises:
            ValueError: if the state dict is of another architecture, or of parametrised weights.
        """
        new = dict(state_dict)
        for group, channels in self.channels.items():
            for name, dim, features in _holders(group):
                own = [key for key in new if key.startswith(f"{name}.")]
                unknown = [key for key in own if key.removeprefix(f"{name}.") not in _KNOWN]
                if unknown or not own:
                    what = f"holds {unknown[0]!r}, which has no known order" if unknown else f"lacks {name!r}"
                    raise ValueError(f"state_dict {what}")
                index = _entries(channels, features)
                for key in own:
                    if key.removeprefix(f"{name}.") in _TENSORS[dim]:
                        if new[key].shape[dim] != len(index):
                            raise ValueError(
                                f"state_dict must hold {key!r} with {len(index)} channels, got {new[key].shape[dim]}"
                            )
                        new[key] = new[key].index_select(dim, index.to(new[key].device))
        return new

    def inverse(self) -> ChannelOrder:
        """The order that leads back."""
        channels = {group: channels.argsort() for group, channels in self.channels.items()}
        return ChannelOrder(channels, (self.retained[1], self.retained[0]))


def gather_channels(
    model: nn.Module,
    density: float,
    block: Sequence[int],
    shape: Sequence[int] | Tensor,
    scope: str = "global",
    score: str | Score = "magnitude",
    exclude: Collection[str] = (),
    linear: bool = False,
) -> ChannelOrder:
    """Find an order of channels in which the blocks that `prune` keeps hold more of the squared scores.

    Filters and the inputs that read them move alike, through residual sums too, so that the function stays. The model
    is not changed: `order.apply(model)` reorders it, and then `prune(model, density, block, ...)` finds the masks.
    Whoever goes back to earlier weights must reorder those: `order.apply(twin)`, `order.reorder(state_dict)`.

    Starts with the channels sorted by score. Then one group of channels after the other is dealt out anew, for the
    most score in the kept blocks while these stay where they are, until a round gains nothing: a local optimum. The
    same model gives the same order. What is gained depends on the model: structure that is there is found, but weights
    without any have none to gather.

    Args:
        model: any module that torch.fx can trace, dense or sparse.
        density, scope, score, exclude, linear: as `prune` will get them; a score must follow its weight when channels
            move.
        block: `(bo, bi)` or `(bo, bi, br, bs)`, as `prune` will get it.
        shape: shape [N, C, H, W] of the model's input, or a sample of it.

    Returns:
        The order, with the share of the squared scores retained before and after; channels that must stay where they
        are (`masks.coupling`) do. Where nothing is gained, every channel stays.

    Raises:
        ValueError: if an argument is out of its range, a score is NaN, negative, infinite or of another shape, or
            torch.fx cannot trace the model.

    Source: Huang et al., "Shfl-BW" (DAC 2022, arXiv 2203.05016), for shuffled block-wise pruning; Pool and Yu, "Channel
    permutations for N:M sparsity" (NeurIPS 2021), for permutations that the surrounding layers absorb.
    """
    block4 = check_block(block)
    found = candidates(model, density, scope, score, exclude, linear)
    groups = [group for group in channel_groups(model, shape) if not group.fixed]
    return _Gathering(found, block4, groups).run()


def _holders(group: ChannelGroup) -> Iterator[tuple[str, int, int]]:
    """The modules that hold a group's channels, the dimension of their tensors, and the entries for each channel."""
    for name, features in group.consumers:
        yield name, 1, features
    for name in (*group.producers, *group.depthwise):
        yield name, 0, 1
    for name, features in group.norms:
        yield name, 0, features


def _entries(channels: Tensor, features: int) -> Tensor:
    """The entries of these channels, `features` in a row for each."""
    return (channels.unsqueeze(1) * features + torch.arange(features)).flatten()


class _Gathering:
    """A search in progress: squared scores [taps, K, C] in the present order, their blocks' sums, and the order."""

    def __init__(self, found: Candidates, block: tuple[int, int, int, int], groups: Sequence[ChannelGroup]) -> None:
        self.found, self.block = found, block[:2]
        self.squares: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        for name, shape in found.shapes.items():
            squares = found.scores(name).square().reshape(four_sizes(shape))
            if not squares.isfinite().all():
                raise ValueError(f"score of {name!r} must have finite squares, got one of {float(squares.max())}")
            # Taps do not move: those of one block are one number for each pair of channels.
            self.squares[name] = _taps_first(block_sums(squares, (1, 1, *block[2:])))
            self.sizes[name] = _taps_first(block_sizes(four_sizes(shape), block))
        self.sums = {name: self._sums(name) for name in self.squares}
        self.total = sum(float(squares.sum()) for squares in self.squares.values()) or 1.0
        self.channels = {group: torch.arange(group.width) for group in groups}

    def run(self) -> ChannelOrder:
        before = best = last = self._retained()
        order = dict(self.channels)
        for group in self.channels:
            self._move(group, self._energy(group).argsort(descending=True, stable=True))
        number = 0
        while True:
            number += 1
            for group in self.channels:
                self._deal(group, self._softly_kept() if number <= _SOFT_ROUNDS else self._kept())
            retained = self._retained()
            if retained > best + _LEAST_GAIN:
                best, order = retained, dict(self.channels)
            if number > _SOFT_ROUNDS and retained <= last + _LEAST_GAIN:
                return ChannelOrder(order, (before, best))
            last = retained

    def _members(self, group: ChannelGroup) -> list[tuple[str, int, int]]:
        return [holder for holder in _holders(group) if holder[0] in self.squares]

    def _sums(self, name: str) -> Tensor:
        return block_sums(self.squares[name], (1, *self.block))

    def _kept(self) -> dict[str, Tensor]:
        """The blocks that `prune` would keep."""
        means = {name: (sums / self.sizes[name]).sqrt() for name, sums in self.sums.items()}
        return keep_blocks(means, self.sizes, self.found.targets)

    def _retained(self) -> float:
        return sum(float(self.sums[name][kept].sum()) for name, kept in self._kept().items()) / self.total

    def _softly_kept(self) -> dict[str, Tensor]:
        """What blocks count before any is pruned: large sums grow, wherever they are."""
        means = {name: sums / self.sizes[name] for name, sums in self.sums.items()}
        # In units of the largest, so that the power of a small number is not 0.
        unit = max((float(mean.max()) for mean in means.values()), default=0.0) or 1.0
        return {name: (mean / unit).pow(_SOFT_POWER) for name, mean in means.items()}

    def _energy(self, group: ChannelGroup) -> Tensor:
        energy = torch.zeros(group.width, dtype=torch.float64)
        for name, dim, features in self._members(group):
            energy += self.squares[name].sum((0, 2 - dim)).view(group.width, features).sum(1)
        return energy

    def _deal(self, group: ChannelGroup, counts: Mapping[str, Tensor]) -> None:
        """Give the channels of a group new positions, for the most score in blocks by what these count."""
        slot = math.gcd(*(size for size in self.block if size > 1)) or group.width
        slots = -(-group.width // slot)
        gain = torch.zeros(group.width, slots, dtype=torch.float64)
        for name, dim, features in self._members(group):
            size = self.block[dim]
            if features > 1 or size == 1:  # a block of one channel moves with it
                continue
            across = block_sums(self.squares[name], (1, 1, self.block[1]) if dim == 0 else (1, self.block[0], 1))
            gains = torch.einsum("tkc,tbc->kb" if dim == 0 else "tkc,tkb->cb", across, counts[name].double())
            gain += gains.repeat_interleave(size // slot, 1)[:, :slots]
        self._move(group, assign(gain, slot))

    def _move(self, group: ChannelGroup, order: Tensor) -> None:
        if order.equal(torch.arange(group.width)):
            return
        self.channels[group] = self.channels[group][order]
        for name, dim, features in self._members(group):
            self.squares[name] = self.squares[name].index_select(1 + dim, _entries(order, features))
            self.sums[name] = self._sums(name)


def _taps_first(values: Tensor) -> Tensor:
    """[K, C, R, S] as [R S, K, C]."""
    return values.flatten(2).movedim(2, 0).contiguous()


def assign(gain: Tensor, slot: int) -> Tensor:
    """Deal items out to slots of `slot` positions, starting as they are, by exchanging two while that gains.

    Args:
        gain: float64 [items, slots], what an item is worth in a slot.
        slot: positions of each slot, less in the last one if the items do not fill it.

    Returns:
        int64 [items], the item at each position; no exchange of two gains more.
    """
    items, slots = gain.shape
    order = torch.arange(items)
    slot_of = (order // slot).unsqueeze(1)
    nobody = gain.new_full((slots * slot - items, slots), -math.inf)
    least = 1e-12 * float(gain.abs().max()) if gain.numel() else 0.0
    while True:
        here = gain[order]
        change = torch.cat([here - here.gather(1, slot_of), nobody])
        # Of the items of each slot the one that gains most, or loses least, in each other slot.
        most, who = change.view(slots, slot, slots).max(1)
        exchange = (most + most.T).triu(1)
        exchanged = False
        for _ in range(slots // 2):  # pairs of slots that have no slot in common
            first, second = divmod(int(exchange.argmax()), slots)
            if float(exchange[first, second]) <= least:
                break
            pair = torch.stack([first * slot + who[first, second], second * slot + who[second, first]])
            order[pair] = order[pair.flip(0)]
            exchange[[first, second]] = exchange[:, [first, second]] = 0
            exchanged = True
        if not exchanged:
            return order
