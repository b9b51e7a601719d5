"""The steps of an engine, each with its forward and its backward pass."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_adv.engine.activations import Activation
from sparse_adv.engine.folding import FoldedNorm
from sparse_adv.engine.kernels import Convolution, DeviceKernels, Place
from sparse_adv.engine.values import PassTensors, Value
from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.nn import MaskedConv2d, MaskedLinear
from sparse_adv.ops import Pattern


class Step(ABC):
    """A part of a model, with the values that it reads and those that it makes.

    Attributes:
        norm: the BatchNorm in it, if there is one.
    """

    def __init__(self, name: str, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
        self.name, self.inputs, self.outputs = name, tuple(inputs), tuple(outputs)
        self.norm: _BatchNorm | None = None

    def fold(self, kernels: DeviceKernels, norm: FoldedNorm | None) -> None:  # noqa: B027 - not all have weights
        """Read the weights, which may have changed since the last time, and fold in the BatchNorm."""

    def writes_gate(self, kernels: DeviceKernels) -> bool:
        """Whether the kernel that ends with a ReLU here also writes the gate of its output."""
        return kernels.writes_all_gates

    @abstractmethod
    def forward(self, tensors: PassTensors) -> None:
        """Compute the outputs."""

    @abstractmethod
    def backward(self, tensors: PassTensors) -> None:
        """Contribute to the gradients of the inputs."""

    @abstractmethod
    def passes_on(self) -> Sequence[Value]:
        """The inputs whose gradients may share memory with the gradient of an output."""

    @abstractmethod
    def describe(self) -> str:
        """Say what the step computes."""

    def kept(self) -> Sequence[Value]:
        """The values that must last until the backward pass."""
        return []


class FusedStep(Step):
    """act(f(input) + residual), where act is a ReLU or nothing and the residual may be absent."""

    def __init__(self, name: str, input: Value, output: Value) -> None:
        super().__init__(name, [input], [output])
        self.residual: Value | None = None

    @property
    def input(self) -> Value:
        return self.inputs[0]

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def add(self, residual: Value) -> None:
        """Fuse the addition of another value."""
        self.residual = residual
        self.inputs = (self.input, residual)

    def forward(self, tensors: PassTensors) -> None:
        x = tensors.kernels.plain(tensors[self.input])
        residual = None if self.residual is None else tensors.kernels.plain(tensors[self.residual])
        epilogue = Epilogue(residual=residual, relu=self.output.rectified, gate_out=tensors.gate(self.output))
        tensors[self.output] = self._forward(tensors, x, epilogue)

    def backward(self, tensors: PassTensors) -> None:
        gradient = tensors.take_gradient(self.output)
        if gradient is None:
            for value in self.inputs:
                tensors.pass_on(value, None)
            return
        gradient = tensors.kernels.plain(gradient)
        if self.residual is not None:
            tensors.pass_on(self.residual, gradient)

        def compute(epilogue: Epilogue, place: Place) -> Tensor:
            return self._backward(tensors, gradient, epilogue, place)

        tensors.contribute(self.input, compute)

    def passes_on(self) -> Sequence[Value]:
        return [] if self.residual is None else [self.residual]

    def describe(self) -> str:
        ends = (["residual"] if self.residual is not None else []) + (["ReLU"] if self.output.rectified else [])
        return " + ".join([*self._parts(), *ends])

    @abstractmethod
    def _parts(self) -> list[str]:
        """Names of the operations of f."""

    @abstractmethod
    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor: ...

    @abstractmethod
    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor: ...


class ConvolutionStep(FusedStep):
    """act(batch_norm(conv(x)) + residual)."""

    def __init__(self, name: str, layer: nn.Conv2d, input: Value, output: Value) -> None:
        super().__init__(name, input, output)
        self.layer = layer
        self._convolution: Convolution
        self._made_for: tuple[DeviceKernels, Pattern | None] | None = None

    @property
    def pattern(self) -> Pattern | None:
        """The present pattern of a masked layer. It is another object if masks or requested kernels have changed."""
        if not isinstance(self.layer, MaskedConv2d):
            return None
        self.layer.refresh()
        return self.layer.pattern

    def fold(self, kernels: DeviceKernels, norm: FoldedNorm | None) -> None:
        made_for = kernels, self.pattern
        # While mask and device stay the same, the convolution with its kernel and its lists of blocks is kept.
        if self._made_for is None or any(map(operator.is_not, made_for, self._made_for)):
            self._convolution = kernels.convolution(self.layer, self.input.shape)
            self._made_for = made_for
        self._convolution.fold(norm)

    def writes_gate(self, kernels: DeviceKernels) -> bool:
        return kernels.writes_gate_of(self.layer, self.input.shape)

    def kernel_names(self) -> str:
        """Name of the kernel that computes it, or both names if the passes have different kernels."""
        forward, backward = (self._convolution.kernel(pass_) for pass_ in ("forward", "grad_input"))
        return forward if forward == backward else f"{forward}, backward {backward}"

    def _parts(self) -> list[str]:
        return ["convolution"] + ([] if self.norm is None else ["BatchNorm"])

    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor:
        return self._convolution.forward(x, epilogue, tensors.place(self.output))

    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        return self._convolution.grad_input(gradient, epilogue, place)


class LinearStep(FusedStep):
    """act(x W^T + b + residual)."""

    def __init__(self, name: str, layer: nn.Linear, input: Value, output: Value) -> None:
        super().__init__(name, input, output)
        self.layer = layer

    def fold(self, kernels: DeviceKernels, norm: FoldedNorm | None) -> None:
        if isinstance(self.layer, MaskedLinear):
            self.layer.refresh()
        weight, bias = self.layer.weight.detach(), self.layer.bias
        if isinstance(self.layer, MaskedLinear):
            weight = torch.where(self.layer.weight_mask, weight, 0)
        self._weight = weight.to(kernels.dtype)
        self._bias = None if bias is None else bias.detach().to(kernels.dtype)

    def _parts(self) -> list[str]:
        return ["linear"]

    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor:
        return tensors.kernels.finish(F.linear(x, self._weight, self._bias), epilogue)

    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        return tensors.kernels.finish(gradient @ self._weight, epilogue)


class PointwiseStep(FusedStep):
    """act(batch_norm(x) + residual), where no convolution comes before it that could include these operations."""

    def __init__(self, name: str, norm: _BatchNorm | None, input: Value, output: Value) -> None:
        super().__init__(name, input, output)
        self.norm = norm
        self._scale: Tensor | None = None
        self._bias: Tensor | None = None

    def fold(self, kernels: DeviceKernels, norm: FoldedNorm | None) -> None:
        if norm is not None:
            self._scale, self._bias = norm.scale, norm.shift

    def writes_gate(self, kernels: DeviceKernels) -> bool:
        return True

    def passes_on(self) -> Sequence[Value]:
        return super().passes_on() if self.norm is not None else self.inputs

    def _parts(self) -> list[str]:
        return [] if self.norm is None else ["BatchNorm"]

    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor:
        epilogue = epilogue._replace(scale=self._scale, bias=self._bias)
        return tensors.kernels.pointwise(x, epilogue, tensors.place(self.output))

    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        epilogue = epilogue._replace(scale=self._scale)
        return gradient if epilogue.is_empty else tensors.kernels.pointwise(gradient, epilogue, place)


class MaxPoolStep(FusedStep):
    """The maximum of windows that lie side by side, without overlap or gap."""

    def __init__(self, name: str, size: tuple[int, int], input: Value, output: Value) -> None:
        super().__init__(name, input, output)
        self.size = size
        self._index: Tensor | None = None
        """Position of the largest element in each window; each pass reuses the memory."""

    def fold(self, kernels: DeviceKernels, norm: FoldedNorm | None) -> None:
        self._index = None  # new masks may have changed the memory format

    def _parts(self) -> list[str]:
        return ["max pooling"]

    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor:
        y, self._index = tensors.kernels.max_pool(x, self.size, self._index, tensors.place(self.output))
        return y

    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        assert self._index is not None
        shape = self.input.shape_for(tensors.images)
        return tensors.kernels.max_pool_grad(gradient, self._index, self.size, shape, epilogue, place)


class ActivationStep(FusedStep):
    """An elementwise function other than the ReLU."""

    def __init__(self, name: str, activation: Activation, input: Value, output: Value) -> None:
        super().__init__(name, input, output)
        self.activation = activation

    def kept(self) -> Sequence[Value]:
        return [self.output if self.activation.of_output else self.input]

    def _parts(self) -> list[str]:
        return [self.activation.name]

    def _forward(self, tensors: PassTensors, x: Tensor, epilogue: Epilogue) -> Tensor:
        return self.activation.forward(x, tensors.kernels.memory(x, tensors.place(self.output)))

    def _backward(self, tensors: PassTensors, gradient: Tensor, epilogue: Epilogue, place: Place) -> Tensor:
        kernels = tensors.kernels
        (kept,) = (kernels.plain(tensors[value]) for value in self.kept())
        # The planned memory may hold the residual, which is still to be read.
        out = torch.empty_like(gradient) if epilogue.residual is not None else kernels.memory(gradient, place)
        return kernels.finish(self.activation.backward(gradient, kept, out), epilogue)
