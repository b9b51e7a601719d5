"""`prune`: masks from scores, in one ranking or per layer, for single weights, blocks, filters or channels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.allocation import SCOPES, targets_of
from sparse_adv.masks.blocks import block_in, block_sizes, block_sums, check_structure, conv_shape
from sparse_adv.masks.dependency_graph import dependency_groups
from sparse_adv.masks.layers import (
    Layer,
    check_initialized,
    check_whole,
    computes_as_its_class,
    has_own_parameters,
    is_uninitialized,
    listed,
    maskable,
    naming,
    owners,
    unknown_module,
    weight_of,
)
from sparse_adv.masks.selection import select_blocks
from sparse_adv.ops.masked_conv2d_mask import check_mask, expand_blocks

log = logging.getLogger(__name__)

_NEVER_MASKED = (nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Layers that one may expect to be pruned but that have no masked form."""

Score = Callable[[str, Tensor], Tensor]
"""score(module name, weight) -> scores of the weight's shape, at least 0."""


def _magnitude(name: str, weight: Tensor) -> Tensor:
    return weight.abs()


def _relative_magnitude(name: str, weight: Tensor) -> Tensor:
    magnitude = weight.abs().double().cpu()
    # NumPy's mean, unlike PyTorch's, does not depend on the number of threads. Scores of an all-zero layer are 0.
    mean = float(magnitude.numpy().mean()) if magnitude.numel() else 0.0
    return magnitude / mean if mean > 0 else magnitude


_SCORES: dict[str, Score] = {"magnitude": _magnitude, "relative_magnitude": _relative_magnitude}


@checks_types
def prune(
    model: nn.Module,
    density: float = 0.1,
    block: Sequence[int] | str = (1, 1),
    *,
    scope: str = "global",
    score: str | Score = "magnitude",
    exclude: Collection[str] = (),
    linear: bool = False,
    example_input: Sequence[int] | Tensor | None = None,
    within: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return masks that keep the weights with the highest scores, a fraction `density` of all.

    Candidates are all Conv2d weights and, with `linear=True`, all Linear weights; biases and normalisation are never
    pruned. Nor are layers of a subclass with its own forward, or with a weight that is computed from something else
    (`torch.nn.utils.prune`, `parametrize`); a log message names these. Another one tells if linear layers that stay
    dense hold more than half of the weights, as in a vision transformer. The model is not changed;
    `sparse_adv.sparsify(model, masks)` applies the masks. For the masks of boosting tickets (Li et al. 2020, as in
    their code) pass `density=0.2, scope="global", score="relative_magnitude", linear=True`, the defaults of
    `PruneConfig`.

    Args:
        model: any module, dense or sparse.
        density: fraction of the weights to keep, in [0, 1].
        block: `(bo, bi)` or `(bo, bi, br, bs)`: the weights of each block of bo output channels, bi input channels, br
            filter rows and bs filter columns are kept or pruned together, ranked by the mean square of their scores. A
            linear layer's weight [K, C] counts as [K, C, 1, 1]. "filter": all weights of an output channel form a
            block; "channel": all weights that read an input channel (in a grouped convolution, those of one group of
            filters). `nn.shrink` removes pruned filters and channels. In a trained network, BatchNorm's biases prevent
            that for most of them, unless `nn.zero_dead_channels` is called first.
        scope: how the kept weights are distributed over layers. "global": one ranking of all weights. "uniform": the
            same density in each layer. "erk" (Erdos-Renyi-kernel): the density of each layer is proportional to (K + C
            + R + S) / (K C R S), for linear layers (K + C) / (K C), but at most 1. "igq" (ideal gas quotas): a layer of
            n weights keeps n / (1 + f n) of them, with one f for all layers.
        score: "magnitude": |w|. "relative_magnitude": |w| / (mean |w| of the layer). Or a function of (module name,
            weight) that returns a tensor of the weight's shape without negative values.
        exclude: names of convolutions and linear layers that are not candidates and get no mask.
        linear: whether Linear weights are candidates too, ranked together with the convolutions'.
        example_input: only with block="filter": a batch of the model's input, or the shape [N, C, H, W] of one. Filters
            whose outputs are added in a residual sum are then kept or pruned together (see `dependency_groups`), so
            that the sum gets fewer channels too. None ranks each filter by itself.
        within: masks of an earlier pruning by module name. A block in which they prune a weight is not kept, whatever
            its score is. So the masks may keep fewer weights than `density` asks for.

    Returns:
        For each candidate a bool mask with the shape and device of its weight. The masks keep `round(density * n)` of n
        weights, over the whole model ("global") or in each layer, as nearly as whole blocks allow. Among equal scores,
        the first in the order of modules, then of indices, are kept.

    Raises:
        TypeError: if a mask in `within` is not a bool tensor, or a weight is sharded by FSDP.
        ValueError: if an argument is out of range, or a score is NaN or negative or has a wrong shape.

    Source: Frankle and Carbin, "The lottery ticket hypothesis" (ICLR 2019) for magnitude; Evci et al., "Rigging the
    lottery" (ICML 2020), section 3, for ERK; Vysogorets and Kempe, "Connectivity matters" (JMLR 2023), for IGQ.

    Examples:
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
        >>> kept = masks.prune(model, density=0.25, block=(4, 1))
        >>> {name: tuple(mask.shape) for name, mask in kept.items()}
        {'0': (16, 3, 3, 3), '2': (16, 16, 3, 3)}
        >>> masks.density(kept)
        0.25
    """
    block = check_structure(block)
    if example_input is not None and block != "filter":
        raise ValueError(f'example_input needs block="filter", got block={block!r}')
    candidates = Candidates.of(model, density, scope, score, exclude, linear)
    blocks = {
        name: block_in(shape, block, getattr(model.get_submodule(name), "groups", 1))
        for name, shape in candidates.shapes.items()
    }
    scores = {name: _block_scores(candidates.scores(name), blocks[name]) for name in candidates.shapes}
    sizes = {name: block_sizes(conv_shape(shape), blocks[name]) for name, shape in candidates.shapes.items()}
    targets = candidates.targets
    first_of_group = _first_of_group(model, example_input, candidates.shapes)
    if example_input is not None:
        scores, sizes = _joint_scores(scores, sizes, first_of_group)
        targets = _joint_targets(targets, first_of_group)
    pruned = _pruned_before(model, within or {}, candidates, blocks, first_of_group)
    # Kept weights can be 0 too, so weights that were pruned rank after them.
    scores |= {name: scores[name].masked_fill(before, -1) for name, before in pruned.items()}
    kept_blocks = select_blocks(scores, sizes, targets)
    kept_blocks |= {name: kept_blocks[name] & ~before for name, before in pruned.items()}

    masks, empty = {}, []
    for name, weight in candidates.weights.items():
        owner = candidates.owner[name]
        kept, shape = kept_blocks[first_of_group[owner]], conv_shape(weight.shape)
        masks[name] = expand_blocks(kept, blocks[owner], shape).reshape(weight.shape).to(weight.device)
        if density > 0 and not kept.any():
            empty.append(name)
    if empty:
        log.warning("prune keeps no weight of %s, whose output will be constant", listed(empty))
    return masks


@dataclass(frozen=True)
class Candidates:
    """The weights that are ranked, and how many of them are kept."""

    weights: dict[str, Tensor]
    owner: dict[str, str]
    """For each layer, the first layer with the same weight: a shared weight is counted and ranked once."""
    shapes: dict[str, torch.Size]
    """Shapes of the weights that are ranked, by their owner."""
    targets: dict[tuple[str, ...], int]
    """The number of weights to keep, for each set of layers that is ranked together."""
    score: Score

    @classmethod
    def of(
        cls,
        model: nn.Module,
        density: float,
        scope: str,
        score: str | Score,
        exclude: Collection[str],
        linear: bool,
    ) -> Candidates:
        """Collect the candidates of a model; arguments and errors are those of `prune`."""
        if not isinstance(density, int | float) or not 0 <= density <= 1:
            raise ValueError(f"density must be a number in [0, 1], got {density!r}")
        if scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
        if not callable(score) and score not in _SCORES:
            raise ValueError(f"score must be a function or one of {', '.join(_SCORES)}, got {score!r}")
        layers, excluded = maskable(model, linear), _layers_of(exclude, model)
        candidates = {name: layer for name, layer in layers.items() if layer not in excluded}
        for name, layer in candidates.items():
            with naming(name):
                check_whole(layer)
        others = _log_unprunable(model, candidates)
        for name, layer in candidates.items():
            check_initialized(name, layer)
        weights = {name: weight_of(layer).detach() for name, layer in candidates.items() if name not in others}
        owner = owners({name: layers[name] for name in weights})
        shapes = {name: weights[name].shape for name in dict.fromkeys(owner.values())}
        function = score if callable(score) else _SCORES[score]
        if not linear:
            _warn_of_small_share(shapes, [layer for layer in maskable(model).values() if layer not in excluded])
        return cls(weights, owner, shapes, targets_of(shapes, float(density), scope), function)

    def scores(self, name: str) -> Tensor:
        """Return the scores of a layer, float64 on the CPU; raise ValueError if shape or values are invalid."""
        weight = self.weights[name]
        if weight.is_meta:
            raise ValueError(f"model: the weight of {name!r} is on the meta device and has no values to rank")
        scores = self.score(name, weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            actual = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"score of {name!r} must be a tensor of the weight's shape {tuple(weight.shape)}, got {actual}"
            )
        if scores.is_complex():
            raise ValueError(f"score of {name!r} must be real, got {scores.dtype}")
        scores = scores.detach().double().cpu()
        if scores.isnan().any():
            raise ValueError(f"score of {name!r} must not be NaN, got {int(scores.isnan().sum())} NaN values")
        if (scores < 0).any():
            raise ValueError(f"score of {name!r} must not be negative, got {float(scores.min()):g}")
        return scores


def _log_unprunable(model: nn.Module, candidates: Mapping[str, Layer]) -> set[str]:
    """Return the candidates that `sparsify` refuses; log their names and the names of convolutions of other kinds."""
    own_forward = [name for name, layer in candidates.items() if not computes_as_its_class(layer)]
    computed = [name for name, layer in candidates.items() if not has_own_parameters(layer) and name not in own_forward]
    others = [name for name, module in model.named_modules() if isinstance(module, _NEVER_MASKED)]
    reasons = {
        "they have a forward of their own": own_forward,
        "weight or bias is computed from something else (nn.utils.prune or parametrize)": computed,
        "only Conv2d and Linear layers can be masked": others,
    }
    told = "; ".join(f"as {reason}: {', '.join(names)}" for reason, names in reasons.items() if names)
    if told:
        # If there are only convolutions of other kinds, no warning: nobody may have expected them to be pruned.
        log.log(logging.WARNING if own_forward or computed else logging.INFO, "not pruned, %s", told)
    return {*own_forward, *computed}


def _can_be_masked(layer: Layer) -> bool:
    return computes_as_its_class(layer) and has_own_parameters(layer)


def _warn_of_small_share(shapes: Mapping[str, torch.Size], layers: Sequence[Layer]) -> None:
    """Log a warning if the ranked weights are less than half of those that `linear=True` would rank."""
    known = [layer for layer in layers if _can_be_masked(layer) and not is_uninitialized(layer)]
    total = sum({id(layer.weight): layer.weight.numel() for layer in known}.values())
    ranked = sum(shape.numel() for shape in shapes.values())
    if 2 * ranked < total:
        log.warning(
            "linear layers hold %.1f %% of the weights that can be pruned, and stay dense: linear=True prunes "
            "those, too",
            100 * (1 - ranked / total),
        )


def _layers_of(exclude: Collection[str], model: nn.Module) -> set[nn.Module]:
    """The layers of these names; raises ValueError for a name without a convolution or linear layer."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in exclude:
        if name not in modules:
            raise ValueError(f"exclude: {unknown_module(name, maskable(model))}")
        if not isinstance(modules[name], Layer):
            kind = type(modules[name]).__name__
            raise ValueError(f"exclude must name convolutions and linear layers, got {name!r}, a {kind}")
    return {modules[name] for name in exclude}


def _pruned_before(
    model: nn.Module,
    within: Mapping[str, Tensor],
    candidates: Candidates,
    blocks: Mapping[str, Sequence[int]],
    first_of_group: Mapping[str, str],
) -> dict[str, Tensor]:
    """The blocks in which earlier masks prune a weight, by the layer that they are ranked with.

    Masks of layers that are not candidates have no effect.
    """
    names = dict(model.named_modules(remove_duplicate=False))
    for name in within:
        if name not in names:
            raise ValueError(f"within: {unknown_module(name, names)}")
    pruned: dict[str, Tensor] = {}
    for name, owner in candidates.owner.items():
        if name in within:
            mask, shape = within[name], candidates.shapes[owner]
            check_mask(mask, linear=True)
            if mask.shape != shape:
                raise ValueError(
                    f"within: the mask of {name!r} must have shape {tuple(shape)}, got {tuple(mask.shape)}"
                )
            counts = block_sums((~mask).cpu().double().reshape(conv_shape(shape)), blocks[owner])
            first = first_of_group[owner]
            pruned[first] = (counts > 0) | pruned.get(first, torch.zeros_like(counts, dtype=torch.bool))
    return pruned


def _block_scores(scores: Tensor, block: Sequence[int]) -> Tensor:
    """The root mean square of each block's scores; for single weights the scores, because they rank the same."""
    scores = scores.reshape(conv_shape(scores.shape))
    if math.prod(block) == 1:
        return scores
    return (block_sums(scores.square(), block) / block_sizes(scores.shape, block)).sqrt()


def _first_of_group(
    model: nn.Module, example_input: Sequence[int] | Tensor | None, names: Collection[str]
) -> dict[str, str]:
    """The first layer of each layer's dependency group; without `example_input` the layer itself."""
    first = {name: name for name in names}
    if example_input is not None:
        for group in dependency_groups(model, example_input):
            members = [name for name in group.producers if name in first]
            if members:
                first |= dict.fromkeys(members, members[0])
    return first


def _joint_targets(
    targets: Mapping[tuple[str, ...], int], first_of_group: Mapping[str, str]
) -> dict[tuple[str, ...], int]:
    """Targets in which each dependency group counts as its first layer."""
    joint: dict[tuple[str, ...], int] = {}
    for names, target in targets.items():
        firsts = tuple(dict.fromkeys(first_of_group[name] for name in names))
        joint[firsts] = joint.get(firsts, 0) + target
    return joint


def _joint_scores(
    scores: Mapping[str, Tensor], sizes: Mapping[str, Tensor], first_of_group: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores (root mean square) and sizes (sum) of the filters of each dependency group, by its first layer."""
    groups: dict[str, list[str]] = {}
    for name, first in first_of_group.items():
        groups.setdefault(first, []).append(name)
    joint_scores: dict[str, Tensor] = {}
    joint_sizes = {first: torch.stack([sizes[name] for name in names]).sum(0) for first, names in groups.items()}
    for first, names in groups.items():
        squares = torch.stack([scores[name].square() * sizes[name] for name in names])
        # A single layer keeps its own scores, so that squaring and taking the root does not round them.
        joint_scores[first] = scores[first] if len(names) == 1 else (squares.sum(0) / joint_sizes[first]).sqrt()
    return joint_scores, joint_sizes
