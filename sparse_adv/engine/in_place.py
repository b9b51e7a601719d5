"""Removes operations that return their input unchanged from a graph, and replaces those that overwrite a tensor."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from sparse_adv.engine.activations import activation_of
from sparse_adv.engine.content import is_of_library
from sparse_adv.engine.model_state import has_hooks, runs_code_of_user
from sparse_adv.engine.traced_code import METADATA, Constant, NotTraceable, OnACopy, arguments_of, called_by, module_of
from sparse_adv.masks.layers import computes_as

_IN_PLACE: dict[Callable[..., Any] | str, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    torch.relu_: torch.relu,
    F.relu_: torch.relu,
    "add_": operator.add,
    "sub_": operator.sub,
    "mul_": operator.mul,
    "div_": operator.truediv,
    "relu_": torch.relu,
}
"""For each operation that overwrites its first argument, the one that returns the same result as a new tensor."""

_FUNCTIONAL = {
    function
    for function in vars(F).values()
    if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters
}
"""Functions with an argument `inplace`."""

_NEW_RESULT = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.ReLU,
)
"""Modules whose result shares no memory with another tensor. `activation_of` finds the activation modules."""

_NEW_RESULT_FUNCTIONS = {
    *(torch.add, torch.mul, torch.cat, torch.mean, torch.sum, "add", "mul", "mean", "sum", "clone", F.relu, "relu"),
    *(F.conv2d, F.linear, F.batch_norm, F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d),
    *_IN_PLACE.values(),
}
"""Functions and methods whose result shares no memory with another tensor."""

_DROPOUTS = (nn.Dropout, nn.AlphaDropout)
_DROPOUT_FUNCTIONS = (F.dropout, F.alpha_dropout)
_FEATURE_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_FEATURE_DROPOUT_FUNCTIONS = (F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout)
"""These drop whole channels."""


def is_dropout(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node drops single elements at random in training mode.

    Args:
        node: of a graph.
        module: the module that the node calls, if any.
    """
    return node.target in _DROPOUT_FUNCTIONS if module is None else _is_only(module, *_DROPOUTS)


def _is_only(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module does what one of these classes does, and nothing else."""
    return computes_as(module, *kinds) and not has_hooks(module)


def drop_identities(model: nn.Module, graph: fx.Graph) -> None:
    """Remove the operations that return their input itself: identities, and dropout in eval mode."""
    for node in list(graph.nodes):
        if _returns_its_input(model, node) and node.args and isinstance(node.args[0], fx.Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _returns_its_input(model: nn.Module, node: fx.Node) -> bool:
    module = module_of(model, node)
    if module is not None:
        is_off = not module.training and _is_only(module, *_DROPOUTS, *_FEATURE_DROPOUTS)
        return is_off or _is_only(module, nn.Identity)
    is_function = node.target in (*_DROPOUT_FUNCTIONS, *_FEATURE_DROPOUT_FUNCTIONS)
    return is_function and arguments_of(node)["training"] is False


def make_functional(model: nn.Module, graph: fx.Graph) -> None:
    """Replace in-place operations by ones with a new result. Later readers of the overwritten tensor then read this
    result.

    Raises:
        NotTraceable: if an unknown operation overwrites a tensor, or if code outside of the graph or a later operation
            that knows the tensor under another name may read it.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, set[fx.Node]] = {}
    """For each operation so far, the operations whose memory its result may share."""
    for node in list(graph.nodes):
        memory[node] = {node}
        if not _overwrites(model, node):
            if not _returns_new_memory(model, node):
                memory[node] = memory[node].union(*[memory[source] for source in node.all_input_nodes])
            continue
        what, source = called_by(node), node.args[0] if node.args else None
        origins = memory[source] if isinstance(source, fx.Node) else set()
        readers = {user for origin in origins for user in origin.users if order[user] < order[node]}
        if (
            not isinstance(source, fx.Node)
            or any(_is_known_outside(model, origin) for origin in origins)
            or any(_has_hooks(model, reader) for reader in readers)
        ):
            raise NotTraceable(f"{what} overwrites (inplace=True) a tensor that code outside of the graph may read")
        for other, shared in memory.items():
            is_read = any(order[user] > order[node] for user in other.users)
            if other is not source and is_read and not shared.isdisjoint(memory[source]):
                raise NotTraceable(f"{what} overwrites what {called_by(other)} returned, which is read later")
        _compute_anew(model, node, source)
        for user in list(source.users):
            if order[user] > order[node]:
                user.replace_input_with(source, node)


def _compute_anew(model: nn.Module, node: fx.Node, source: fx.Node) -> None:
    """Let an operation return its result in new memory instead of that of its first operand."""
    if (called := module_of(model, node)) is not None:
        node.op = "call_function"
        if has_hooks(called):
            node.target = OnACopy(called)
        elif isinstance(called, nn.ReLU):
            node.target = torch.relu
        else:
            node.target = copy.copy(called)
            vars(node.target)["inplace"] = False
    elif node.target in _IN_PLACE:
        node.op, node.target = "call_function", _IN_PLACE[node.target]
    elif node.target in _FUNCTIONAL:
        _, *others = (arguments := arguments_of(node))
        node.kwargs = {name: arguments[name] for name in others} | {"inplace": False}
        node.args = (source,)
    else:
        raise NotTraceable(f"{called_by(node)} overwrites a tensor")


def _overwrites(model: nn.Module, node: fx.Node) -> bool:
    module = module_of(model, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.startswith("__")) or name == "__setitem__"
    if node.op != "call_function":
        return False
    if node.target in _FUNCTIONAL:
        return bool(arguments_of(node)["inplace"])
    return node.target in _IN_PLACE or node.target is operator.setitem or node.kwargs.get("out") is not None


def _returns_new_memory(model: nn.Module, node: fx.Node) -> bool:
    """Whether the result of a node shares no memory with an operand."""
    module = module_of(model, node)
    if activation_of(node, module) is not None:
        return True
    if module is not None:
        return isinstance(module, _NEW_RESULT) and is_of_library(type(module).__module__)
    is_size = node.target in METADATA or (node.target is getattr and node.args[1] in METADATA)
    return is_size or node.target in _NEW_RESULT_FUNCTIONS


def _is_known_outside(model: nn.Module, node: fx.Node) -> bool:
    """Whether the result of a node may lie in memory that code outside of the graph reads."""
    if node.op in ("placeholder", "get_attr") or isinstance(node.target, Constant) or _has_hooks(model, node):
        return True
    module = module_of(model, node)
    return module is not None and not _returns_new_memory(model, node) and runs_code_of_user(module)


def _has_hooks(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node calls a module that has hooks, or parts with hooks, which see what it reads and returns."""
    module = module_of(model, node)
    return isinstance(node.target, OnACopy) or (module is not None and any(map(has_hooks, module.modules())))
