"""Classifies the operations of a traced model: do they make new channels, keep channels apart, flatten or mix them?"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_adv.masks.layers import computes_as_its_class

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)

Kind = Literal[
    "input", "convolution", "linear", "norm", "elementwise", "spatial", "flatten", "not an activation", "unknown"
]
"""Kind of an operation; "elementwise" and "spatial" (mixes pixels) keep channels apart, "unknown" may mix them."""


def _functions(names: str) -> set[object]:
    """Functions and methods with these names in torch, Tensor, torch.nn.functional and operator."""
    places = (torch, Tensor, F, operator)
    return {getattr(place, name) for place in places for name in names.split() if hasattr(place, name)}


_ELEMENTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Sigmoid,
    nn.Tanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
)
_SPATIAL_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Upsample,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_ELEMENTWISE = _functions(
    "add add_ iadd sub sub_ isub mul mul_ imul div truediv neg relu relu_ relu6 leaky_relu elu gelu silu mish softplus "
    "sigmoid tanh hardswish hardsigmoid hardtanh clamp"
)
_SPATIAL = _functions(
    "dropout dropout2d contiguous clone interpolate max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d"
)
_REDUCTIONS = _functions("mean amax squeeze")
_FLATTEN = _functions("flatten view reshape")
_SHAPE_QUERIES = {*_functions("size dim"), getattr}


def kind_of(node: fx.Node, module: nn.Module | None, value: object, shapes: Mapping[fx.Node, torch.Size]) -> Kind:
    """Classify a node of a traced graph.

    Args:
        node: the node.
        module: the module that it calls; None if it calls a function or method.
        value: its result in a forward pass.
        shapes: shapes of the activations among the nodes before it.
    """
    if node.op == "placeholder":
        return "input" if isinstance(value, Tensor) and value.dim() >= 2 else "not an activation"
    if node.op == "get_attr" or not any(source in shapes for source in node.all_input_nodes):
        return "not an activation"
    if module is not None:
        return _kind_of_module(module, value)
    if node.op == "output":
        return "unknown"
    called = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if not isinstance(value, Tensor):
        return "not an activation" if called in _SHAPE_QUERIES else "unknown"
    source = shapes.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if called in _ELEMENTWISE:
        return "elementwise"
    if source is None:
        return "unknown"
    flat = value.dim() == 2 and value.shape[0] == source[0]
    if called in _FLATTEN:
        # A number of features in the code, as in x.view(-1, 512), would not change with the number of channels.
        inferred = node.target in ("flatten", torch.flatten) or node.args[-1] == -1
        return "flatten" if flat and inferred else "unknown"
    if called in _SPATIAL or (called in _REDUCTIONS and _reduces_pixels_only(node, len(source))):
        return "spatial"
    return "spatial" if _slices_pixels_only(node) else "unknown"


def _kind_of_module(module: nn.Module, value: object) -> Kind:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return "unknown"
    if isinstance(module, BATCH_NORMS):
        return "norm"
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        if not computes_as_its_class(module) or "weight" not in module._parameters:
            return "unknown"
        if value.dim() != module.weight.dim():
            return "unknown"
        return "convolution" if isinstance(module, nn.Conv2d) else "linear"
    if isinstance(module, nn.Flatten):
        return "flatten" if module.start_dim == 1 and value.dim() == 2 else "unknown"
    if isinstance(module, _SPATIAL_MODULES):
        return "spatial"
    return "elementwise" if isinstance(module, _ELEMENTWISE_MODULES) else "unknown"


def _reduces_pixels_only(node: fx.Node, rank: int) -> bool:
    """Whether a reduction lists its dimensions, and the batch and the channels are not among them."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
    listed = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, (tuple, list)) else []
    return bool(listed) and all(isinstance(dim, int) and dim % rank >= 2 for dim in listed)


def _slices_pixels_only(node: fx.Node) -> bool:
    """Whether this is x[:, :, ...] with nothing but slices."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
        return False
    return all(part == slice(None) for part in index[:2])
