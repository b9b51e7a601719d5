"""`permute_channels`: reorder channels to put more of the scores into whole blocks, without changing the function.

It costs no time when the model runs: each layer outputs its channels in the new order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.blocks import block_sizes, block_sums, conv_shape
from sparse_adv.masks.dependency_graph import DependencyGroup, dependency_groups
from sparse_adv.masks.pruning import Candidates, Score
from sparse_adv.masks.same_function import check_same_function
from sparse_adv.masks.selection import select_blocks
from sparse_adv.ops.masked_conv2d_mask import check_block

_SOFT_ROUNDS, _SOFT_POWER = 4, 4
"""In the first 4 rounds each block counts by the 4th power of its mean squared score; later only kept blocks count.

Mean relative gain of retained score over 20 cases: 2.9 % without these rounds, 3.1 / 3.5 / 3.6 / 3.6 % with power
1 / 2 / 4 / 6, 3.6 % with 8 rounds.
"""
_MIN_GAIN = 1e-5
"""The search ends when a round gains less than this fraction of the total squared score."""

_PERMUTED = {0: ("weight", "weight_mask", "bias", "running_mean", "running_var"), 1: ("weight", "weight_mask")}
"""Entries of a module's state dict that have channels in dimension 0 or 1."""
_KNOWN_ENTRIES = {*_PERMUTED[0], "num_batches_tracked"}


@dataclass(frozen=True, eq=False)
class ChannelPermutation:
    """A permutation of a model's channels that leaves its function unchanged; `permute_channels` returns it.

    Examples:
        >>> from sparse_adv import masks
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        >>> permutation = masks.permute_channels(model, density=0.5, block=(2, 1), example_input=(1, 3, 4, 4))
        >>> x = torch.rand(1, 3, 4, 4)
        >>> before = model(x)
        >>> permutation.apply(model)
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
        >>> permutation.inverse().apply(model)  # each channel is at its old position again
        >>> model(x).equal(before)
        True
    """

    channels: dict[DependencyGroup, Tensor]
    """The order of each dependency group, int64 [width]: the old number of the channel at each new position."""
    retained: tuple[float, float]
    """Fraction of the squared scores in the blocks that pruning keeps, before and after the permutation."""

    def apply(self, model: nn.Module) -> None:
        """Permute the channels of a model in place, dense or sparse; its Parameter objects stay the same.

        The state of an optimiser, such as momentum, is not permuted: make a new optimiser afterwards.

        Raises:
            ValueError: if the model has another architecture or parametrised weights; it is then unchanged.
        """
        model.load_state_dict(self.permute_state_dict(model.state_dict()))

    def permute_state_dict(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict with permuted channels; tensors without these channels are not copied.

        Raises:
            ValueError: if the state dict is of another architecture or has parametrised weights.
        """
        permuted = dict(state_dict)
        for group, order in self.channels.items():
            for name, dim, features in _members(group):
                keys = [key for key in permuted if key.startswith(f"{name}.")]
                unknown = [key for key in keys if key.removeprefix(f"{name}.") not in _KNOWN_ENTRIES]
                if not keys:
                    raise ValueError(f"state_dict lacks {name!r}")
                if unknown:
                    raise ValueError(f"state_dict has {unknown[0]!r}, for which the order of channels is unknown")
                index = _feature_order(order, features)
                for key in keys:
                    if key.removeprefix(f"{name}.") in _PERMUTED[dim]:
                        size = permuted[key].shape[dim]
                        if size != len(index):
                            raise ValueError(f"state_dict must have {key!r} with {len(index)} channels, got {size}")
                        permuted[key] = permuted[key].index_select(dim, index.to(permuted[key].device))
        return permuted

    def inverse(self) -> ChannelPermutation:
        """Return the permutation that undoes this one."""
        channels = {group: order.argsort() for group, order in self.channels.items()}
        return ChannelPermutation(channels, (self.retained[1], self.retained[0]))


@checks_types
def permute_channels(
    model: nn.Module,
    density: float,
    block: Sequence[int],
    example_input: Sequence[int] | Tensor,
    *,
    scope: str = "global",
    score: str | Score = "magnitude",
    exclude: Collection[str] = (),
    linear: bool = False,
) -> ChannelPermutation:
    """Find a permutation of channels that brings more of the squared scores into the blocks that `prune` keeps.

    All layers of a dependency group, including those joined by residual sums, are permuted alike, so the model's
    function does not change. The model is not changed either: call `apply(model)` on the result, then `prune(model,
    density, block, ...)`. If training restarts from earlier weights, permute these too, with `apply(earlier_model)` or
    `permute_state_dict(earlier_state_dict)`.

    The search first sorts the channels of each group by score. Then, one group after the other, it reassigns the
    channels to blocks so that the score in the currently kept blocks is maximal. It ends when a round gains nothing, at
    a local optimum. The same model gives the same result. The gain depends on the structure of the weights; weights
    without structure gain little.

    Args:
        model: any module that torch.fx can trace, dense or sparse.
        density, scope, score, exclude, linear: as they will be given to `prune`. A score function must depend on the
            weight's values alone, so that scores are permuted with the weight.
        block: `(bo, bi)` or `(bo, bi, br, bs)`, as it will be given to `prune`.
        example_input: a batch of the model's input, or the shape [N, C, H, W] of one.

    Returns:
        The permutation, and the fraction of squared scores retained before and after. Channels that must not change
        (see `dependency_groups`) keep their positions, and all channels do if nothing is gained.

    Raises:
        ValueError: if an argument is out of range, a score is NaN, negative or infinite or has a wrong shape, torch.fx
            cannot trace the model, or the permuted model's output on the example input differs.

    Source: Pool and Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021; NVIDIA ASP), for permutations absorbed
    by the neighbouring layers; Huang et al., "Shfl-BW" (DAC 2022, arXiv 2203.05016), for shuffled block-wise pruning.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
        >>> for layer in model:
        ...     _ = nn.init.constant_(layer.weight, 0.1)
        >>> model[0].weight.data[[0, 2]] = 1.0  # two large filters, in different blocks of two filters
        >>> permutation = masks.permute_channels(model, density=0.5, block=(2, 1), example_input=(1, 3, 4, 4))
        >>> next(iter(permutation.channels.values()))
        tensor([0, 2, 1, 3])
        >>> x = torch.rand(1, 3, 4, 4)
        >>> before = model(x)
        >>> permutation.apply(model)
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """
    block4 = check_block(block)
    candidates = Candidates.of(model, density, scope, score, exclude, linear)
    groups = [group for group in dependency_groups(model, example_input) if not group.fixed]
    permutation = _Search(candidates, block4, groups).run()
    if any(not order.equal(torch.arange(len(order), device="cpu")) for order in permutation.channels.values()):
        _check(permutation, model, example_input)
    return permutation


def _check(permutation: ChannelPermutation, model: nn.Module, example_input: Sequence[int] | Tensor) -> None:
    """Raises ValueError if the permutation changes the model's function."""
    before = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*before.parameters(), *before.buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():
                # A new BatchNorm or bias is the same for all channels and would not show a wrong order.
                tensor.copy_(torch.rand(tensor.shape, generator=generator, device="cpu") + 0.5)
    after = copy.deepcopy(before)
    permutation.apply(after)
    check_same_function(before, after, example_input, "permuting channels")


def _members(group: DependencyGroup) -> Iterator[tuple[str, int, int]]:
    """Yield each module of a group, the dimension of its tensors that holds the channels, and features per channel."""
    for name, features in group.consumers:
        yield name, 1, features
    for name in (*group.producers, *group.depthwise):
        yield name, 0, 1
    for name, features in group.norms:
        yield name, 0, features


def _feature_order(order: Tensor, features: int) -> Tensor:
    """The order of features if each channel has `features` of them in a row."""
    return (order.unsqueeze(1) * features + torch.arange(features, device="cpu")).flatten()


class _Search:
    """The search: squared scores [taps, K, C] in the current order of channels, and their sums over blocks."""

    def __init__(
        self, candidates: Candidates, block: tuple[int, int, int, int], groups: Sequence[DependencyGroup]
    ) -> None:
        self.candidates, self.block = candidates, block[:2]
        self.squares: dict[str, Tensor] = {}
        self.sizes: dict[str, Tensor] = {}
        """Number of weights of each block, [taps, K / bo, C / bi]."""
        for name, shape in candidates.shapes.items():
            squares = candidates.scores(name).square().reshape(conv_shape(shape))
            if not squares.isfinite().all():
                raise ValueError(f"score of {name!r} must have finite squares, got one of {float(squares.max())}")
            # Permutations do not move taps, so the taps of a block are added up to one number per pair of channels.
            self.squares[name] = _taps_first(block_sums(squares, (1, 1, *block[2:])))
            self.sizes[name] = _taps_first(block_sizes(conv_shape(shape), block))
        self.sums = {name: self._block_sums(name) for name in self.squares}
        self.total = sum(float(squares.sum()) for squares in self.squares.values()) or 1.0
        self.channels = {group: torch.arange(group.width, device="cpu") for group in groups}

    def run(self) -> ChannelPermutation:
        before = best = last = self._retained()
        best_channels = dict(self.channels)
        for group in self.channels:
            self._permute(group, self._channel_scores(group).argsort(descending=True, stable=True))
        number = 0
        while True:
            number += 1
            for group in self.channels:
                self._reassign(group, self._soft_weights() if number <= _SOFT_ROUNDS else self._kept_blocks())
            retained = self._retained()
            if retained > best + _MIN_GAIN:
                best, best_channels = retained, dict(self.channels)
            if number > _SOFT_ROUNDS and retained <= last + _MIN_GAIN:
                return ChannelPermutation(best_channels, (before, best))
            last = retained

    def _scored_members(self, group: DependencyGroup) -> list[tuple[str, int, int]]:
        return [member for member in _members(group) if member[0] in self.squares]

    def _block_sums(self, name: str) -> Tensor:
        return block_sums(self.squares[name], (1, *self.block))

    def _kept_blocks(self) -> dict[str, Tensor]:
        """The blocks that `prune` would keep now, bool."""
        scores = {name: (sums / self.sizes[name]).sqrt() for name, sums in self.sums.items()}
        return select_blocks(scores, self.sizes, self.candidates.targets)

    def _retained(self) -> float:
        return sum(float(self.sums[name][kept].sum()) for name, kept in self._kept_blocks().items()) / self.total

    def _soft_weights(self) -> dict[str, Tensor]:
        """Weights of blocks before any are pruned: a power of the mean squared score, so that large blocks grow."""
        means = {name: sums / self.sizes[name] for name, sums in self.sums.items()}
        # Relative to the largest mean, because the power of a very small number would be 0.
        unit = max((float(mean.max()) for mean in means.values()), default=0.0) or 1.0
        return {name: (mean / unit).pow(_SOFT_POWER) for name, mean in means.items()}

    def _channel_scores(self, group: DependencyGroup) -> Tensor:
        scores = torch.zeros(group.width, dtype=torch.float64, device="cpu")
        for name, dim, features in self._scored_members(group):
            scores += self.squares[name].sum((0, 2 - dim)).view(group.width, features).sum(1)
        return scores

    def _reassign(self, group: DependencyGroup, block_weights: Mapping[str, Tensor]) -> None:
        """Permute the channels of one group so that the sum of (score * weight of its block) becomes maximal."""
        slot = math.gcd(*(size for size in self.block if size > 1)) or group.width
        slots = -(-group.width // slot)
        gain = torch.zeros(group.width, slots, dtype=torch.float64, device="cpu")
        for name, dim, features in self._scored_members(group):
            size = self.block[dim]
            if features > 1 or size == 1:  # blocks of one channel move with it: nothing to gain
                continue
            across = block_sums(self.squares[name], (1, 1, self.block[1]) if dim == 0 else (1, self.block[0], 1))
            equation = "tkc,tbc->kb" if dim == 0 else "tkc,tkb->cb"
            gains = torch.einsum(equation, across, block_weights[name].double())
            gain += gains.repeat_interleave(size // slot, 1)[:, :slots]
        self._permute(group, assign(gain, slot))

    def _permute(self, group: DependencyGroup, order: Tensor) -> None:
        if order.equal(torch.arange(group.width, device="cpu")):
            return
        self.channels[group] = self.channels[group][order]
        for name, dim, features in self._scored_members(group):
            self.squares[name] = self.squares[name].index_select(1 + dim, _feature_order(order, features))
            self.sums[name] = self._block_sums(name)


def _taps_first(values: Tensor) -> Tensor:
    """[K, C, R, S] as [R S, K, C]."""
    return values.flatten(2).movedim(2, 0).contiguous()


def assign(gain: Tensor, slot_size: int) -> Tensor:
    """Assign items to slots so that no exchange of two items increases the total gain.

    Starts with the items in order, and repeatedly makes the best exchanges of two items in different slots.

    Args:
        gain: float64 [items, slots], gain of each item in each slot.
        slot_size: number of items in each slot; the last slot has fewer if the items do not fill it.

    Returns:
        int64 [items], the item at each position; slot s begins at position slot_size * s.
    """
    items, slots = gain.shape
    order = torch.arange(items, device="cpu")
    slot_of = (order // slot_size).unsqueeze(1)
    empty = gain.new_full((slots * slot_size - items, slots), -math.inf)
    threshold = 1e-12 * float(gain.abs().max()) if gain.numel() else 0.0
    while True:
        current = gain[order]
        change = torch.cat([current - current.gather(1, slot_of), empty])
        # For each pair of slots, the item of the first slot that gains most, or loses least, in the second slot.
        largest, item = change.view(slots, slot_size, slots).max(1)
        exchange = (largest + largest.T).triu(1)
        exchanged = False
        for _ in range(slots // 2):  # exchanges between disjoint pairs of slots do not affect each other
            first, second = divmod(int(exchange.argmax()), slots)
            if float(exchange[first, second]) <= threshold:
                break
            pair = torch.stack([first * slot_size + item[first, second], second * slot_size + item[second, first]])
            order[pair] = order[pair.flip(0)]
            exchange[[first, second]] = exchange[:, [first, second]] = 0
            exchanged = True
        if not exchanged:
            return order
