"""What the Python code of a model may do while it is traced: the graph must show all that depends on tensors."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_INDEXING = (torch.ops.aten.index, torch.ops.aten._unsafe_index)


class NotTraceable(Exception):
    """A model that the engine leaves to PyTorch; the text says why."""


class Constant:
    """An operation that returns a tensor for the graph to read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> Tensor:
        return self.tensor


class OnACopy:
    """An operation that calls a module on a copy of its input, because the module overwrites the input and has hooks.

    The hooks get the module itself. As without the copy, they see the overwritten tensor both as input and as result.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.module(x.clone(), *args, **kwargs)


class EagerFunctions(TorchFunctionMode):
    """A context for tracing that refuses computations with tensors if the graph would not repeat them.

    torch.fx records functions of the images, parameters and buffers. Others run at once, and the graph keeps their
    result. That is right if they read only numbers, as `torch.tensor(self.mean)` and `torch.arange(n)` do. It is wrong
    if they read a tensor that code outside of the graph may change.

    Raises:
        NotTraceable: before such a function runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, Tensor] = {}
        """The tensors made from numbers, kept so that no other tensor gets the same id."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return func(*args, **kwargs)
        if not all(id(leaf) in self._made for leaf in leaves if isinstance(leaf, Tensor)):
            raise NotTraceable("its Python code computes with tensors that are no parameters or buffers of a module")
        result = func(*args, **kwargs)
        self._made |= {id(leaf): leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


class SizesOfValues(TorchDispatchMode):
    """A context that refuses operations whose results have sizes that depend on values: a graph has fixed sizes.

    Raises:
        NotTraceable: before such an operation runs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in _INDEXING else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if by_mask or (torch.Tag.dynamic_output_shape in func.tags and func.overloadpacket not in _INDEXING):
            raise NotTraceable(f"the size of a result of {func.overloadpacket.__name__} depends on values")
        return func(*args, **(kwargs or {}))


def module_of(model: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a node calls, or None."""
    if isinstance(node.target, nn.Module):  # replaces a module that would overwrite its input or does more
        return node.target
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def called_by(node: fx.Node) -> str:
    """What a node calls, in the words of an error message: a module by its name in the model, or a function."""
    if node.op == "call_module":
        return f"module {node.target!r}"
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.name))


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of the Python function that a node calls, including defaults, by name."""
    assert callable(node.target)
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


METADATA = {
    *("shape", "size", "dim", "ndim", "ndimension", "numel", "nelement"),
    *("dtype", "device", "layout", "is_cuda", "is_floating_point", "is_complex", "element_size", "itemsize"),
}
"""Properties of a tensor that depend neither on its elements nor on its strides: those may differ from the trace."""


def reads_elements(node: fx.Node) -> bool:
    """Whether an operation that returns no tensor may read the elements of one, or their order in memory."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] not in METADATA
    if node.op == "call_method":
        return node.target not in METADATA
    if node.target is operator.getitem:  # an item of a tuple: an item of a tensor is a tensor
        return len(node.all_input_nodes) > 1
    return node.target not in (len, torch.numel, torch.is_floating_point, torch.is_complex)
