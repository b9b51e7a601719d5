"""Elementwise functions other than the ReLU, each with PyTorch's operations that compute it and its gradient."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparse_adv.engine.model_state import runs_own_code

_aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise function."""

    name: str
    _forward: Callable[..., Tensor]
    _backward: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its parameters, such as a slope, by PyTorch's names."""
    of_output: bool = False
    """Whether the gradient is computed from the function's result; else from its input."""

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The function of x, in `out`."""
        return self._forward(x, **self.options, out=out)

    def backward(self, grad: Tensor, kept: Tensor, out: Tensor) -> Tensor:
        """The gradient of the input, from that of the result and the kept tensor; in `out` if PyTorch's kernel can."""
        return self._backward(grad, kept, **self.options, grad_input=out)


def _leaky_relu_backward(grad: Tensor, x: Tensor, negative_slope: float, grad_input: Tensor) -> Tensor:
    return _aten.leaky_relu_backward.grad_input(grad, x, negative_slope, False, grad_input=grad_input)


def _hardswish_backward(grad: Tensor, x: Tensor, grad_input: Tensor) -> Tensor:
    return _aten.hardswish_backward.default(grad, x)  # its form with `out` computes this and copies it


_SILU = Activation("SiLU", _aten.silu.out, _aten.silu_backward.grad_input)
_GELU = Activation("GELU", _aten.gelu.out, _aten.gelu_backward.grad_input, {"approximate": "none"})
_SIGMOID = Activation("sigmoid", _aten.sigmoid.out, _aten.sigmoid_backward.grad_input, of_output=True)
_TANH = Activation("tanh", _aten.tanh.out, _aten.tanh_backward.grad_input, of_output=True)
_HARDTANH = Activation(
    "hardtanh", _aten.hardtanh.out, _aten.hardtanh_backward.grad_input, {"min_val": -1.0, "max_val": 1.0}
)
_RELU6 = replace(_HARDTANH, name="ReLU6", options={"min_val": 0.0, "max_val": 6.0})
_LEAKY_RELU = Activation("leaky ReLU", _aten.leaky_relu.out, _leaky_relu_backward, {"negative_slope": 0.01})
_HARDSWISH = Activation("hardswish", _aten.hardswish.out, _hardswish_backward)
_HARDSIGMOID = Activation("hardsigmoid", _aten.hardsigmoid.out, _aten.hardsigmoid_backward.grad_input)
_SOFTPLUS = Activation(
    "softplus", _aten.softplus.out, _aten.softplus_backward.grad_input, {"beta": 1.0, "threshold": 20.0}
)

_OF_MODULES: dict[type[nn.Module], Activation] = {
    nn.SiLU: _SILU,
    nn.GELU: _GELU,
    nn.Sigmoid: _SIGMOID,
    nn.Tanh: _TANH,
    nn.Hardtanh: _HARDTANH,
    nn.ReLU6: _RELU6,
    nn.LeakyReLU: _LEAKY_RELU,
    nn.Hardswish: _HARDSWISH,
    nn.Hardsigmoid: _HARDSIGMOID,
    nn.Softplus: _SOFTPLUS,
}
_OF_FUNCTIONS: dict[Callable[..., Any] | str, Activation] = {
    F.silu: _SILU,
    F.gelu: _GELU,
    **dict.fromkeys((torch.sigmoid, F.sigmoid, "sigmoid"), _SIGMOID),
    **dict.fromkeys((torch.tanh, F.tanh, "tanh"), _TANH),
    F.hardtanh: _HARDTANH,
    F.relu6: _RELU6,
    F.leaky_relu: _LEAKY_RELU,
    F.hardswish: _HARDSWISH,
    F.hardsigmoid: _HARDSIGMOID,
    F.softplus: _SOFTPLUS,
}


def activation_of(node: fx.Node, module: nn.Module | None) -> Activation | None:
    """The activation that a node applies to its first argument; None if it applies none of them.

    Args:
        node: of a graph without in-place operations.
        module: the module that the node calls, if any.
    """
    if module is not None:
        activation = None if runs_own_code(module) else _OF_MODULES.get(type(module))
        return activation and replace(activation, options={name: getattr(module, name) for name in activation.options})
    activation = _OF_FUNCTIONS.get(node.target) if node.op.startswith("call") else None
    if activation is None or len(node.all_input_nodes) > 1:  # an option that is computed
        return None
    if inspect.isfunction(node.target):
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments
    else:  # a method or a C++ function: its signature is not known
        given = dict(node.kwargs)
        if len(node.args) > 1:
            return None
    options = {name: given.get(name, value) for name, value in activation.options.items()}
    return replace(activation, options=options)
