"""The layers of a model that masks are for, convolutions and linear ones: which there are, what flows through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

Layer = nn.Conv2d | nn.Linear
Visit = Callable[[Any, Tensor, Tensor], None]


def maskable(model: nn.Module, linear: bool = True) -> dict[str, Layer]:
    """Every Conv2d, and every Linear if asked, by its name; one that has several names appears under the first.

    The output projection of `nn.MultiheadAttention` is none of them: the attention reads its weight and never calls it.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))
    return {name: module for name, module in found if not isinstance(module, NonDynamicallyQuantizableLinear)}


def unknown_module(name: str, known: Iterable[str]) -> str:
    """A sentence's worth about a module name that the model does not have, with the nearest that it has."""
    near = get_close_matches(name, known, n=1)
    return f"model has no module {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def parameter_of(module: str, parameter: str = "weight") -> str:
    """The name of a module's parameter in the model's state dict; the model itself is module ""."""
    return f"{module}.{parameter}" if module else parameter


def run_once(model: nn.Module, sample: Sequence[int] | Tensor, visit: Visit, linear: bool = False) -> None:
    """Run one forward pass that calls `visit(layer, input, output)` at each layer, and leave the model as it was.

    The pass is in eval mode, so that no BatchNorm statistics move, and forms no gradients.

    Args:
        model: any module.
        sample: its input, or the input's shape [N, C, H, W] to be filled with noise.
        visit: called each time a Conv2d runs.
        linear: whether it is called for each Linear too.
    """

    def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        visit(layer, args[0], output)

    handles = [layer.register_forward_hook(hook) for layer in maskable(model, linear).values()]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(sample if isinstance(sample, Tensor) else _noise(model, sample))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def uses(layer: Layer, output: Tensor) -> int:
    """How often a pass with this output multiplied by each of the layer's weights: once per pixel, or per row."""
    return output.numel() // max(1, layer.weight.shape[0])


def _noise(model: nn.Module, shape: Sequence[int]) -> Tensor:
    if len(shape) != 4 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"shape must be 4 positive integers [N, C, H, W], got {tuple(shape)}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # A generator of its own: the user's random numbers stay as they are.
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(like)
