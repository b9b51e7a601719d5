"""From scores to masks: which weights to keep, across layers and within blocks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.masks.dependency_graph import channel_groups
from sparse_adv.masks.layers import maskable, unknown_module
from sparse_adv.ops.masked_conv2d_mask import check_block

log = logging.getLogger(__name__)

Score = Callable[[str, Tensor], Tensor]


def _magnitude(name: str, weight: Tensor) -> Tensor:
    return weight.abs()


def _relative_magnitude(name: str, weight: Tensor) -> Tensor:
    size = weight.abs().double().cpu()
    # NumPy's mean does not depend on the number of threads. A layer of zeros scores 0 throughout.
    mean = float(size.numpy().mean()) if size.numel() else 0.0
    return size / mean if mean > 0 else size


_SCORES: dict[str, Score] = {"magnitude": _magnitude, "relative_magnitude": _relative_magnitude}
_SCOPES = ("global", "uniform", "erk")
_STRUCTURED = ("filter", "channel")


def prune(
    model: nn.Module,
    density: float = 0.1,
    block: Sequence[int] | str = (1, 1),
    scope: str = "global",
    score: str | Score = "magnitude",
    exclude: Collection[str] = (),
    linear: bool = False,
    couple: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
    """Choose the weights to keep: those with the highest scores, `density` of all.

    Every Conv2d weight is a candidate, with `linear=True` every Linear weight too, and nothing else: biases and
    normalisation stay dense. The model is not changed; `sparse_adv.sparsify(model, masks)` does that. Masks of boosting
    tickets (Li et al. 2020, as in their code) come from `scope="global", score="relative_magnitude", linear=True`.

    Args:
        model: any module, sparse already or not.
        density: fraction of the weights to keep, in [0, 1].
        block: `(bo, bi)` or `(bo, bi, br, bs)`: weights of one block share their fate; a block scores the mean square
            of its weights' scores. A linear layer's weight [K, C] counts as [K, C, 1, 1]. "filter" makes one block of
            all weights of an output channel, "channel" of all that read an input channel: `nn.shrink` removes these.
        scope: how the kept weights are shared out among layers. "global": one ranking of all. "uniform": the same
            density in each layer. "erk": Erdos-Renyi-kernel, density of a layer proportional to
            (K + C + R + S) / (K C R S), for linear layers (K + C) / (K C), at most 1 (Evci et al. 2020, section 3).
        score: "magnitude", |w|; "relative_magnitude", |w| over the layer's mean |w|; or a function of (module name,
            weight) that returns a tensor of the weight's shape, nowhere negative.
        exclude: names of layers that stay dense; they get no mask.
        linear: whether Linear weights are candidates, ranked together with the convolutions'.
        couple: with block="filter" the shape [N, C, H, W] of the model's input, or a sample of it: filters whose
            outputs are added in a residual sum then share their fate, so that the sum, too, gets narrower.

    Returns:
        A bool mask of the weight's shape, on its device, for each candidate. Their number of kept weights is
        `round(density * count)`, over the model ("global") or in each layer, as near as whole blocks allow. Of equal
        scores, the first in order of module, then index, is kept.

    Raises:
        ValueError: if an argument is out of its range, or a score is NaN, negative or of another shape.
    """
    if isinstance(block, str):
        if block not in _STRUCTURED:
            raise ValueError(f"block must be a block shape or one of {', '.join(_STRUCTURED)}, got {block!r}")
    else:
        block = check_block(block)
    if couple is not None and block != "filter":
        raise ValueError(f'couple needs block="filter", got block={block!r}')
    found = candidates(model, density, scope, score, exclude, linear)
    blocks = {name: _block_of(block, four_sizes(shape)) for name, shape in found.shapes.items()}
    scores = {name: _block_scores(found.scores(name), blocks[name]) for name in found.shapes}
    sizes = {name: block_sizes(four_sizes(shape), blocks[name]) for name, shape in found.shapes.items()}
    leader = _leaders(model, couple, found.shapes)
    kept = keep_blocks(*_together(scores, sizes, leader), _of_leaders(found.targets, leader))

    masks = {}
    for name, weight in found.weights.items():
        first = found.owner[name]
        chosen, shape = kept[leader[first]], four_sizes(weight.shape)
        masks[name] = _whole_blocks(chosen, blocks[first], shape).reshape(weight.shape).to(weight.device)
        if density > 0 and not chosen.any():
            log.warning("prune keeps no weight of %r: nothing passes through this layer", name)
    return masks


@dataclass(frozen=True)
class Candidates:
    """What is ranked: the weights that may be pruned, and how many of them to keep."""

    weights: dict[str, Tensor]
    owner: dict[str, str]
    """Of each layer the first one that uses its weight: a tied weight is counted and ranked once."""
    shapes: dict[str, torch.Size]
    """Of the weights that are ranked, by their first layer."""
    targets: dict[tuple[str, ...], int]
    """How many weights to keep in each group of layers that is ranked together."""
    rule: Score

    def scores(self, name: str) -> Tensor:
        """A layer's scores, float64 on the CPU, of its weight's shape; raises ValueError if there is a bad one."""
        return _checked_scores(self.rule, name, self.weights[name])


def candidates(
    model: nn.Module, density: float, scope: str, score: str | Score, exclude: Collection[str], linear: bool
) -> Candidates:
    """What `prune` ranks; raises ValueError as it does."""
    if not isinstance(density, int | float) or not 0 <= density <= 1:
        raise ValueError(f"density must be a number in [0, 1], got {density!r}")
    if scope not in _SCOPES:
        raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {scope!r}")
    if not callable(score) and score not in _SCORES:
        raise ValueError(f"score must be a function or one of {', '.join(_SCORES)}, got {score!r}")
    layers = maskable(model, linear)
    for name in exclude:
        if name not in layers:
            raise ValueError(f"exclude: {unknown_module(name, layers)}")
    weights = {name: layer.weight.detach() for name, layer in layers.items() if name not in exclude}
    first: dict[int, str] = {}
    owner = {name: first.setdefault(id(layers[name].weight), name) for name in weights}
    shapes = {name: weights[name].shape for name in first.values()}
    rule = score if callable(score) else _SCORES[score]
    return Candidates(weights, owner, shapes, _targets(shapes, float(density), scope), rule)


def _block_of(block: Sequence[int] | str, shape: Sequence[int]) -> tuple[int, ...]:
    """The block's sizes in a weight of this shape."""
    if block == "filter":
        return (1, *shape[1:])
    if block == "channel":
        return (shape[0], 1, *shape[2:])
    assert not isinstance(block, str)
    return tuple(block)


def _leaders(model: nn.Module, couple: Sequence[int] | Tensor | None, names: Collection[str]) -> dict[str, str]:
    """For each layer the first one that shares its fate, filter by filter: itself, if no sum joins it to another."""
    leader = {name: name for name in names}
    if couple is not None:
        for group in channel_groups(model, couple):
            members = [name for name in group.producers if name in leader]
            leader |= dict.fromkeys(members, members[0]) if members else {}
    return leader


def _of_leaders(targets: Mapping[tuple[str, ...], int], leader: Mapping[str, str]) -> dict[tuple[str, ...], int]:
    """The targets of groups of layers, members counted with their leader."""
    merged: dict[tuple[str, ...], int] = {}
    for names, target in targets.items():
        first = tuple(dict.fromkeys(leader[name] for name in names))
        merged[first] = merged.get(first, 0) + target
    return merged


def _together(
    scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], leader: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and sizes of each leader's filters with those that share their fate: root mean square, and sum."""
    joined: dict[str, list[str]] = {}
    for name, first in leader.items():
        joined.setdefault(first, []).append(name)
    merged: dict[str, Tensor] = {}
    total = {first: torch.stack([sizes[name] for name in names]).sum(0) for first, names in joined.items()}
    for first, names in joined.items():
        squares = [scores[name].square() * sizes[name] for name in names]
        alone = len(names) == 1  # its own scores then, to the last bit
        merged[first] = scores[first] if alone else (torch.stack(squares).sum(0) / total[first]).sqrt()
    return merged, total


def _checked_scores(rule: Score, name: str, weight: Tensor) -> Tensor:
    found = rule(name, weight)
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"score of {name!r} must be a tensor of the weight's shape {tuple(weight.shape)}, got {what}")
    found = found.detach().double().cpu()
    if found.isnan().any():
        raise ValueError(f"score of {name!r} is NaN in {int(found.isnan().sum())} places, so it cannot be ranked")
    if (found < 0).any():
        raise ValueError(f"score of {name!r} must not be negative, got {float(found.min()):g}")
    return found


def four_sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """[K, C] of a linear layer as [K, C, 1, 1]."""
    return (*shape, 1, 1)[:4]


def _block_scores(scores: Tensor, block: Sequence[int]) -> Tensor:
    """The root mean square of each block's scores; for single weights the scores themselves, which rank the same."""
    scores = scores.reshape(four_sizes(scores.shape))
    if math.prod(block) == 1:
        return scores
    return (block_sums(scores.square(), block) / block_sizes(scores.shape, block)).sqrt()


def block_sums(values: Tensor, block: Sequence[int]) -> Tensor:
    """The sum over each block; the block has a size for each dimension, and is smaller at the edges."""
    grid = [-(-length // size) for length, size in zip(values.shape, block, strict=True)]
    whole = [count * size for count, size in zip(grid, block, strict=True)]
    if whole != list(values.shape):
        padded = values.new_zeros(whole)
        padded[tuple(slice(length) for length in values.shape)] = values
        values = padded
    split = [length for pair in zip(grid, block, strict=True) for length in pair]
    return values.reshape(split).sum(tuple(range(1, len(split), 2)))


def block_sizes(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """How many weights each block has: fewer at the edges."""
    sizes = torch.ones(1, dtype=torch.int64)
    for length, size in zip(shape, block, strict=True):
        sizes = sizes.unsqueeze(-1) * torch.tensor([min(size, length - start) for start in range(0, length, size)])
    return sizes.squeeze(0)


def _whole_blocks(kept: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(block):
        kept = kept.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return kept.contiguous()


def _targets(shapes: Mapping[str, torch.Size], density: float, scope: str) -> dict[tuple[str, ...], int]:
    """How many weights to keep in each group of layers that is ranked together."""
    if scope == "global":
        return {tuple(shapes): round(density * sum(shape.numel() for shape in shapes.values()))}
    densities = _erk_densities(shapes, density) if scope == "erk" else dict.fromkeys(shapes, density)
    return {(name,): round(densities[name] * shape.numel()) for name, shape in shapes.items()}


def _erk_densities(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """min(1, scale * (sum of sizes) / (product of sizes)), the scale such that the whole has the wanted density.

    A layer whose share exceeds 1 is kept whole, and what is left goes to the others by the same rule.
    """
    whole: set[str] = set()
    budget = density * sum(shape.numel() for shape in shapes.values())
    while True:
        rest = {name: shape for name, shape in shapes.items() if name not in whole}
        left = budget - sum(shapes[name].numel() for name in whole)
        scale = left / sum(sum(shape) for shape in rest.values()) if rest else 0.0
        over = {name for name, shape in rest.items() if scale * sum(shape) > shape.numel()}
        if not over:
            return dict.fromkeys(whole, 1.0) | {n: scale * sum(shape) / shape.numel() for n, shape in rest.items()}
        whole |= over


def keep_blocks(
    scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], targets: Mapping[tuple[str, ...], int]
) -> dict[str, Tensor]:
    """The blocks kept in each layer: of each group the highest, until its target is met as nearly as can be."""
    kept: dict[str, Tensor] = {}
    for names, target in targets.items():
        if not names:
            continue
        order = torch.cat([scores[name].flatten() for name in names]).argsort(descending=True, stable=True)
        totals = torch.cat([sizes[name].flatten() for name in names])[order].cumsum(0)
        count = int(torch.searchsorted(totals, target, right=True))
        missing = target - int(totals[count - 1]) if count else target
        if count < len(totals) and int(totals[count]) - target < missing:
            count += 1
        flags = torch.zeros(len(totals), dtype=torch.bool)
        flags[order[:count]] = True
        parts = flags.split([scores[name].numel() for name in names])
        kept |= {name: part.reshape(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return kept
