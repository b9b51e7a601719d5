"""How the weights that masks keep are distributed over the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

SCOPES = ("global", "uniform", "erk", "igq")

_BISECTIONS = 200
"""Enough to reach neighbouring float64 numbers."""


def targets_of(shapes: Mapping[str, torch.Size], density: float, scope: str) -> dict[tuple[str, ...], int]:
    """Return, for each set of layers that is ranked together, the number of weights to keep.

    Args:
        shapes: shapes of the weights by layer.
        density: fraction of all weights to keep, in [0, 1].
        scope: one of `SCOPES`, as `masks.prune` explains them.

    Examples:
        >>> shapes = {"a": torch.Size([10, 10]), "b": torch.Size([30, 10])}
        >>> targets_of(shapes, 0.1, "global"), targets_of(shapes, 0.1, "igq")
        ({('a', 'b'): 40}, {('a',): 19, ('b',): 21})
    """
    if scope == "global":
        return {tuple(shapes): round(density * sum(shape.numel() for shape in shapes.values()))}
    allocate = _ALLOCATIONS[scope]
    densities = allocate(shapes, density)
    return {(name,): round(densities[name] * shape.numel()) for name, shape in shapes.items()}


def _uniform(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    return dict.fromkeys(shapes, density)


def _erk(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """min(1, scale * (sum of sizes) / (product of sizes)) for each layer, with the scale that gives the total density.

    Layers whose density would exceed 1 are kept whole, and the scale is computed again for the remaining layers.
    """
    whole: set[str] = set()
    budget = density * sum(shape.numel() for shape in shapes.values())
    while True:
        remaining = {name: shape for name, shape in shapes.items() if name not in whole}
        weights_left = budget - sum(shapes[name].numel() for name in whole)
        scale = weights_left / sum(sum(shape) for shape in remaining.values()) if remaining else 0.0
        densities = {name: scale * sum(shape) / max(1, shape.numel()) for name, shape in remaining.items()}
        over = {name for name, shape in remaining.items() if scale * sum(shape) > shape.numel()}
        if not over:
            return dict.fromkeys(whole, 1.0) | densities
        whole |= over


def _igq(shapes: Mapping[str, torch.Size], density: float) -> dict[str, float]:
    """1 / (1 + force * n) for a layer of n weights; bisection finds the force that gives the total density."""
    counts = {name: shape.numel() for name, shape in shapes.items()}
    budget = density * sum(counts.values())
    if budget <= 0:
        return dict.fromkeys(shapes, 0.0)

    def densities(force: float) -> dict[str, float]:
        return {name: 1 / (1 + force * count) for name, count in counts.items()}

    # A layer keeps less than 1 / force weights, so this force keeps too few.
    low, high = 0.0, len(counts) / budget
    for _ in range(_BISECTIONS):
        force = (low + high) / 2
        kept = sum(share * counts[name] for name, share in densities(force).items())
        low, high = (force, high) if kept > budget else (low, force)
    return densities(high if density < 1 else 0.0)


_ALLOCATIONS: dict[str, Callable[[Mapping[str, torch.Size], float], dict[str, float]]] = {
    "uniform": _uniform,
    "erk": _erk,
    "igq": _igq,
}
