"""A model as a list of fused steps: logits in the forward pass, the gradient of the input in the backward pass."""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_adv.engine import buffers
from sparse_adv.engine.autograd_step import AutogradStep, OtherSize
from sparse_adv.engine.captured import Backward, CapturedPasses
from sparse_adv.engine.folding import fold_norms
from sparse_adv.engine.fusing import Fusion
from sparse_adv.engine.gradients import Autograd, LossOfLogits, image_gradient, outside_inference
from sparse_adv.engine.kernels import DeviceKernels
from sparse_adv.engine.kernels_cpu import CpuKernels, best_memory_format
from sparse_adv.engine.steps import ConvolutionStep
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.engine.tracing import trace
from sparse_adv.engine.values import PassTensors
from sparse_adv.ops import Pattern
from sparse_adv.ops._library import has_triton

log = logging.getLogger(__name__)


class Program:
    """The fused steps of a model in eval mode, for batches of at most one size.

    Where kernels or operations need whole batches, smaller ones are padded with zeros.

    Autograd computes what the steps cannot: results that a loss itself asks for, and gradients of a loss that reads
    features kept by hooks. From the time on when a part that is not traced returns another size than in the trace,
    autograd computes everything. The model must then still exist.

    Args:
        model: in eval mode.
        x: float tensor [N, ...], a batch of its input; all steps have its dtype, except under autocast.
        batch: the size of the batches; None for `padded_batch(len(x))`.

    Attributes:
        steps: in the order of the forward pass.
        unfused: the modules that autograd runs.

    Raises:
        NotTraceable: if the model cannot become steps, or there are no kernels for its device.
    """

    def __init__(self, model: nn.Module, x: Tensor, batch: int | None = None) -> None:
        self._model = weakref.ref(model)
        x = _padded(x, batch or padded_batch(len(x)))
        fusion = Fusion(trace(model, x))
        self.steps = fusion.steps
        self._convolutions = [step for step in self.steps if isinstance(step, ConvolutionStep)]
        self._like, self._input, self._output = x.new_empty(0), fusion.input, fusion.output
        if self._output.shape[:1] != x.shape[:1]:  # as after `squeeze` on one image
            raise NotTraceable(f"its output of {len(x)} images has shape {list(self._output.shape)}")
        self._patterns, kernels = self._present_patterns(), self._choose_kernels()
        self._any_batch = kernels.any_batch and fusion.any_batch
        self._plan_memory(kernels)
        left = [step for step in self.steps if isinstance(step, AutogradStep)]
        self.unfused = nn.ModuleList(module for step in left for module in step.modules)
        self._hooked = [step for step in left if step.has_hooks]
        self._reads_features = self._in_loss = self._has_other_sizes = False
        capturer = None if self._hooked else kernels.capturer  # a replay would not run the hooks
        kinds = (False, True)  # of passes: with or without a gradient
        self._captured = {} if capturer is None else {kind: CapturedPasses(capturer) for kind in kinds}

    def fold(self) -> None:
        """Read masks, weights and the statistics of BatchNorm again, which may have changed."""
        patterns = self._present_patterns()
        if any(map(operator.is_not, patterns, self._patterns)):
            self._patterns, kernels = patterns, self._choose_kernels()
            is_other = kernels.memory_format != self._kernels.memory_format
            if is_other or buffers.gated(self.steps, kernels) != self._memory.gates.keys():
                self._plan_memory(kernels)
        norms = iter(fold_norms([step.norm for step in self.steps if step.norm is not None], self._kernels.dtype))
        for step in self.steps:
            step.fold(self._kernels, None if step.norm is None else next(norms))
        self._reads_features = False
        self.forget_graphs()

    def _present_patterns(self) -> list[Pattern | None]:
        return [step.pattern for step in self._convolutions]

    def _choose_kernels(self) -> DeviceKernels:
        return choose_kernels([(step.layer, step.input.shape) for step in self._convolutions], self._like)

    def _plan_memory(self, kernels: DeviceKernels) -> None:
        self._kernels = kernels
        self._memory = buffers.Memory(self.steps, self._input, self._output, kernels, self._like.device)
        self._read_last = buffers.read_last(self.steps, self._output, self._memory.gates)

    def forget_graphs(self) -> None:
        """Free the memory of the captured passes; later passes are captured anew."""
        for passes in self._captured.values():
            passes.forget()

    @torch.inference_mode(False)
    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """What the model returns."""
        if not self._is_left_to_autograd(x):
            with self._sizes_as_traced():
                logits, _ = self._passes(x, differentiable=False)
                return logits[: len(x)].clone()  # the memory is used again
        return self._autograd().logits(x)

    @torch.inference_mode(False)
    @torch.no_grad()
    def gradient(self, x: Tensor, loss: LossOfLogits) -> Tensor:
        """The gradient of the sum of loss(logits) with respect to the input."""
        if not (self._reads_features or self._is_left_to_autograd(x)):
            with self._sizes_as_traced():
                output, backward = self._passes(x, differentiable=True)
                gradient = self._gradient_of_logits(output[: len(x)], loss)
                if gradient is not None:
                    assert backward is not None
                    of_input = backward(_padded(gradient, len(output)))
                    # A copy, as the memory is used again.
                    return torch.zeros_like(x) if of_input is None else torch.empty_like(x).copy_(of_input[: len(x)])
        return self._autograd().gradient(x, loss)

    def _gradient_of_logits(self, logits: Tensor, loss: LossOfLogits) -> Tensor | None:
        """The gradient of the loss by the logits; None if the loss also reads features that hooks kept."""
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            self._in_loss = True
            try:
                value = loss(logits.clone()).sum()  # a copy: the loss may keep its argument or write to it
            finally:
                self._in_loss = False
            features = [leaf for step in self._hooked for leaf in step.leaves]
            if features and value.requires_grad:
                found = torch.autograd.grad(value, features, retain_graph=True, allow_unused=True)
                self._reads_features = any(gradient is not None for gradient in found)
            return None if self._reads_features else image_gradient(value, logits)

    def _is_left_to_autograd(self, x: Tensor) -> bool:
        """Whether no step may run: no images, another size than traced, steps in use, or hooks would see padding."""
        pads = not self._any_batch and len(x) != self._input.shape[0]
        return self._has_other_sizes or self._in_loss or not len(x) or (pads and bool(self._hooked))

    def _autograd(self) -> Autograd:
        model = self._model()
        assert model is not None
        return Autograd(model)

    @contextmanager
    def _sizes_as_traced(self) -> Iterator[None]:
        """A context that is left as soon as a part of the model returns another size than in the trace."""
        try:
            yield
        except OtherSize as error:
            self._has_other_sizes = True
            log.info("the engine leaves this %s to autograd: %s", type(self._model()).__name__, error)

    def _passes(self, x: Tensor, differentiable: bool) -> tuple[Tensor, Backward | None]:
        """The logits, and the backward pass if one may follow."""
        forward = self._differentiable if differentiable else self._forward
        x = outside_inference(x).detach()
        images = x if self._any_batch else _padded(x, self._input.shape[0])
        captured = self._captured.get(differentiable)
        return forward(images) if captured is None else captured.run(forward, images)

    def _forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self._tensors(images, differentiable=False)[self._output], None

    def _differentiable(self, images: Tensor) -> tuple[Tensor, Backward]:
        tensors = self._tensors(images, differentiable=True)

        def backward(gradient: Tensor) -> Tensor | None:
            tensors.start_gradient(self._output, self._kernels.plain(gradient))
            for step in reversed(self.steps):
                step.backward(tensors)
            return tensors.take_gradient(self._input)

        return tensors[self._output], backward

    def _tensors(self, images: Tensor, differentiable: bool) -> PassTensors:
        """The tensors after a forward pass."""
        tensors = PassTensors(self._kernels, self._memory.for_images(len(images), differentiable), differentiable)
        tensors[self._input] = images
        for step, unread in zip(self.steps, self._read_last, strict=True):
            step.forward(tensors)
            for value in unread:
                tensors.discard(value)
        return tensors


def choose_kernels(convolutions: Sequence[tuple[nn.Conv2d, torch.Size]], x: Tensor) -> DeviceKernels:
    """The kernels of the input's device, in the dtype and memory format in which a network is to run.

    Args:
        convolutions: of the network, each with the shape of its input.
        x: a batch of its input; only dtype and device are read.

    Raises:
        NotTraceable: if the engine has no kernels for them.
    """
    device = x.device.type
    dtypes = {layer.weight.dtype for layer, _ in convolutions} | {x.dtype}
    if len(dtypes) > 1:
        raise NotTraceable(f"weights and input differ in dtype: {', '.join(sorted(map(str, dtypes)))}")
    if device == "cpu" and not torch.is_autocast_enabled("cpu"):
        return CpuKernels(x.dtype, best_memory_format(convolutions))
    if device == "cuda" and has_triton():
        from sparse_adv.engine.kernels_cuda import CudaKernels

        casts = torch.is_autocast_enabled("cuda") and x.dtype != torch.float64
        return CudaKernels(torch.get_autocast_dtype("cuda") if casts else x.dtype)
    raise NotTraceable("autocast is enabled on the CPU" if device == "cpu" else f"there are no kernels for {device}")


def padded_batch(count: int) -> int:
    """The batch size that a batch of this size is padded to: the next of 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, ...

    An evaluation attacks only the images that are still classified correctly, so the size changes from batch to batch.
    These sizes need few programs, and at most a quarter more computation.

    Examples:
        >>> [padded_batch(count) for count in (7, 8, 9, 33, 100, 128)]
        [7, 8, 10, 40, 112, 128]
    """
    step = 1 << max(0, (count - 1).bit_length() - 3)
    return -(-count // step) * step


def _padded(tensor: Tensor, count: int) -> Tensor:
    """The tensor with rows of zeros behind it, `count` rows in all."""
    if len(tensor) == count:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(count - len(tensor), *tensor.shape[1:])])
