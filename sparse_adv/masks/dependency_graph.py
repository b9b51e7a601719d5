"""Dependency groups of a model: the channels of all layers that must be removed or permuted together.

A residual sum adds channel i to channel i. So the convolutions before it and all layers that read the sum must number
their channels in the same way. Removing or permuting channels leaves the model's function unchanged only if it is done
in a whole group. The terms are from Fang et al., "DepGraph: towards any structural pruning" (CVPR 2023).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.channel_operations import Kind, kind_of
from sparse_adv.masks.layers import as_input, computes_as_its_class, evaluating
from sparse_adv.tracer import Tracer

log = logging.getLogger(__name__)


class Member(NamedTuple):
    """A module that reads a group's channels; after flattening a channel is `features` (pixels) consecutive inputs."""

    name: str
    features: int = 1


@dataclass(frozen=True)
class DependencyGroup:
    """Channels that several modules, given by name, have in the same order; `dependency_groups` returns such groups.

    Examples:
        >>> from sparse_adv import masks
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
        >>> group = masks.dependency_groups(model, (1, 3, 8, 8))[1]
        >>> group.width, group.producers, group.consumers[0].name, group.fixed
        (8, ('0',), '2', '')
    """

    width: int
    """Number of channels."""
    producers: tuple[str, ...]
    """Convolutions and linear layers that output the channels: dimension 0 of weight and bias."""
    depthwise: tuple[str, ...]
    """Depthwise convolutions between producers and consumers: dimension 0 of weight and bias, number of groups."""
    norms: tuple[Member, ...]
    """BatchNorm layers on the channels."""
    consumers: tuple[Member, ...]
    """Convolutions and linear layers that read the channels: dimension 1 of the weight."""
    fixed: str
    """Why the number and order of the channels must not change; empty if they may."""


@dataclass
class DependencyGraph:
    """The traced graph of a model: kind of each node, shape of each activation, and the groups."""

    graph: fx.Graph
    kinds: dict[fx.Node, Kind] = field(default_factory=dict)
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    groups: list[DependencyGroup] = field(default_factory=list)


@checks_types
def dependency_groups(model: nn.Module, example_input: Sequence[int] | Tensor) -> list[DependencyGroup]:
    """Find the dependency groups of a model by following its channels through the traced graph.

    Supported are 2-D convolutions, linear layers on inputs [N, C], BatchNorm, element-wise functions and sums, pooling
    and flattening. Channels are fixed at the model's input and output, wherever another operation uses them, in grouped
    convolutions that are not depthwise, and in layers that share a weight; a log message says why.

    Args:
        model: any module that torch.fx can trace, dense or sparse; it runs one forward pass in eval mode. All its
            arguments except the first keep their defaults.
        example_input: a batch of its input, or the shape [N, C, H, W] of one.

    Returns:
        The groups, in the order in which the model uses them.

    Raises:
        ValueError: if torch.fx cannot trace the model; the message names the module.

    Source: Fang et al., "DepGraph: towards any structural pruning" (CVPR 2023), whose groups these are.

    Examples:
        >>> from torch import nn
        >>> from sparse_adv import masks
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> groups = masks.dependency_groups(model, (1, 3, 8, 8))
        >>> groups[1].producers, groups[1].norms[0].name, groups[1].consumers[0].name
        (('0',), '1', '3')
        >>> [group.fixed for group in groups]
        ["the model's input", '', "the model's output"]
    """
    return build_dependency_graph(model, example_input).groups


def check_traceable(model: nn.Module) -> None:
    """Raise ValueError if torch.fx cannot trace a model, as `dependency_groups` does; this needs no image."""
    with evaluating(model):
        _trace(model)


def build_dependency_graph(model: nn.Module, example_input: Sequence[int] | Tensor) -> DependencyGraph:
    """Trace a model; arguments and errors are those of `dependency_groups`."""
    x = as_input(model, example_input)
    with evaluating(model):
        interpreter = _Interpreter(model, _trace(model))
        interpreter.run(x)
    interpreter.result.groups = list(interpreter.groups())
    return interpreter.result


def _trace(model: nn.Module) -> fx.Graph:
    tracer = _Tracer()
    try:
        return tracer.trace(model)
    except Exception as error:  # given a proxy instead of a tensor, the model's own code may raise anything
        raise ValueError(f"torch.fx cannot trace {tracer.place}: {error}") from error


class _Tracer(Tracer):
    """Does not trace into masked layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return computes_as_its_class(m) or super().is_leaf_module(m, module_qualified_name)

    def trace_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if set(kwargs) == {"input"} and not args:
            args, kwargs = (kwargs["input"],), {}
        return super().trace_module(m, forward, args, kwargs)


class _Axis(NamedTuple):
    """Dimension 1 of an activation: the number of a group, and how many consecutive features each channel has."""

    group: int
    features: int


class _Interpreter(fx.Interpreter):
    """Runs the graph, and assigns each activation's channels to a group; groups are merged in a union-find forest."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.result = DependencyGraph(graph)
        self._axes: dict[fx.Node, _Axis] = {}
        self._parents: list[int] = []
        """The group that each group was merged into; itself if none."""
        self._widths: list[int] = []
        self._fixed: dict[int, str] = {}
        self._members: dict[tuple[str, Member], int] = {}
        """The group of each (role, member), roles being "producer", "depthwise", "norm" and "consumer"."""
        self._ends: dict[str, tuple[_Axis, _Axis]] = {}
        """Input and output of each module called so far."""
        self._parameter_users: dict[int, tuple[str, Sequence[_Axis]]] = {}
        """Maps the id of a parameter to the module that used it first, and the channels of its input and output."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        kind = self.result.kinds[n] = kind_of(n, module, value, self.result.shapes)
        if isinstance(value, Tensor) and value.dim() >= 2 and kind != "not an activation":
            self.result.shapes[n] = value.shape
        axes = [self._axes[source] for source in n.all_input_nodes if source in self._axes]
        if kind == "unknown":
            self._fix(axes, "the model's output" if n.op == "output" else f"{n.name} is not supported")
        elif kind != "not an activation":
            self._axes[n] = self._output_axis(n, kind, module, value, axes)
        elif isinstance(value, nn.Parameter):
            self._fix_if_shared(str(n.target), value, [])
        return value

    def groups(self) -> Iterator[DependencyGroup]:
        """Yield the groups in the order in which the model uses them."""
        roots = {self._root(group): None for group in range(len(self._parents))}
        for root in roots:
            members = [key for key, group in self._members.items() if self._root(group) == root]
            if not members:
                continue
            producers, depthwise = (
                tuple(member.name for role, member in members if role == wanted) for wanted in ("producer", "depthwise")
            )
            norms, consumers = (
                tuple(member for role, member in members if role == wanted) for wanted in ("norm", "consumer")
            )
            reason = self._fixed.get(root, "")
            if reason and producers:
                log.info("channels of %s cannot be changed: %s", ", ".join(producers), reason)
            yield DependencyGroup(self._widths[root], producers, depthwise, norms, consumers, reason)

    def _output_axis(self, n: fx.Node, kind: Kind, module: nn.Module | None, value: Tensor, axes: list[_Axis]) -> _Axis:
        if kind == "input":
            return self._new_group(value.shape[1], "the model's input")
        if not axes:
            source = next(source for source in n.all_input_nodes if source in self.result.shapes)
            axes = [self._new_group(self.result.shapes[source][1], f"{source.name} is not supported")]
        if kind == "elementwise":
            return self._elementwise(n, value, axes)
        axis = axes[0]
        if kind == "flatten":
            return _Axis(axis.group, value.shape[1] // self._widths[self._root(axis.group)])
        return axis if module is None or kind == "spatial" else self._call_module(str(n.target), kind, module, axis)

    def _call_module(self, name: str, kind: Kind, module: nn.Module, axis: _Axis) -> _Axis:
        """Add a convolution, linear layer or normalisation to the groups of its input and output."""
        if name in self._ends:  # called again with the same weights, so the channels must be the same
            before, after = self._ends[name]
            self._merge([before, axis], name)
            return after
        after, groups = axis, getattr(module, "groups", 1)
        if kind == "norm":
            self._members["norm", Member(name, axis.features)] = axis.group
        elif groups > 1 and groups == module.out_channels == self._widths[self._root(axis.group)]:
            self._members["depthwise", Member(name)] = axis.group
        else:
            after = self._new_group(len(self.module.get_parameter(f"{name}.weight")))
            self._members["consumer", Member(name, axis.features)] = axis.group
            self._members["producer", Member(name)] = after.group
            if groups > 1:
                self._fix([axis, after], f"{name} is a grouped convolution")
        self._ends[name] = axis, after
        for parameter in module.parameters(recurse=False):
            self._fix_if_shared(name, parameter, [axis, after])
        return after

    def _fix_if_shared(self, name: str, parameter: nn.Parameter, axes: Sequence[_Axis]) -> None:
        other, other_axes = self._parameter_users.setdefault(id(parameter), (name, axes))
        if other != name:
            self._fix([*other_axes, *axes], f"{name} and {other} share a parameter")

    def _elementwise(self, n: fx.Node, value: Tensor, axes: list[_Axis]) -> _Axis:
        """Merge the groups of all operands; fix the channels if an operand is broadcast or not an activation."""
        same = []
        for source in n.all_input_nodes:
            shape = self.result.shapes.get(source)
            if shape is None or source not in self._axes:
                operand = self.env.get(source)
                # Numbers, and tensors that are not activations, may have been computed from the number of channels.
                if shape is not None or not isinstance(operand, Tensor) or operand.numel() > 1:
                    self._fix(axes, f"{n.name} combines them with {source.name}")
            elif len(shape) == value.dim() and shape[1] == value.shape[1]:
                same.append(self._axes[source])
            else:
                self._fix([self._axes[source]], f"{n.name} broadcasts them")
        if not same:
            return self._new_group(value.shape[1], f"{n.name} broadcasts them")
        self._merge(same, n.name)
        return same[0]

    def _new_group(self, width: int, fixed: str = "") -> _Axis:
        group = len(self._parents)
        self._parents.append(group)
        self._widths.append(width)
        if fixed:
            self._fixed[group] = fixed
        return _Axis(group, 1)

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group

    def _fix(self, axes: Sequence[_Axis], reason: str) -> None:
        for axis in axes:
            self._fixed.setdefault(self._root(axis.group), reason)

    def _merge(self, axes: Sequence[_Axis], where: str) -> None:
        if len({axis.features for axis in axes}) > 1:
            self._fix(axes, f"{where} mixes channels and pixels")
            return
        first = self._root(axes[0].group)
        for axis in axes[1:]:
            root = self._root(axis.group)
            if root != first:
                self._parents[root] = first
                if root in self._fixed:
                    self._fixed.setdefault(first, self._fixed[root])
