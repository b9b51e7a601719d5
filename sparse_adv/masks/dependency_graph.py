"""Which channels of a model belong together: producers, normalisations and consumers that share one order of channels.

A residual sum adds channel i to channel i, so the convolutions before it must agree about what channel i is, and so
must all that read the sum. Whoever removes or reorders channels does so for a whole group, or changes the function.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_adv.masks.layers import run_once

log = logging.getLogger(__name__)

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


class Member(NamedTuple):
    """A module that holds the channels of a group, `features` entries in a row for each: pixels, once flattened."""

    name: str
    features: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels in one order, and all modules that follow it; modules by name."""

    width: int
    producers: tuple[str, ...]
    """Convolutions and linear layers: dimension 0 of weight and bias."""
    depthwise: tuple[str, ...]
    """Depthwise convolutions in between: dimension 0 of weight and bias, and the number of groups."""
    norms: tuple[Member, ...]
    consumers: tuple[Member, ...]
    """Convolutions and linear layers: dimension 1 of the weight."""
    fixed: str
    """Why number and order of the channels must stay; empty if they need not."""


@dataclass
class Trace:
    """A model's graph: what each node does to channels, the shapes of the tensors, and the groups."""

    graph: fx.Graph
    kinds: dict[fx.Node, str] = field(default_factory=dict)
    """"input", "convolution", "linear", "norm", "elementwise", "spatial" (keeps channels apart), "flatten", "value" (no
    activations) or "unknown"."""
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    groups: list[ChannelGroup] = field(default_factory=list)


def channel_groups(model: nn.Module, shape: Sequence[int] | Tensor) -> list[ChannelGroup]:
    """Find the channels that must stay together, by following them through the model's graph.

    Known are 2-D convolutions, linear layers on rows, BatchNorm, element-wise functions and sums, pooling and
    flattening. Of anything else, of grouped convolutions that are not depthwise, of weights that two layers share, and
    at the model's input and output, channels are fixed; a log line says why.

    Args:
        model: any module that torch.fx can trace, dense or sparse; it runs one forward pass, in eval mode.
        shape: shape [N, C, H, W] of its input, or a sample of it.

    Raises:
        ValueError: if torch.fx cannot trace the model; it says in which module.
    """
    return trace(model, shape).groups


def trace(model: nn.Module, shape: Sequence[int] | Tensor) -> Trace:
    """The graph behind `channel_groups`."""
    tracing = _Tracing(model)
    run_once(tracing, shape, lambda layer, input, output: None)
    assert tracing.found is not None
    return tracing.found


class _Tracing(nn.Module):
    """The model, traced when it is called: `run_once` then looks after modes and gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: Trace | None = None

    def forward(self, input: Tensor) -> None:
        tracer = _Tracer()
        try:
            graph = tracer.trace(self.model)
        except Exception as error:  # whatever the model's own code does with a stand-in for a tensor
            raise ValueError(f"torch.fx cannot trace {tracer.place}: {error}") from error
        walk = _Walk(self.model, graph)
        walk.run(input)
        walk.found.groups = list(walk.groups())
        self.found = walk.found


class _Tracer(fx.Tracer):
    """Takes layers that are masked, too, as they are."""

    place = "the model"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_plain(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outside, self.place = self.place, f"module {self.path_of_module(m)!r} ({type(m).__name__})"
        result = super().call_module(m, forward, args, kwargs)
        self.place = outside
        return result


def _is_plain(module: nn.Module) -> bool:
    """Whether this is a Conv2d or Linear that computes as such, masked or not."""
    for kind in (nn.Conv2d, nn.Linear):
        if isinstance(module, kind):
            return type(module).forward is kind.forward or "weight_mask" in module._buffers
    return False


def _functions(*names: str) -> set[Any]:
    places = (torch, Tensor, F, operator)
    return {getattr(place, name) for place in places for name in names if hasattr(place, name)}


_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
_SPATIAL_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.Upsample),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_ELEMENTWISE = _functions(
    *("add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "truediv", "neg"),
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh"),
    *("hardswish", "hardsigmoid", "hardtanh", "clamp"),
)
_SPATIAL = _functions(
    *("dropout", "dropout2d", "contiguous", "clone", "interpolate"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
)
_REDUCTIONS = _functions("mean", "amax", "squeeze")
_FLATTEN = _functions("flatten", "view", "reshape")
_FACTS = {*_functions("size", "dim"), getattr}


def _kind(node: fx.Node, module: nn.Module | None, value: Any, shapes: dict[fx.Node, torch.Size]) -> str:
    """What a node does to channels: see `Trace`."""
    if node.op == "placeholder":
        return "input" if isinstance(value, Tensor) and value.dim() >= 2 else "value"
    if node.op == "get_attr" or not any(source in shapes for source in node.all_input_nodes):
        return "value"
    if module is not None:
        return _kind_of_module(module, value)
    if node.op == "output":
        return "unknown"
    called = getattr(Tensor, str(node.target), None) if node.op == "call_method" else node.target
    if not isinstance(value, Tensor):
        return "value" if called in _FACTS else "unknown"
    source = shapes.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if called in _ELEMENTWISE:
        return "elementwise"
    if source is None:
        return "unknown"
    flat = value.dim() == 2 and value.shape[0] == source[0]
    if called in _FLATTEN:
        # A number of features that stands in the code would not follow the number of channels.
        by_itself = node.target in ("flatten", torch.flatten) or node.args[-1] == -1
        return "flatten" if flat and by_itself else "unknown"
    if called in _SPATIAL or (called in _REDUCTIONS and _spares_channels(node, len(source))) or _is_spatial_slice(node):
        return "spatial"
    return "unknown"


def _kind_of_module(module: nn.Module, value: Any) -> str:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return "unknown"
    if isinstance(module, NORMS):
        return "norm"
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        usable = _is_plain(module) and "weight" in module._parameters and value.dim() == module.weight.dim()
        return ("convolution" if isinstance(module, nn.Conv2d) else "linear") if usable else "unknown"
    if isinstance(module, nn.Flatten):
        return "flatten" if module.start_dim == 1 and value.dim() == 2 else "unknown"
    if isinstance(module, _SPATIAL_MODULES):
        return "spatial"
    return "elementwise" if isinstance(module, _ELEMENTWISE_MODULES) else "unknown"


def _spares_channels(node: fx.Node, rank: int) -> bool:
    """Whether a reduction names its dimensions, and neither images nor channels are among them."""
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else ())
    listed = [dims] if isinstance(dims, int) else list(dims) if isinstance(dims, (tuple, list)) else []
    return bool(listed) and all(isinstance(dim, int) and dim % rank >= 2 for dim in listed)


def _is_spatial_slice(node: fx.Node) -> bool:
    """Whether this is x[:, :, ...] with slices alone."""
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, tuple) or not all(isinstance(part, slice) for part in index):
        return False
    return all(part == slice(None) for part in index[:2])


class _Axis(NamedTuple):
    """Dimension 1 of an activation: an order of channels, each with so many features in a row."""

    order: int
    features: int


class _Walk(fx.Interpreter):
    """Runs the graph and notes whose channels are whose; orders found to be the same one are joined."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.found = Trace(graph)
        self._axes: dict[fx.Node, _Axis] = {}
        self._joined: list[int] = []
        self._widths: list[int] = []
        self._fixed: dict[int, str] = {}
        self._members: dict[tuple[str, Member], int] = {}
        self._ends: dict[str, tuple[_Axis, _Axis]] = {}
        self._users: dict[int, tuple[str, Sequence[_Axis]]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        kind = self.found.kinds[n] = _kind(n, module, value, self.found.shapes)
        if isinstance(value, Tensor) and value.dim() >= 2 and kind != "value":
            self.found.shapes[n] = value.shape
        axes = [self._axes[source] for source in n.all_input_nodes if source in self._axes]
        if kind == "unknown":
            self._fix(axes, "the model's output" if n.op == "output" else f"{n.name} is unknown")
        elif kind != "value":
            self._axes[n] = self._follow(n, kind, module, value, axes)
        elif isinstance(value, nn.Parameter):
            self._watch_sharing(str(n.target), value, [])
        return value

    def groups(self) -> Iterator[ChannelGroup]:
        """The groups, in the order in which the model meets them."""
        roots = {self._root(order): None for order in range(len(self._joined))}
        for root in roots:
            held = [(role, member) for (role, member), order in self._members.items() if self._root(order) == root]
            if not held:
                continue
            names = {role: tuple(m.name for r, m in held if r == role) for role in ("producer", "depthwise")}
            norms, consumers = (tuple(m for r, m in held if r == role) for role in ("norm", "consumer"))
            reason = self._fixed.get(root, "")
            if reason and names["producer"]:
                log.info("channels of %s stay as they are: %s", ", ".join(names["producer"]), reason)
            yield ChannelGroup(self._widths[root], names["producer"], names["depthwise"], norms, consumers, reason)

    def _follow(self, n: fx.Node, kind: str, module: nn.Module | None, value: Tensor, axes: list[_Axis]) -> _Axis:
        if kind == "input":
            return self._new(value.shape[1], "the model's input")
        if not axes:
            source = next(source for source in n.all_input_nodes if source in self.found.shapes)
            axes = [self._new(self.found.shapes[source][1], f"{source.name} is unknown")]
        if kind == "elementwise":
            return self._sum(n, value, axes)
        axis = axes[0]
        if kind == "flatten":
            return _Axis(axis.order, value.shape[1] // self._widths[self._root(axis.order)])
        return axis if module is None or kind == "spatial" else self._module(str(n.target), kind, module, axis)

    def _module(self, name: str, kind: str, module: nn.Module, axis: _Axis) -> _Axis:
        """Note what a convolution, linear layer or normalisation has at its two ends."""
        if name in self._ends:  # called again: the same weights, so the same channels
            before, after = self._ends[name]
            self._join([before, axis], name)
            return after
        after, groups = axis, getattr(module, "groups", 1)
        if kind == "norm":
            self._members["norm", Member(name, axis.features)] = axis.order
        elif groups > 1 and groups == module.out_channels == self._widths[self._root(axis.order)]:
            self._members["depthwise", Member(name)] = axis.order
        else:
            after = self._new(len(self.module.get_parameter(f"{name}.weight")))
            self._members["consumer", Member(name, axis.features)] = axis.order
            self._members["producer", Member(name)] = after.order
            if groups > 1:
                self._fix([axis, after], f"{name} is a grouped convolution")
        self._ends[name] = axis, after
        for parameter in module.parameters(recurse=False):
            self._watch_sharing(name, parameter, [axis, after])
        return after

    def _watch_sharing(self, name: str, parameter: nn.Parameter, axes: Sequence[_Axis]) -> None:
        other, known = self._users.setdefault(id(parameter), (name, axes))
        if other != name:
            self._fix([*known, *axes], f"{name} and {other} share a parameter")

    def _sum(self, n: fx.Node, value: Tensor, axes: list[_Axis]) -> _Axis:
        """Element by element: all operands are in one order, unless broadcasting brings them together."""
        same = []
        for source in n.all_input_nodes:
            shape = self.found.shapes.get(source)
            if shape is None or source not in self._axes:
                other = self.env.get(source)
                # A number that is computed may follow from the number of channels.
                if shape is not None or not isinstance(other, Tensor) or other.numel() > 1:
                    self._fix(axes, f"{n.name} combines them with something of its own")
            elif len(shape) == value.dim() and shape[1] == value.shape[1]:
                same.append(self._axes[source])
            else:
                self._fix([self._axes[source]], f"{n.name} broadcasts them")
        if not same:
            return self._new(value.shape[1], f"{n.name} broadcasts them")
        self._join(same, n.name)
        return same[0]

    def _new(self, width: int, fixed: str = "") -> _Axis:
        order = len(self._joined)
        self._joined.append(order)
        self._widths.append(width)
        if fixed:
            self._fixed[order] = fixed
        return _Axis(order, 1)

    def _root(self, order: int) -> int:
        while self._joined[order] != order:
            order = self._joined[order]
        return order

    def _fix(self, axes: Sequence[_Axis], why: str) -> None:
        for axis in axes:
            self._fixed.setdefault(self._root(axis.order), why)

    def _join(self, axes: Sequence[_Axis], where: str) -> None:
        if len({axis.features for axis in axes}) > 1:
            self._fix(axes, f"{where} mixes channels and pixels")
            return
        first = self._root(axes[0].order)
        for axis in axes[1:]:
            root = self._root(axis.order)
            if root != first:
                self._joined[root] = first
                if root in self._fixed:
                    self._fixed.setdefault(first, self._fixed[root])
