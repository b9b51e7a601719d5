"""The layers of a model that can have masks, convolutions and linear layers, and one forward pass through them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from difflib import get_close_matches
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from sparse_adv.ops.masked_conv2d_mask import check_mask, check_shape

Layer = nn.Conv2d | nn.Linear
_METHODS = frozenset(["forward", "_conv_forward"])
"""The methods of a module that compute its output: `forward`, and the method that a convolution's `forward` calls."""
_LISTED = 5
"""Greatest number of layers that a message names."""
Visit = Callable[[Any, Tensor, Tensor], None]
"""visit(layer, input, output); the layer is a Conv2d or, on request, a Linear."""


def maskable(model: nn.Module, linear: bool = True) -> dict[str, Layer]:
    """Return all Conv2d and, if `linear`, all Linear layers by name; of several names of a layer, the first counts.

    The output projection of `nn.MultiheadAttention` is left out: the attention reads its weight without calling it.
    """
    classes = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, classes))
    return {name: module for name, module in layers if not isinstance(module, NonDynamicallyQuantizableLinear)}


def listed(names: Sequence[str]) -> str:
    """The names of layers for a message: the first few, and how many more there are."""
    first, more = ", ".join(map(repr, names[:_LISTED])), len(names) - _LISTED
    return f"{first} and {more} more layers" if more > 0 else first


def owners(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return, for each layer, the first layer that has the same weight: a weight that layers share counts once."""
    weights = {name: layer if _is_weight_computed(layer) else layer.weight for name, layer in layers.items()}
    first: dict[int, str] = {}
    return {name: first.setdefault(id(weight), name) for name, weight in weights.items()}


def _is_weight_computed(layer: nn.Module) -> bool:
    """Whether code computes the weight whenever it is read (`torch.nn.utils.parametrize`)."""
    return parametrize.is_parametrized(layer, "weight")


def weight_of(layer: Layer) -> Tensor:
    """Return the weight of a layer without changing the layer.

    Reading a parametrized weight runs code that may change the model in train mode: `spectral_norm` makes a step of its
    iteration.
    """
    if not _is_weight_computed(layer):
        return layer.weight
    with evaluating(layer.get_submodule("parametrizations.weight")):
        return layer.weight


def has_own_parameters(layer: nn.Module) -> bool:
    """Return whether weight and bias are Parameters of this layer (or None), not computed from something else."""
    return all(name in layer._parameters for name in ("weight", "bias"))


def is_uninitialized(module: nn.Module) -> bool:
    """Return whether the module is lazy and has no weight yet."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def check_initialized(name: str, module: nn.Module) -> None:
    """Raise ValueError if the module is lazy and has no weight yet."""
    if is_uninitialized(module):
        raise ValueError(f"module {name!r} has no weight yet: run a forward pass first, got {type(module).__name__}")


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP1 or FSDP2 distributes the module's parameters over the processes."""
    return getattr(module, "_is_fsdp_managed_module", False)


def check_whole(module: nn.Module) -> None:
    """Raise TypeError if FSDP shards the module's weight, so that a process holds only a part of it."""
    if is_sharded(module):
        raise TypeError("weight is sharded by FSDP: prune, sparsify, densify or tune the model before FSDP wraps it")


def own_methods(module: nn.Module) -> set[str]:
    """Return the methods computing a layer's output that are set on this very module, not on its class."""
    return vars(module).keys() & _METHODS


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether, hooks aside, a module computes what one of these classes does: nothing overrides its methods."""
    own = type(module)
    inherits = any(all(getattr(own, name, None) is getattr(kind, name, None) for name in _METHODS) for kind in kinds)
    return inherits and not own_methods(module)


def computes_as_its_class(module: nn.Module) -> bool:
    """Return whether this is a Conv2d or Linear, masked or not, with a forward that is not overridden otherwise."""
    if "weight_mask" in module._buffers:
        return isinstance(module, Layer) and not own_methods(module)
    return computes_as(module, nn.Conv2d, nn.Linear)


def modules_by_name(model: nn.Module, wanted: Iterable[str]) -> dict[str, nn.Module]:
    """Return all modules under all their names; raise ValueError if a wanted name is not among them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in wanted:
        if name not in modules:
            raise ValueError(unknown_module(name, modules))
    return modules


def _check_fits(layer: Layer, mask: Tensor) -> None:
    check_mask(mask, linear=isinstance(layer, nn.Linear))
    check_shape(mask, weight_of(layer))


def masks_by_module(
    model: nn.Module, masks: Mapping[str, Tensor], check: Callable[[Layer, Tensor], None] = _check_fits
) -> dict[nn.Module, Tensor]:
    """Return the mask of each module that `masks` names; a module with several names has one mask.

    Args:
        model: any module.
        masks: by module name.
        check: called once with each layer and its mask; raises TypeError or ValueError if the mask does not fit.

    Raises:
        TypeError: if a mask is not a bool tensor, or is for a module that is no Conv2d or Linear.
        ValueError: if a name is unknown, a module has no weight yet or two masks, or a mask has a wrong shape.
    """
    modules = modules_by_name(model, masks)
    found: dict[nn.Module, Tensor] = {}
    for name, mask in masks.items():
        module = modules[name]
        check_initialized(name, module)
        if module in found:
            if not is_same_mask(found[module], mask):
                raise ValueError(f"module {name!r} has another name with another mask")
            continue
        with naming(name):
            if not isinstance(module, Layer):
                raise TypeError(f"only Conv2d and Linear layers can be masked, got {type(module).__name__}")
            check(module, mask)
        found[module] = mask
    return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a module's name before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"module {name!r}: {error}") from error


def is_same_mask(mask: Tensor, other: Tensor) -> bool:
    """Whether two masks are equal; on the meta device, without values, whether they are the same tensor."""
    return mask is other or (
        mask.dtype == other.dtype and not (mask.is_meta or other.is_meta) and torch.equal(mask, other.to(mask.device))
    )


def unknown_module(name: str, known: Iterable[str]) -> str:
    """Return the error message for a module name that the model does not have, with the most similar known name."""
    similar = get_close_matches(name, known, n=1)
    return f"model has no module {name!r}" + (f"; did you mean {similar[0]!r}?" if similar else "")


def parameter_of(module: str, parameter: str = "weight") -> str:
    """Return the name of a module's parameter in the model's state dict; the model's own module name is ""."""
    return f"{module}.{parameter}" if module else parameter


def run_once(
    model: nn.Module, example_input: Sequence[int] | Tensor, visit: Visit | None = None, linear: bool = False
) -> Any:
    """Run one forward pass, call `visit(layer, input, output)` at each layer, and restore the model's modes.

    The pass is in eval mode, so that BatchNorm statistics do not change, and computes no gradients.

    Args:
        model: any module.
        example_input: a batch of its input, or the shape [N, C, H, W] of one to fill with uniform noise.
        visit: called each time a Conv2d runs.
        linear: whether it is also called each time a Linear runs.

    Returns:
        The model's output.

    Raises:
        ValueError: if `example_input` is neither a tensor nor a shape of 4 positive integers.
    """

    def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        assert visit is not None
        visit(layer, args[0] if args else kwargs["input"], output)

    visited = maskable(model, linear).values() if visit else ()
    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in visited]
    try:
        with evaluating(model):
            return model(as_input(model, example_input))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A context without gradients and compiled code, in eval mode; afterwards each module has its own mode again."""
    modes = {each: each.training for each in module.modules()}
    try:
        module.eval()
        with _uncompiled(), torch.no_grad():
            yield
    finally:
        for each, training in modes.items():
            each.training = training


def _uncompiled() -> AbstractContextManager[None]:
    """A context in which compiled models run uncompiled; else they would be compiled again because of the hooks."""
    # If torch.compile was not called, do not import its package: that takes 2 s.
    is_imported = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_imported else nullcontext()


def uses(layer: Layer, output: Tensor) -> int:
    """Return how often a forward pass with this output used each weight: once per output pixel, or per output row."""
    return output.numel() // max(1, layer.weight.shape[0])


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer; the CPU if it has neither."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0, device="cpu")).device


def as_input(model: nn.Module, example_input: Sequence[int] | Tensor) -> Tensor:
    """Return a batch unchanged, or noise for the shape [N, C, H, W] of a batch."""
    return example_input if isinstance(example_input, Tensor) else _noise(model, example_input)


def _noise(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return uniform noise of a shape [N, C, H, W], always the same, with the dtype and device of the parameters."""
    if len(shape) != 4 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(f"example_input must be a tensor or 4 positive integers [N, C, H, W], got {tuple(shape)}")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0, device="cpu"))
    # A separate generator: the global random state must not change.
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)
