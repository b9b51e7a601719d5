"""Turns a traced model into steps: which operations are fused, and which are left to autograd."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

from sparse_adv.engine.activations import activation_of
from sparse_adv.engine.autograd_step import AutogradStep
from sparse_adv.engine.model_state import runs_own_code
from sparse_adv.engine.steps import (
    ActivationStep,
    ConvolutionStep,
    FusedStep,
    LinearStep,
    MaxPoolStep,
    PointwiseStep,
    Step,
)
from sparse_adv.engine.traced_code import NotTraceable, called_by, module_of
from sparse_adv.engine.tracing import Trace, holds_tensors, is_relu, is_sum
from sparse_adv.engine.values import Value
from sparse_adv.masks.layers import computes_as
from sparse_adv.nn import MaskedConv2d, MaskedLinear
from sparse_adv.ops.conv_geometry import pads_evenly


class Fusion:
    """The steps of a traced model in eval mode.

    Steps are made in the order of the operations. A BatchNorm, an addition or a ReLU is fused into the step that made
    its operand if nothing else reads that operand. If both operands of an addition come from such steps, the addition
    is fused into the later step. That step is moved to the end of the list, so that it runs after the other operand is
    computed; nothing before the end reads its result, because the addition was its only reader.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._values: dict[fx.Node, Value] = {}
        """The value of each node whose result depends on the input and is the output of a step."""
        self._makers: dict[Value, FusedStep] = {}
        self._runs: list[Step | list[fx.Node]] = []
        """Steps, and lists of consecutive operations that are left to autograd."""
        dtype, device = trace.results[trace.input].dtype, trace.device
        self._dtypes = {dtype}
        """The dtypes in which steps compute: a part of another precision is left to autograd."""
        if torch.is_autocast_enabled(device):
            self._dtypes.add(torch.get_autocast_dtype(device))
        self._of_parameters = _of_parameters(trace.graph)
        for node in self._items_early(_parameters_late(trace.graph, self._of_parameters)):
            self._visit(node)
        self.input = self._values[trace.input]
        if trace.output not in self._values:
            raise NotTraceable("the output does not depend on the input")
        self.output = self._values[trace.output]
        self.steps = [run if isinstance(run, Step) else self._autograd_step(run) for run in self._runs]
        for step in self.steps:
            for value in step.inputs:
                value.reads += 1
            for value in step.kept():
                value.kept = True
        self.any_batch = trace.of_one is not None and all(map(self._has_images_first, self._values.values()))
        """Whether the steps can compute any number of images, not only whole batches."""

    def _items_early(self, nodes: Iterable[fx.Node]) -> Iterator[fx.Node]:
        """Yield the nodes so that the items of a tuple, such as `split` returns, come right after what made it.

        They then belong to the same step: steps exchange tensors only.
        """
        yielded: set[fx.Node] = set()
        for node in nodes:
            if node not in yielded:
                made = [node]
                for source in made:  # the list grows, because an item may be a tuple too
                    if isinstance(self._trace.results[source], tuple | list):
                        made += [user for user in source.users if _takes_item(user, source)]
                yielded.update(made)
                yield from made

    @staticmethod
    def _has_images_first(value: Value) -> bool:
        """Whether images are a value's first dimension: fewer images then take the first part of its gate's memory."""
        return not value.rectified or value.shape_for(1)[1:] == value.shape[1:]

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            return
        result = self._trace.results[node]
        if node is self._trace.input:
            self._new(node)
            return
        source = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if source is None or node in self._of_parameters or not isinstance(result, Tensor):
            return self._leave(node, result)
        if (
            len(node.all_input_nodes) > 2
            or not self._has_dtype_of_steps(node)
            or result.dim() < 2
            or not result.numel()
        ):
            return self._leave(node, result)
        module = module_of(self._trace.model, node) or _pooling_of(node)
        if module is not None and runs_own_code(module):
            return self._leave(node, result)
        if (
            isinstance(module, nn.Conv2d)
            and _is_standard(module, nn.Conv2d, MaskedConv2d)
            and pads_evenly(module)
            and result.dim() == 4
        ):
            self._begin(node, ConvolutionStep(node.name, module, source, self._new(node)))
        elif isinstance(module, nn.Linear) and _is_standard(module, nn.Linear, MaskedLinear) and result.dim() == 2:
            self._begin(node, LinearStep(node.name, module, source, self._new(node)))
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm) and _is_affine(module, result):
            self._fuse_norm(node, module, source)
        elif isinstance(module, nn.MaxPool2d) and (size := _pool_size(module)) and result.dim() == 4:
            self._runs.append(MaxPoolStep(node.name, size, source, self._new(node)))
        elif is_relu(self._trace.model, node):
            self._fuse_relu(node, source)
        elif (activation := activation_of(node, module)) and not self._is_left(source, result):
            self._runs.append(ActivationStep(node.name, activation, source, self._new(node)))
        elif is_sum(node) and self._same_shape(node):
            self._fuse_add(node, *(self._values[operand] for operand in self._operands(node)))
        else:
            self._leave(node, result)

    def _has_dtype_of_steps(self, node: fx.Node) -> bool:
        results = [self._trace.results[other] for other in (node, *node.all_input_nodes)]
        return all(result.dtype in self._dtypes for result in results if isinstance(result, Tensor))

    def _new(self, node: fx.Node) -> Value:
        result = self._trace.results[node]
        tensor_for = self._trace.for_images(node)
        shape_for = cache(lambda images: torch.Size(tensor_for(images).shape))
        value = Value(node.name, result.shape, result.dtype, shape_for, has_gradient=node not in self._of_parameters)
        self._values[node] = value
        return value

    def _begin(self, node: fx.Node, step: FusedStep) -> None:
        self._runs.append(step)
        self._makers[step.output] = step

    def _open_maker(self, node: fx.Node, value: Value) -> FusedStep | None:
        """The step that made a value, if only `node` reads the value."""
        users = {user for source, v in self._values.items() if v is value for user in source.users}
        parts = {user for user in users if self._values.get(user) is value}
        sizes = {user for user in users if not holds_tensors(self._trace.results[user])}  # known from the trace
        readers = users - parts - sizes
        return self._makers.get(value) if readers == {node} else None

    def _fuse_norm(self, node: fx.Node, norm: _BatchNorm, source: Value) -> None:
        maker = self._open_maker(node, source)
        if isinstance(maker, ConvolutionStep) and not (maker.norm or maker.residual or maker.output.rectified):
            maker.norm = norm
            self._values[node] = maker.output
        else:
            self._begin(node, PointwiseStep(node.name, norm, source, self._new(node)))

    def _fuse_relu(self, node: fx.Node, source: Value) -> None:
        step = self._open_maker(node, source)
        if step is None or step.output.rectified:
            step = PointwiseStep(node.name, None, source, self._new(node))
            self._begin(node, step)
        step.output.rectified = True
        self._values[node] = step.output

    def _fuse_add(self, node: fx.Node, first: Value, second: Value) -> None:
        candidates = []
        for mine, other in ((first, second), (second, first)):
            maker = self._open_maker(node, mine)
            if maker is not None and not (maker.residual or mine.rectified) and mine is not other:
                candidates.append((self._runs.index(maker), maker, other))
        if candidates:
            _, step, residual = max(candidates, key=lambda candidate: candidate[0])
            self._runs.remove(step)
            self._runs.append(step)
            step.add(residual)
            self._values[node] = step.output
        else:
            step = PointwiseStep(node.name, None, first, self._new(node))
            step.add(second)
            self._begin(node, step)

    def _same_shape(self, node: fx.Node) -> bool:
        result = self._trace.results[node]
        values = [self._values[source] for source in self._operands(node)]
        return len(values) == 2 and all((v.shape, v.dtype) == (result.shape, result.dtype) for v in values)

    def _is_left(self, source: Value, result: Tensor) -> bool:
        """Whether to leave a function to autograd: autograd already computes its operand just before, or the dtype
        changes.

        In small batches, two autograd steps with an engine step between them take longer than a single autograd step.
        """
        last = self._runs[-1] if self._runs else None
        follows = isinstance(last, list) and any(self._values.get(node) is source for node in last)
        return follows or source.dtype != result.dtype

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The arguments of a node that are values of this fusion."""
        return [source for source in node.args if isinstance(source, fx.Node) and source in self._values]

    def _leave(self, node: fx.Node, result: Any) -> None:
        """Leave an operation to autograd; consecutive ones become one step."""
        if not isinstance(result, Tensor | tuple | list) or not holds_tensors(result):
            return  # a constant for images of this size
        last = self._runs[-1] if self._runs else None
        if isinstance(last, list):
            last.append(node)
        else:
            self._runs.append([node])
        if isinstance(result, Tensor):
            self._new(node)

    def _autograd_step(self, nodes: list[fx.Node]) -> AutogradStep:
        inside = set(nodes)
        reads: dict[fx.Node, Value] = {}
        constants: dict[fx.Node, Callable[[int], object]] = {}
        for source in (source for node in nodes for source in node.all_input_nodes if source not in inside):
            if source in self._values:
                reads[source] = self._values[source]
            elif holds_tensors(self._trace.results[source]):
                raise NotTraceable(
                    f"{called_by(source)} gives a {type(self._trace.results[source]).__name__} to another step"
                )
            else:
                constants[source] = self._trace.for_images(source)
        output = self._trace.output
        makes = {
            node: self._values[node]
            for node in nodes
            if node in self._values and (node is output or any(user not in inside for user in node.users))
        }
        sizes = {node: self._values[node].shape_for for node in nodes if node in self._values}
        return AutogradStep(self._trace.model, nodes, reads, makes, constants, sizes)


def _parameters_late(graph: fx.Graph, of_parameters: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield the nodes so that those computed from parameters alone stand right before the first that also needs images.

    They then belong to the same step, and autograd computes no gradient of a parameter in it.
    """
    waiting: list[fx.Node] = []
    for node in graph.nodes:
        if node in of_parameters:
            waiting.append(node)
            continue
        needed = {node}
        for source in reversed(waiting):
            if not needed.isdisjoint(source.users):
                needed.add(source)
        yield from (source for source in waiting if source in needed)
        waiting = [source for source in waiting if source not in needed]
        yield node


def _takes_item(node: fx.Node, source: fx.Node) -> bool:
    return node.target is operator.getitem and node.args[0] is source and node.all_input_nodes == [source]


def _of_parameters(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that read parameters and buffers, or compute from them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("get_attr", "call_function", "call_method") and found.issuperset(node.all_input_nodes):
            found.add(node)
    return found


def _is_standard(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the module computes what one of these classes does, with a weight of its own."""
    return computes_as(module, *kinds) and "weight" in module._parameters


def _pooling_of(node: fx.Node) -> nn.MaxPool2d | None:
    """A module that computes the same as a call of `F.max_pool2d`; torch.fx has given all arguments their names."""
    if node.target is not F.max_pool2d or len(node.all_input_nodes) > 1:  # a size that is computed
        return None
    return nn.MaxPool2d(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]


def _pool_size(pool: nn.MaxPool2d) -> tuple[int, int] | None:
    """Rows and columns of a pooling's windows, if they lie side by side without overlap or gap; else None."""
    size, stride, padding, dilation = map(_pair, (pool.kernel_size, pool.stride, pool.padding, pool.dilation))
    plain = computes_as(pool, nn.MaxPool2d) and not (pool.ceil_mode or pool.return_indices)
    return (
        size
        if plain and size == stride and padding == (0, 0) and dilation == (1, 1) and math.prod(size) < 256
        else None
    )


def _is_affine(norm: _BatchNorm, result: Tensor) -> bool:
    """Whether a BatchNorm in eval mode is a factor and a summand for each channel."""
    plain = computes_as(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
    return plain and not norm.training and norm.running_var is not None and result.dim() in (2, 4)
