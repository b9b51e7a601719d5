"""`explain`: which kernel each layer of a model takes, why, and how many multiply-adds (MACs) the masks leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import Layer, maskable, owners, weight_of
from sparse_adv.nn.macs import LayerCall, calls_of, kept_weights
from sparse_adv.nn.masked_conv2d import MaskedConv2d, reason_of
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.ops import PASSES
from sparse_adv.ops.masked_conv2d_plan import missing_kernel


@dataclass(frozen=True)
class Row:
    """One convolution or linear layer in the result of `explain`."""

    layer: str
    weight_shape: tuple[int, ...]
    block: tuple[int, ...] | None
    """The mask's block, cut to the weight's size; None if the layer is dense, or linear (its block does not matter)."""
    kept_weights: int
    """The number of weights that the mask keeps."""
    macs: tuple[int, int] | None
    """MACs of the kept weights and of all weights, for the given input; None without an input or a call."""
    kernels: dict[str, str]
    """The kernel of each pass and the reason: "sparse (table)", "dense (tuned: 1.9 ms, sparse 4.8 ms)". "not called"
    for a layer that does not run under this name, such as one that `sparsify` replaced while a plain list still holds
    the old layer. Empty without an example input if the kernel depends on the input."""
    weight_of: str | None = None
    """The first layer with the same weight, where the weight counts; None if no earlier layer has it."""

    @property
    def weights(self) -> int:
        return torch.Size(self.weight_shape).numel()


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; `str()` makes a table of it."""

    rows: list[Row]

    @property
    def density(self) -> float | None:
        """The fraction of the weights of convolutions and linear layers that is kept; None without such layers."""
        rows = [row for row in self.rows if row.weight_of is None]
        total = sum(row.weights for row in rows)
        return sum(row.kept_weights for row in rows) / total if total else None

    @property
    def mac_density(self) -> float | None:
        """The fraction of these layers' MACs that belongs to kept weights; None without an example input."""
        counts = [row.macs for row in self.rows if row.macs is not None]
        total = sum(dense for _, dense in counts)
        return sum(kept for kept, _ in counts) / total if total else None

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "weight", "block", "density", *PASSES)]
        for row in self.rows:
            cells = (row.layer or "(model)", _times(row.weight_shape), _times(row.block) if row.block else "-")
            lines.append(
                (*cells, f"{row.kept_weights / max(1, row.weights):.4f}", *(row.kernels.get(p, "?") for p in PASSES))
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, self._totals()])

    def _totals(self) -> str:
        if self.density is None:
            return "the model has no linear layers and no 2-D convolutions"
        macs = self.mac_density
        remains = "unknown without an example input" if macs is None else f"{macs:.4f}"
        kinds = {"linear" if len(row.weight_shape) == 2 else "convolution" for row in self.rows}
        return f"density of {' and '.join(sorted(kinds))} weights: {self.density:.4f}; of multiply-adds: {remains}"


@checks_types
def explain(model: nn.Module, example_input: Sequence[int] | Tensor | None = None) -> Explanation:
    """Tell which kernel each pass of each convolution and linear layer uses, and why.

    Args:
        model: any model; it runs one forward pass, in eval mode, if an input is given.
        example_input: a batch of its input, or the shape [N, C, H, W] of one. Without it, kernels that depend on the
            input are not known, and MACs are not counted.

    Returns:
        A row per layer, and the densities of weights and MACs; `str()` makes a table of it.

    Raises:
        ValueError: if `example_input` is neither a tensor nor 4 positive integers.

    Examples:
        >>> from sparse_adv.nn import sparsify
        >>> model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": torch.rand(8, 3, 3, 3) < 0.1})
        >>> explain(model, (1, 3, 8, 8)).rows[0].kernels["forward"]
        'dense (table)'
    """
    calls: dict[Layer, list[LayerCall]] = {}
    for call in () if example_input is None else calls_of(model, example_input):
        calls.setdefault(call.layer, []).append(call)
    layers = maskable(model)
    owner = owners(layers)
    return Explanation(
        [
            _row(name, layer, None if example_input is None else calls.get(layer, []), owner[name])
            for name, layer in layers.items()
        ]
    )


def _row(name: str, layer: Layer, calls: Sequence[LayerCall] | None, owner: str) -> Row:
    """Describe a layer by its last call; `calls` is None without an input, `owner` the first layer with this weight."""
    weight = weight_of(layer)
    weights, kept = weight.numel(), kept_weights(layer)
    if calls:
        kernels = {name: f"{planned.kernel} ({planned.reason})" for name, planned in calls[-1].plan._asdict().items()}
    elif calls is not None:
        kernels = dict.fromkeys(PASSES, "not called")
    else:
        kernels = _kernels_without_input(layer)
    block = tuple(map(min, layer.block, weight.shape)) if isinstance(layer, MaskedConv2d) else None
    count = sum(call.uses for call in calls or ())
    macs = (count * kept, count * weights) if calls else None
    return Row(name, tuple(weight.shape), block, kept, macs, kernels, None if owner == name else owner)


def _kernels_without_input(layer: Layer) -> dict[str, str]:
    """The kernels that are the same for every input; empty if the plan depends on the input."""
    if not isinstance(layer, MaskedConv2d):
        return dict.fromkeys(PASSES, "dense (linear)" if isinstance(layer, MaskedLayer) else "dense (no mask)")
    missing = missing_kernel(layer.pattern, layer.weight.dtype, layer.weight.device.type)
    if missing:
        return dict.fromkeys(PASSES, f"dense ({missing})")
    if layer.choices is None or torch.are_deterministic_algorithms_enabled():
        return {}
    return {name: f"{choice['kernel']} ({reason_of(choice)})" for name, choice in layer.choices.items()}


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
