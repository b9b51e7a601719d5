"""Finds calls of `F.batch_norm` in a graph, as subclasses that compute more than a BatchNorm make them."""

from __future__ import annotations

import copy
import operator

import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_adv.engine.model_state import runs_own_code
from sparse_adv.engine.traced_code import arguments_of


def gather_norms(model: nn.Module, graph: fx.Graph) -> None:
    """Replace calls of `F.batch_norm` that do the same as `nn.BatchNorm2d` by such a module with the same tensors.

    Such calls come from the forward of a subclass, such as timm's BatchNormAct2d, which also applies an activation.
    """
    for node in list(graph.nodes):
        norm = _norm_of(model, node)
        if norm is None:
            continue
        counting = [user for read in graph.nodes if _is(model, read, norm.num_batches_tracked) for user in read.users]
        counts = norm.training and norm.num_batches_tracked is not None
        if [(each.target, each.args[1:], len(each.users)) for each in counting] != [("add_", (1,), 0)] * counts:
            continue
        tensors = [*node.all_input_nodes[1:], *[source for each in counting for source in each.all_input_nodes]]
        for each in counting:
            graph.erase_node(each)
        plain = copy.copy(norm)  # shares the layer's own tables of parameters and buffers
        plain.__class__ = nn.BatchNorm2d
        node.target, node.args, node.kwargs = plain, node.args[:1], {}
        for tensor in tensors:
            if not tensor.users:
                graph.erase_node(tensor)


def _norm_of(model: nn.Module, node: fx.Node) -> nn.BatchNorm2d | None:
    """The layer that all arguments of a call of `F.batch_norm` come from, in the way of `nn.BatchNorm2d`."""
    if node.target is not F.batch_norm or not node.args:
        return None
    given = arguments_of(node)
    mean = given["running_mean"]
    if not isinstance(mean, fx.Node) or mean.op != "get_attr":
        return None
    norm = model.get_submodule(str(mean.target).rpartition(".")[0])
    if not isinstance(norm, nn.BatchNorm2d) or runs_own_code(norm) or not norm.track_running_stats:
        return None
    has_its_tensors = all(
        _is(model, given[name], getattr(norm, name)) for name in ("running_mean", "running_var", "weight", "bias")
    )
    has_its_numbers = (given["training"], given["eps"]) == (norm.training, norm.eps)
    keeps_its_average = not norm.training or given["momentum"] == norm.momentum
    return norm if has_its_tensors and has_its_numbers and keeps_its_average else None


def _is(model: nn.Module, argument: object, tensor: Tensor | None) -> bool:
    """Whether an argument in a graph is a tensor of the model."""
    if isinstance(argument, fx.Node) and argument.op == "get_attr":
        return operator.attrgetter(str(argument.target))(model) is tensor
    return argument is tensor is None
