"""`explain`: which kernel each layer of a model takes, why, and what the masks leave of its work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_adv.masks.layers import Layer, maskable, run_once, uses
from sparse_adv.nn.masked_conv2d import Choice, MaskedConv2d
from sparse_adv.nn.masked_linear import MaskedLinear
from sparse_adv.ops import PASSES


@dataclass(frozen=True)
class Row:
    """One convolution or linear layer."""

    layer: str
    weight_shape: tuple[int, ...]
    block: tuple[int, int, int, int] | None
    """None: the layer is dense, or linear and makes nothing of blocks."""
    kept: int
    """Number of weights kept."""
    multiply_adds: tuple[int, int] | None
    """Kept and of the dense layer, for the given input; None if no input shape was given."""
    kernels: dict[str, str]
    """For each pass, the kernel and why: "sparse (table)", "dense (tuned: 1.9 ms, sparse 4.8 ms)"."""

    @property
    def weights(self) -> int:
        return torch.Size(self.weight_shape).numel()


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `str()` makes a table of it."""

    rows: list[Row]

    @property
    def density(self) -> float | None:
        """The fraction of the weights of convolutions and linear layers that is kept; None if there are none."""
        total = sum(row.weights for row in self.rows)
        return sum(row.kept for row in self.rows) / total if total else None

    @property
    def multiply_add_density(self) -> float | None:
        """The fraction of these layers' multiply-adds that remains; None without an input shape."""
        counts = [row.multiply_adds for row in self.rows if row.multiply_adds is not None]
        total = sum(dense for _, dense in counts)
        return sum(kept for kept, _ in counts) / total if total else None

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("layer", "weight", "block", "density", *PASSES)]
        for row in self.rows:
            cells = (row.layer or "(model)", _times(row.weight_shape), _times(row.block) if row.block else "-")
            lines.append((*cells, f"{row.kept / max(1, row.weights):.4f}", *(row.kernels.get(p, "?") for p in PASSES)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*table, self._totals()])

    def _totals(self) -> str:
        if self.density is None:
            return "the model has no linear layers and no convolutions"
        work = self.multiply_add_density
        remains = "unknown without an input shape" if work is None else f"{work:.4f}"
        kinds = {"linear" if len(row.weight_shape) == 2 else "convolution" for row in self.rows}
        return f"density of {' and '.join(sorted(kinds))} weights: {self.density:.4f}; of multiply-adds: {remains}"


def explain(model: nn.Module, shape: Sequence[int] | Tensor | None = None) -> Explanation:
    """Say which kernel each pass of each convolution and linear layer takes, and why.

    Args:
        model: any model; it runs one forward pass, in eval mode, if a shape is given.
        shape: shape [N, C, H, W] of its input, or a sample of it. Without it, only tuned layers tell their kernels,
            and multiply-adds are not counted.
    """
    inputs: dict[Layer, Tensor] = {}
    counts: dict[Layer, int] = {}

    def visit(layer: Layer, input: Tensor, output: Tensor) -> None:
        inputs[layer] = input
        counts[layer] = counts.get(layer, 0) + uses(layer, output)

    if shape is not None:
        run_once(model, shape, visit, linear=True)
    return Explanation([_row(name, layer, inputs.get(layer), counts) for name, layer in maskable(model).items()])


def _row(name: str, layer: Layer, input: Tensor | None, counts: dict[Layer, int]) -> Row:
    weights, count, shape = layer.weight.numel(), counts.get(layer), tuple(layer.weight.shape)
    kept, block, paths = weights, None, dict.fromkeys(PASSES, "dense (no mask)")
    if isinstance(layer, MaskedConv2d):
        kept, block, paths = int(layer.weight_mask.count_nonzero()), layer.block, _paths(layer, input)
    elif isinstance(layer, MaskedLinear):
        kept, paths = int(layer.weight_mask.count_nonzero()), dict.fromkeys(PASSES, "dense (linear)")
    return Row(name, shape, block, kept, None if count is None else (count * kept, count * weights), paths)


def _paths(layer: MaskedConv2d, input: Tensor | None) -> dict[str, str]:
    weight = layer.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        kind = f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}"
        return dict.fromkeys(PASSES, f"dense (no sparse kernel for {kind})")
    deterministic = torch.are_deterministic_algorithms_enabled()
    if layer.choices is not None and not deterministic:
        return {name: _tuned(layer.choices[name]) for name in PASSES}
    if input is None:
        return {}
    why = "deterministic" if deterministic else "table"
    return {name: f"{path} ({why})" for name, path in layer.paths(input).items()}


def _tuned(choice: Choice) -> str:
    if "sparse_ms" not in choice or "dense_ms" not in choice:
        return f"{choice['kernel']} (given)"
    sparse, dense = f"{choice['sparse_ms']:.3g} ms", f"{choice['dense_ms']:.3g} ms"
    if choice["kernel"] == "sparse":
        return f"sparse (tuned: {sparse}, dense {dense})"
    return f"dense (tuned: {dense}, sparse {sparse})"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
