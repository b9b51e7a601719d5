"""The step of operations that autograd differentiates."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from sparse_adv.engine.model_state import has_hooks, runs_code_of_user
from sparse_adv.engine.steps import Step
from sparse_adv.engine.traced_code import OnACopy, called_by
from sparse_adv.engine.values import PassTensors, Value


class OtherSize(Exception):
    """A part of the model that is not traced returns another size than in the trace."""


class AutogradStep(Step):
    """Operations that no other step computes, run by PyTorch and differentiated by autograd.

    Args:
        model: the root of the modules and tensors that the nodes name.
        nodes: the operations, in their order.
        reads: nodes outside of the step whose results it reads, with their values.
        makes: nodes of the step whose results other steps read, with their values.
        constants: nodes outside of the step whose results it reads and are not tensors. Each has a function that
            returns the result for a number of images.
        sizes: nodes of the step whose results are tensors. Each has a function that returns the expected shape for a
            number of images. Shapes are compared only if a node of the step runs the user's code, because its results
            may change their size.

    Attributes:
        modules: those that the operations call.
        has_hooks: whether hooks see what it computes.
    """

    def __init__(
        self,
        model: nn.Module,
        nodes: Sequence[fx.Node],
        reads: dict[fx.Node, Value],
        makes: dict[fx.Node, Value],
        constants: dict[fx.Node, Callable[[int], object]],
        sizes: dict[fx.Node, Callable[[int], torch.Size]],
    ) -> None:
        super().__init__(nodes[0].name, list(reads.values()), list(makes.values()))
        self._operations = {node: operation_of(model, node) for node in nodes}
        self.modules = [module for node in nodes if (module := _module_in(self._operations[node])) is not None]
        self.has_hooks = any(has_hooks(part) for module in self.modules for part in module.modules())
        self._sizes = sizes if any(map(runs_code_of_user, self.modules)) else {}
        self._reads, self._makes, self._constants = list(reads), list(makes), constants
        self._leaves: list[Tensor] = []
        self._results: list[Tensor] = []
        # PyTorch's backward pass of an InstanceNorm is wrong for one image in channels_last (torch 2.13).
        self._normalizes_images = any(map(_normalizes_images, self._operations.values()))

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors at which the graph of the last differentiable pass begins."""
        return [leaf for leaf in self._leaves if leaf.requires_grad]

    def kept(self) -> Sequence[Value]:
        return self.inputs

    def passes_on(self) -> Sequence[Value]:
        return self.inputs  # autograd returns views, such as those of a concatenation's gradient

    def describe(self) -> str:
        return f"PyTorch and autograd: {', '.join(node.name for node in self._operations)}"

    def forward(self, tensors: PassTensors) -> None:
        leaves = [tensors[value].detach() for value in self.inputs]
        if tensors.differentiable:
            for value, leaf in zip(self.inputs, leaves, strict=True):
                leaf.requires_grad_(value.has_gradient and leaf.is_floating_point())
            with torch.enable_grad():
                self._leaves, self._results = leaves, self._run(leaves, tensors.images)
            results = self._results
        else:
            results = self._run(leaves, tensors.images)
        for value, result in zip(self.outputs, results, strict=True):
            tensors[value] = result.detach()

    def backward(self, tensors: PassTensors) -> None:
        results, gradients = [], []
        for value, result in zip(self.outputs, self._results, strict=True):
            gradient = tensors.take_gradient(value)
            if gradient is not None and result.requires_grad:
                gradient = gradient.contiguous() if self._normalizes_images and tensors.images == 1 else gradient
                results.append(result)
                gradients.append(gradient.to(result.dtype))
        leaves = self.leaves
        of_leaves: Sequence[Tensor | None] = [None] * len(leaves)
        if results and leaves:  # empty if the step reads parameters only
            of_leaves = torch.autograd.grad(results, leaves, gradients, allow_unused=True)
        by_leaf = dict(zip(map(id, leaves), of_leaves, strict=True))
        for value, leaf in zip(self.inputs, self._leaves, strict=True):
            tensors.pass_on(value, by_leaf.get(id(leaf)))
        self._leaves, self._results = [], []

    def _run(self, leaves: Sequence[Tensor], images: int) -> list[Tensor]:
        results: dict[fx.Node, Any] = {node: constant(images) for node, constant in self._constants.items()}
        results |= zip(self._reads, leaves, strict=True)
        for node, operation in self._operations.items():
            args, kwargs = fx.map_arg((node.args, node.kwargs), results.__getitem__)
            results[node] = result = operation(*args, **kwargs)
            if node in self._sizes and result.shape != (size := self._sizes[node](images)):
                raise OtherSize(f"{called_by(node)} returns {list(result.shape)}, in the trace {list(size)}")
        return [results[node] for node in self._makes]


def _module_in(operation: Callable[..., Any]) -> nn.Module | None:
    """The module that an operation calls."""
    operation = operation.module if isinstance(operation, OnACopy) else operation
    return operation if isinstance(operation, nn.Module) else None


def _normalizes_images(operation: Callable[..., Any]) -> bool:
    """Whether an operation is an InstanceNorm, or a module that has one."""
    if (module := _module_in(operation)) is not None:
        return any(isinstance(part, _InstanceNorm) for part in module.modules())
    return operation in (F.instance_norm, torch.instance_norm)


def operation_of(model: nn.Module, node: fx.Node) -> Callable[..., Any]:
    """The function that a node calls, without a reference to the model: so the model can be freed before its steps."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    if node.op == "call_method":
        # The engine's memory format may differ from the model's. `view` may then fail, but `reshape` copies.
        is_view = node.target == "view" and not any(isinstance(arg, torch.dtype) for arg in node.args)
        name = "reshape" if is_view else str(node.target)
        return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)
    if node.op == "get_attr":
        root, read = weakref.ref(model), operator.attrgetter(str(node.target))
        return lambda: read(root())
    assert callable(node.target)
    return node.target
