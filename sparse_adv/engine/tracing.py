"""Turns a model into a graph of operations with torch.fx, and runs it once to learn every operation's result."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from sparse_adv.engine.batch_size import scaled
from sparse_adv.engine.content import is_of_library
from sparse_adv.engine.in_place import drop_identities, make_functional
from sparse_adv.engine.model_state import copy_of_code, has_global_hooks, has_hooks, runs_own_code
from sparse_adv.engine.random_state import KeptGenerators
from sparse_adv.engine.reads import Reads, unchanged
from sparse_adv.engine.traced_code import (
    Constant,
    EagerFunctions,
    NotTraceable,
    OnACopy,
    SizesOfValues,
    called_by,
    module_of,
    reads_elements,
)
from sparse_adv.engine.written_norms import gather_norms
from sparse_adv.errors import first_line
from sparse_adv.masks.layers import is_sharded
from sparse_adv.nn import MaskedConv2d, MaskedLinear
from sparse_adv.tracer import Tracer, lock

log = logging.getLogger(__name__)

_RELU = {torch.relu, F.relu, "relu"}
_ADD = {operator.add, torch.add, "add"}


@dataclass(frozen=True)
class Trace:
    """A model's operations for one shape of images, and often for any number of them."""

    model: nn.Module
    graph: fx.Graph
    """The operations, without in-place ones."""
    input: fx.Node
    output: fx.Node
    """The node whose result the model returns."""
    device: str
    """Type of the device of the images."""
    results: dict[fx.Node, Any]
    """The result of each node. A tensor is on the meta device: only its shape and dtype are kept."""
    of_one: dict[fx.Node, Any] | None
    """The results for the first image alone; None if the operations are right for this number of images only."""

    def for_images(self, node: fx.Node) -> Callable[[int], Any]:
        """A function that returns the result of a node for a number of images. It holds no reference to the model."""
        result = self.results[node]
        if self.of_one is None:
            return lambda images: result
        batch = len(self.results[self.input])
        return partial(scaled, result, self.of_one[node], batch)


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Trace a model, and run it once without gradients.

    Args:
        model: takes one tensor; further arguments keep their defaults. It is traced in its present modes.
        x: a batch of its input.

    Raises:
        NotTraceable: if the model depends on values of its input, overwrites a tensor that is read under another
            name, has hooks itself, or returns anything but one tensor.
    """
    graph = graph_of(model)
    try:
        results = _results(model, graph, x)
    except (NotTraceable, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the model's own code
        raise NotTraceable(f"its operations fail: {first_line(error)}") from error
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and node.users]
    (end,) = (node for node in graph.nodes if node.op == "output")
    returned = end.args[0]
    if len(placeholders) != 1 or not isinstance(returned, fx.Node):
        raise NotTraceable("the model does not map one tensor to one tensor")
    for node in graph.nodes:
        from_tensors = any(holds_tensors(results[source]) for source in node.all_input_nodes)
        if node is not end and from_tensors and not holds_tensors(results[node]) and reads_elements(node):
            raise NotTraceable(f"{called_by(node)} reads the elements of a tensor")
    if not isinstance(results[returned], Tensor):
        raise NotTraceable(f"the model returns a {type(results[returned]).__name__}")
    of_one = _results_of_one(model, graph, x, results)
    return Trace(model, graph, placeholders[0], returned, x.device.type, results, of_one)


def graph_of(model: nn.Module) -> fx.Graph:
    """The operations of a model, without in-place operations. The model's Python code runs once, on a copy of the
    modules.

    If a part without layers cannot be traced, each part of its class counts as one operation. Its code then runs in
    each pass.

    Raises:
        NotTraceable: if the model depends on values of its input or of its buffers, overwrites a tensor that is read
            under another name, has hooks itself, is sharded by FSDP or compiled by torch.jit, or if its Python code
            draws random numbers, changes attributes of modules, or computes with other tensors, because the graph would
            repeat what happened this time. Also if the code calls its own autograd function or stops gradients, which
            the graph would not show, or reads attributes whose changes would not be seen.
    """
    if any(map(is_sharded, model.modules())):
        raise NotTraceable("FSDP gathers its weights in each pass")
    if has_hooks(model) or has_global_hooks():
        raise NotTraceable("the model itself has hooks, or there are hooks for all modules")
    if "forward" in vars(model):
        raise NotTraceable("its forward is one of its attributes, and torch.fx would trace that of its class")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise NotTraceable(f"module {name!r} was compiled by torch.jit, and torch.fx cannot trace it")
    whole: set[type[nn.Module]] = set()
    while True:
        tracer = _Tracer(model, whole)
        try:
            return _graph(model, tracer)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # given a proxy instead of a tensor, the model's own code may raise anything
            part = tracer.part
            if part is not None and type(part) not in whole and not _has_layers(part):
                whole.add(type(part))
                tracer.reads.forget(type(part))
            elif isinstance(error, NotTraceable):
                raise
            else:
                raise NotTraceable(f"torch.fx cannot trace {tracer.place}: {first_line(error)}") from error


def _has_layers(part: nn.Module) -> bool:
    """Whether a module has parts that the engine computes faster than PyTorch does."""
    return any(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in part.modules() if m is not part)


def _graph(model: nn.Module, tracer: _Tracer) -> fx.Graph:
    copied = copy_of_code(model)
    with KeptGenerators(torch.device("cpu")) as generators, EagerFunctions(), torch.enable_grad():
        graph = tracer.trace(copied)
        if generators.drawn:
            raise NotTraceable("its Python code draws random numbers")
    _take_constants(copied, graph)
    tracer.reads.check()
    gather_norms(model, graph)
    drop_identities(model, graph)
    make_functional(model, graph)
    return graph


def is_relu(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a ReLU and nothing else."""
    module = module_of(model, node)
    return node.target in _RELU if module is None else type(module) is nn.ReLU and not runs_own_code(module)


def is_sum(node: fx.Node) -> bool:
    """Whether a node adds two operands."""
    return node.target in _ADD and len(node.args) == 2 and not node.kwargs


class _Tracer(Tracer):
    """Records masked layers and modules with hooks as one call each, without looking inside.

    Args:
        model: a copy of it is traced.
        whole: classes of other modules that are recorded in this way.
    """

    proxy_buffer_attributes = True  # the graph records what is computed from buffers, as from parameters

    reads: Reads

    def __init__(self, model: nn.Module, whole: Collection[type[nn.Module]]) -> None:
        super().__init__()
        self._model, self._whole = model, whole

    def trace(self, root: nn.Module | Callable[..., Any], concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a copy of the model; `reads` then holds what its code has read."""
        assert isinstance(root, nn.Module)
        self.reads = Reads(self._model, root)
        self.reads.add(root, "forward")
        with lock, self.reads.recording():
            self._modes = _modes()
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_masked = isinstance(m, (MaskedConv2d, MaskedLinear))
        if has_hooks(m) or is_masked or type(m) in self._whole or super().is_leaf_module(m, module_qualified_name):
            self.reads.add_layer(m)
            return True
        return False

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            self.reads.refuse("its Python code stops gradients or changes autocast")
        return super().create_node(*args, **kwargs)


def _modes() -> tuple[bool, ...]:
    """The modes of this thread that decide what PyTorch's operations do."""
    return torch.is_grad_enabled(), *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


class _Recorder(fx.Interpreter):
    """Runs a graph and records the result of each node."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self._model = model
        self.results: dict[fx.Node, Any] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        # The code of modules runs in each pass, and its sizes are compared.
        is_module = module_of(self._model, n) is not None or isinstance(n.target, OnACopy)
        with nullcontext() if is_module else SizesOfValues():
            result = super().run_node(n)
        is_tensor = isinstance(result, Tensor)
        self.results[n] = torch.empty_like(result, device="meta") if is_tensor else result
        return result


def holds_tensors(result: object) -> bool:
    """Whether a result is or contains a tensor."""
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))


def _results(model: nn.Module, graph: fx.Graph, x: Tensor) -> dict[fx.Node, Any]:
    """Run a graph and return the result of each node.

    Raises:
        NotTraceable: if code that is not traced changes attributes of modules.
    """
    called = [module for node in graph.nodes if (module := module_of(model, node)) is not None]
    if all(is_of_library(type(module).__module__) or has_hooks(module) for module in called):
        recorder = _Recorder(model, graph)
        recorder.run(x, enable_io_processing=False)
    else:
        recorder = _Recorder(copied := copy_of_code(model), graph)
        with unchanged(copied):
            recorder.run(x, enable_io_processing=False)
    return recorder.results


def _results_of_one(
    model: nn.Module, graph: fx.Graph, x: Tensor, results: dict[fx.Node, Any]
) -> dict[fx.Node, Any] | None:
    """The results for the first image; None if results for other numbers of images do not follow from them."""
    if len(x) < 2:
        return None
    try:
        of_one = _results(model, graph, x[:1])
        for node, result in results.items():
            scaled(result, of_one[node], len(x), images=1)
        return of_one
    except Exception as error:  # of the model's own code, or of `scaled`
        log.debug("the engine computes whole batches of this %s: %s", type(model).__name__, first_line(error))
        return None


def _take_constants(copied: nn.Module, graph: fx.Graph) -> None:
    """Move tensors into the graph that torch.fx has made attributes of the traced copy."""
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name.startswith("_tensor_constant"):
            node.op, node.target = "call_function", Constant(getattr(copied, name))
    for name in [name for name in vars(copied) if name.startswith("_tensor_constant")]:
        delattr(copied, name)
