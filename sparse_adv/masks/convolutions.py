"""The convolutions of a model: which there are, and what flows through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn

Visit = Callable[[nn.Conv2d, Tensor, Tensor], None]


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Every Conv2d of the model by its name; one that has several names appears under the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def unknown_module(name: str, known: Iterable[str]) -> str:
    """A sentence's worth about a module name that the model does not have, with the nearest that it has."""
    near = get_close_matches(name, known, n=1)
    return f"model has no module {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def run_once(model: nn.Module, sample: Sequence[int] | Tensor, visit: Visit) -> None:
    """Run one forward pass that calls `visit(layer, input, output)` at each convolution, and leave the model as it was.

    The pass is in eval mode, so that no BatchNorm statistics move, and forms no gradients.

    Args:
        model: any module.
        sample: its input, or the input's shape [N, C, H, W] to be filled with noise.
        visit: called each time a Conv2d runs.
    """

    def hook(layer: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
        visit(layer, args[0], output)

    handles = [layer.register_forward_hook(hook) for layer in convolutions(model).values()]
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


def _noise(model: nn.Module, shape: Sequence[int]) -> Tensor:
    if len(shape) != 4 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"shape must be 4 positive integers [N, C, H, W], got {tuple(shape)}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # A generator of its own: the user's random numbers stay as they are.
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(like)
