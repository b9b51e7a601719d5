"""A model in training mode with BatchNorm, addition and ReLU as one op, and on a CPU with faster dense convolutions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from sparse_adv.argument_types import checks_types
from sparse_adv.engine.autograd_step import operation_of
from sparse_adv.engine.comparison import check_finite, comparing, double_copy, quadratic_loss, without_ties
from sparse_adv.engine.gradients import outside_inference
from sparse_adv.engine.in_place import is_dropout
from sparse_adv.engine.model_state import has_hooks
from sparse_adv.engine.trace_cache import TraceCache
from sparse_adv.engine.traced_code import NotTraceable, module_of
from sparse_adv.engine.tracing import graph_of, is_relu, is_sum
from sparse_adv.engine.trained_convolution import TrainedConvolution, is_plain_convolution, onednn_writes_out_of_bounds
from sparse_adv.masks.layers import computes_as
from sparse_adv.nn import MaskedConv2d
from sparse_adv.ops._library import has_triton
from sparse_adv.ops.batch_norm_act import Statistics, update_running_statistics
from sparse_adv.ops.transforms import is_transformed

log = logging.getLogger(__name__)

_CHECKED_IMAGES = 4
_TOLERANCE = 1e-6
"""Greatest relative error of the gradients in float64."""
_LEAST_GRADIENT = 1e-3
"""Gradients that are smaller than this share of the largest are compared as if they had this size. Behind a completely
pruned layer they are 0 up to rounding errors, which the BatchNorm of the layer's constant output multiplies by 1 /
sqrt(eps) = 316."""

_graphs: TraceCache[TrainingGraph | str] = TraceCache(capacity=4)
"""For each model, in different modes and dtypes, the graph or the reason why there is none."""


class RunningStatistics:
    """The batch statistics of all layers in one forward pass, to update all running statistics together."""

    def __init__(self) -> None:
        self._found: list[tuple[nn.BatchNorm2d, Tensor, Tensor, int]] = []

    def add(self, norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
        """Keep mean and biased variance of a layer's batch, with `count` values in each channel."""
        if any(
            norm.running_mean is other.running_mean is not None or norm.running_var is other.running_var is not None
            for other, *_ in self._found
        ):
            self.update()  # layers that share statistics update them one after the other
        self._found.append((norm, mean, var, count))

    @torch.no_grad()
    def update(self) -> None:
        """Update the running statistics and the counts of batches."""
        found, self._found = self._found, []
        counts = [norm.num_batches_tracked for norm, *_ in found if norm.num_batches_tracked is not None]
        if counts:
            torch._foreach_add_(counts, 1)
        update_running_statistics(
            Statistics(norm.running_mean, norm.running_var, _momentum(norm), mean, var, count)
            for norm, mean, var, count in found
        )


def _momentum(norm: nn.BatchNorm2d) -> float:
    if norm.momentum is not None:
        return norm.momentum
    # momentum=None means the average over all batches, this one included.
    return 0.0 if norm.num_batches_tracked is None else 1 / float(norm.num_batches_tracked)


class BatchNormAct:
    """act(batch_norm(x) + residual) with the statistics of the batch, which are added to `statistics`."""

    def __init__(self, norm: nn.BatchNorm2d, relu: bool) -> None:
        self.norm, self.relu = norm, relu

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, statistics: RunningStatistics) -> Tensor:
        norm = self.norm
        fits = residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype)
        if not fits or is_transformed() or x.dim() != 4 or x.numel() <= x.shape[1]:
            y = norm(x)  # or a clear error
            y = y if residual is None else y + residual
            return y.relu() if self.relu else y
        y, mean, var, _ = torch.ops.sparse_adv.batch_norm_act(x, residual, norm.weight, norm.bias, norm.eps, self.relu)
        statistics.add(norm, mean, var, x.numel() // x.shape[1])
        return y


class DropoutInOrder:
    """A dropout of images in channels_last with the mask that it would have in NCHW.

    A mask is drawn in memory order, so the images are copied to NCHW and back; this is cheaper than convolutions in
    NCHW.
    """

    def __init__(self, dropout: Callable[..., Any]) -> None:
        self.dropout = dropout

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        y = self.dropout(x.contiguous(), *args, **kwargs)
        return y.contiguous(memory_format=torch.channels_last) if is_channels_last else y


class TrainingGraph(nn.Module):
    """Runs the operations of a model, with its own modules and their hooks, and each BatchNorm as `BatchNormAct`.

    The model's modules are not registered here, so parameters(), train() and state_dict() of this module are empty or
    without effect: call the model's.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        graph = graph_of(model)
        self.fused = list(_fuse(model, graph))
        """One line for each fused op."""
        faster = _speed_up_convolutions(model, graph)
        self._channels_last = bool(faster) and _take_channels_last(model, graph, faster)
        nodes = [node for node in graph.nodes if node.op != "output"]
        (end,) = (node for node in graph.nodes if node.op == "output")
        (self._input, *others) = [node for node in nodes if node.op == "placeholder"]
        if any(node.users for node in others):
            raise NotTraceable("the model has several inputs")
        self._returned = end.args[0]
        last = {source: node for node in [*nodes, end] for source in node.all_input_nodes}
        self._operations = [
            (node, self._operation(model, node), [source for source in node.all_input_nodes if last[source] is node])
            for node in nodes
            if node.op != "placeholder"
        ]

    def _operation(self, model: nn.Module, node: fx.Node) -> Callable[..., Any]:
        operation = operation_of(model, node)
        is_reordered = self._channels_last and is_dropout(node, module_of(model, node))
        return DropoutInOrder(operation) if is_reordered else operation

    def forward(self, x: Tensor) -> Any:
        is_reordered = self._channels_last and x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)
        if is_reordered:
            x = x.to(memory_format=torch.channels_last)
        results: dict[fx.Node, Any] = {self._input: x}
        statistics = RunningStatistics()
        for node, operation, read_last in self._operations:
            args, kwargs = fx.map_arg((node.args, node.kwargs), results.__getitem__)
            if isinstance(operation, BatchNormAct):
                kwargs = {"statistics": statistics}
            if isinstance(operation, DropoutInOrder) and not is_reordered:
                operation = operation.dropout
            results[node] = operation(*args, **kwargs)
            del args, kwargs
            for source in read_last:
                del results[source]
        statistics.update()
        return _own_containers(fx.map_arg(self._returned, results.__getitem__))


def _own_containers(returned: Any) -> Any:
    """What a model returns, with lists and dicts in place of those of torch.fx, which refuse writes."""
    if isinstance(returned, dict):
        return {key: _own_containers(value) for key, value in returned.items()}
    if isinstance(returned, list):
        return [_own_containers(value) for value in returned]
    if isinstance(returned, tuple):
        items = [_own_containers(value) for value in returned]
        return type(returned)(*items) if hasattr(returned, "_fields") else tuple(items)
    return returned


@checks_types
def fuse_for_training(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a module that computes the same as a model in its current modes, but faster; else the model itself.

    On a CPU and on CUDA each BatchNorm2d in training mode, an addition that follows it and a ReLU become one op,
    `ops.batch_norm_act`, with 2 to 8 passes over memory forward and back where PyTorch needs 8 to 16. On a CPU, in
    float32, dense 3 x 3 convolutions of channels_last images use `ops.winograd_conv2d` where it is faster. Weights,
    gradients, running statistics and hooks are those of the model. When a model is first seen in this state, its
    outputs, gradients and statistics are compared in float64 with those of the fused graph on a few images. If they
    differ, or torch.fx cannot trace the model, the model itself is returned, and a log message says why. Later calls do
    not make the host wait for a GPU, so a CUDA graph can hold them.

    Args:
        model: any module. It must not be changed between this call and the call of the returned module.
        x: float tensor [N, ...], a batch of its input.

    Returns:
        A module to be called with x in place of the model, once. It holds no parameters of its own.

    Raises:
        Exception: when it is called, whatever the model itself raises. It is no error if a model cannot be fused.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        >>> x = torch.rand(2, 3, 8, 8)
        >>> loss = fuse_for_training(model, x)(x).square().mean()
        >>> loss.backward()
        >>> model[0].weight.grad.shape, int(model[1].num_batches_tracked)
        (torch.Size([8, 3, 3, 3]), 1)
    """
    made = graph_for_training(model, x)
    return made if isinstance(made, TrainingGraph) else model


@torch.inference_mode(False)  # a verdict in that mode would hold outside of it too
def graph_for_training(model: nn.Module, x: Tensor) -> TrainingGraph | str:
    """The graph that `fuse_for_training` returns, or why there is none."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not x.is_floating_point() or not len(x):
        return "the op is for floating point images on a CPU or on CUDA"
    if device == "cuda" and not has_triton():
        return "on CUDA the op needs Triton"

    def make() -> TrainingGraph | str:
        made = _make(model, x)
        if isinstance(made, str):
            log.info("training of this %s is not fused: %s", type(model).__name__, made)
        return made

    return _graphs.find(model, x, None, make)


def _make(model: nn.Module, x: Tensor) -> TrainingGraph | str:
    try:
        graph = TrainingGraph(model)
        if not graph.fused:
            return "it has no BatchNorm2d in training mode that is called once"
        _check(model, outside_inference(x[:_CHECKED_IMAGES]).detach())
        return graph
    except NotTraceable as error:
        return str(error)


def _fuse(model: nn.Module, graph: fx.Graph) -> Iterator[str]:
    """Replace each BatchNorm, with the addition and the ReLU that follow it, by a call of `BatchNormAct`."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        norm = module_of(model, node)
        if not isinstance(norm, nn.BatchNorm2d) or not _is_fusible(norm) or calls.count(node.target) > 1:
            continue
        fused, residual, parts = [node], None, ["BatchNorm"]
        addition = _only_user(node)
        if addition is not None and is_sum(addition):
            others = [operand for operand in addition.args if operand is not node]
            if len(others) == 1 and isinstance(others[0], fx.Node):
                fused.append(addition)
                residual = others[0]
                parts.append("residual")
        relu = _only_user(fused[-1])
        has_relu = relu is not None and is_relu(model, relu)
        if relu is not None and has_relu:
            fused.append(relu)
            parts.append("ReLU")
        with graph.inserting_after(fused[-1]):
            act = graph.create_node(
                "call_function", BatchNormAct(norm, has_relu), (node.args[0], residual), name=f"{node.name}_act"
            )
        fused[-1].replace_all_uses_with(act)
        for replaced in reversed(fused):  # readers first
            graph.erase_node(replaced)
        yield f"{node.name}: {' + '.join(parts)}"


def _speed_up_convolutions(model: nn.Module, graph: fx.Graph) -> set[nn.Conv2d]:
    """Replace plain convolutions on a CPU by `TrainedConvolution`; returns those convolutions."""
    found = set()
    for node in list(graph.nodes):
        layer = module_of(model, node)
        if is_plain_convolution(layer) and len(node.args) == 1 and not node.kwargs:
            assert isinstance(layer, nn.Conv2d)
            with graph.inserting_after(node):
                faster = graph.create_node(
                    "call_function", TrainedConvolution(layer), node.args, name=f"{node.name}_faster"
                )
            node.replace_all_uses_with(faster)
            graph.erase_node(node)
            found.add(layer)
    return found


def _take_channels_last(model: nn.Module, graph: fx.Graph, faster: set[nn.Conv2d]) -> bool:
    """Whether convolutions that are not in `faster` take channels_last images without losing time or crashing."""
    others = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer not in faster]
    strides = [
        node.kwargs.get("stride", node.args[3] if len(node.args) > 3 else 1)
        for node in graph.nodes
        if node.target in (F.conv2d, torch.conv2d)
    ]
    return not any(isinstance(layer, MaskedConv2d) or onednn_writes_out_of_bounds(layer) for layer in others) and all(
        stride in (1, (1, 1), [1, 1]) for stride in strides
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_fusible(norm: nn.BatchNorm2d) -> bool:
    plain = computes_as(norm, nn.BatchNorm2d) and not has_hooks(norm)
    tracks = norm.track_running_stats or norm.running_mean is None
    # An average over all batches (momentum=None) divides by their number, and the host would read it from the GPU.
    waits = norm.momentum is None and norm.running_mean is not None and norm.running_mean.device.type != "cpu"
    return plain and norm.training and tracks and not waits


def _check(model: nn.Module, x: Tensor) -> None:
    """Raise NotTraceable if the fused graph of a model does not give its results, gradients and buffers."""

    def results(copied: nn.Module, run: Callable[[Tensor], Any]) -> tuple[TreeSpec, list[Tensor]]:
        images = without_ties(x).requires_grad_()
        returned, structure = tree_flatten(run(images))
        outputs = [leaf for leaf in returned if isinstance(leaf, Tensor)]
        leaves = [images, *(parameter for parameter in copied.parameters() if parameter.requires_grad)]
        loss = torch.stack([quadratic_loss(output) for output in outputs]).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        states = [buffer.double() for buffer in copied.buffers()]
        detached = [output.detach() for output in outputs]
        return structure, [*detached, *(g if g is not None else x.new_zeros(1) for g in gradients), *states]

    with comparing(x.device) as generators, torch.enable_grad():
        first, second = double_copy(model), double_copy(model)
        actual_structure, actual = results(first, TrainingGraph(first))
        generators.rewind()
        expected_structure, expected = results(second, second)
        check_finite(expected)
    if actual_structure != expected_structure:
        raise NotTraceable("the fused graph would return other containers")
    buffers = sum(1 for _ in model.buffers())
    largest = max(float(b.norm()) for b in expected[: len(expected) - buffers])
    least = [_LEAST_GRADIENT * largest] * (len(expected) - buffers) + [_TOLERANCE * largest] * buffers
    for a, b, floor in zip(actual, expected, least, strict=True):
        scale = max(float(b.norm()), floor, 1e-300)
        if a.shape != b.shape or not float((a - b).norm()) <= _TOLERANCE * scale:
            raise NotTraceable("the fused graph would give other results")
