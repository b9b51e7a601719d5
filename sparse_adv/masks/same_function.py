"""Check that a change of a model's channels left its function unchanged, by comparing outputs on an example input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparse_adv.masks.layers import as_input, run_once


def check_same_function(
    before: nn.Module, after: nn.Module, example_input: Sequence[int] | Tensor, change: str
) -> None:
    """Compare two models on an example input, in eval mode, up to rounding.

    A traced graph shows neither what hooks compute nor numbers that Python code reads from sizes and attributes
    (`layer.out_channels`). Two forward passes show whether the function depends on them.

    Args:
        before, after: the models; they stay as they are.
        example_input: a batch of their input, or the shape [N, C, H, W] of one.
        change: what was done, for the message, such as "removing channels".

    Raises:
        ValueError: if the second model fails or computes something else.
    """
    x = as_input(before, example_input)
    expected = _outputs(before, x)
    try:
        actual = _outputs(after, x)
    except Exception as error:  # the model's own code may raise anything
        raise ValueError(f"{change} breaks this model, {_REASONS}: {error}") from error
    if len(actual) != len(expected) or not all(map(_close, actual, expected)):
        raise ValueError(f"{change} changes what this model computes, {_REASONS}")


_REASONS = (
    "because it depends on something that tracing does not show: a size or an attribute read as a Python number, a "
    "hook, random numbers in eval mode"
)


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [value for value in tree_leaves(run_once(model, x.clone())) if isinstance(value, Tensor)]


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Whether all differences are below the square root of the precision, relative to the largest finite value."""
    if actual.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(actual, expected)
    finite = expected[expected.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    tolerance = torch.finfo(expected.dtype).eps ** 0.5 * scale
    return torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True)
