"""Decides what computes the gradients of a model's input: the engine, or autograd where the engine cannot."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.engine.comparison import Undecided, check_finite, comparing, double_copy, quadratic_loss, without_ties
from sparse_adv.engine.gradients import Autograd, outside_inference
from sparse_adv.engine.model_state import unwrapped
from sparse_adv.engine.program import Program, padded_batch
from sparse_adv.engine.random_state import KeptGenerators
from sparse_adv.engine.state_cache import StateCache
from sparse_adv.engine.steps import ConvolutionStep, Step
from sparse_adv.engine.trace_cache import TraceCache, state_of
from sparse_adv.engine.traced_code import NotTraceable
from sparse_adv.engine.training import graph_for_training
from sparse_adv.errors import first_line
from sparse_adv.masks.layers import as_input
from sparse_adv.nn import frozen_weights
from sparse_adv.nn.masked_layer import masked_layers
from sparse_adv.ops import cuda_graph

log = logging.getLogger(__name__)

_CHECKED_IMAGES = 2
_TOLERANCE = 1e-4
"""Greatest relative error of a gradient. In float64, rounding hardly ever changes the sign of a ReLU's input."""


InputGradients = Program | Autograd
"""Computes the gradients of a model's input."""


@dataclass
class _Entry:
    """A program, or why there is none."""

    program: Program | None = None
    reason: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the program's buffers are in use."""


_CAPACITY = 8
"""An attack drops finished images by halving its batch: from 128 images down to 1 it needs 8 programs, which together
take twice the memory of the first."""
_entries: TraceCache[_Entry] = TraceCache(_CAPACITY)
"""Programs of each model, for different shapes of input."""
_verdicts: StateCache[str] = StateCache(_CAPACITY)
"""Why the steps of a model cannot be used, or nothing: found once for all numbers of images."""
_warned_of: WeakSet[nn.Module] = WeakSet()
"""Models with masks that are left to autograd."""


@checks_types
@contextmanager
@torch.inference_mode(False)  # the code inside the context keeps its own mode
def input_gradients(model: nn.Module, x: Tensor, use_engine: bool = True) -> Iterator[InputGradients]:
    """A context that gives logits and input gradients of a model, whose weights must not change meanwhile.

    When a model is first seen in this state with an input of this shape, its program is made, and the program's
    gradient is compared with autograd's on a few images. If they differ, or the model cannot be turned into a program,
    autograd computes the gradients, now and later, and a log message says why.

    Args:
        model: any module, in the modes (training or eval) in which it is to run.
        x: float tensor [N, ...], a batch of its input, on any device.
        use_engine: False to let autograd compute the gradients.

    Returns:
        A context manager whose value has two methods: `logits(x)` returns the model's output, and
        `gradient(x, loss)` the gradient of the sum of loss(logits) with respect to x, with the shape of x.

    Raises:
        Exception: the two methods raise whatever the model itself raises. It is no error if the engine cannot run the
            model.

    Examples:
        >>> import torch
        >>> from sparse_adv import engine, models
        >>> model = models.build("digits_cnn", width=8).eval()
        >>> x = torch.rand(2, 1, 8, 8)
        >>> with engine.input_gradients(model, x) as gradients:
        ...     logits, gradient = gradients.logits(x), gradients.gradient(x, lambda logits: logits[:, 0])
        >>> logits.shape, gradient.shape
        (torch.Size([2, 10]), torch.Size([2, 1, 8, 8]))
    """
    entry = _entry_of(model, x) if use_engine else _Entry()
    # A second thread that attacks the same model at the same time works without the buffers.
    if entry.program is not None and entry.lock.acquire(blocking=False):
        try:
            cuda_graph.keep(entry.program)  # a graph of what follows uses the program's memory
            entry.program.fold()
            with frozen_weights(entry.program.unfused):
                yield entry.program
        finally:
            entry.program.forget_graphs()  # no one else can use their memory, and the next user folds anew
            entry.lock.release()
    else:
        with frozen_weights(model):
            yield Autograd(model)


@checks_types
@torch.inference_mode(False)
def explain(model: nn.Module, example_input: Sequence[int] | Tensor) -> list[str]:
    """Say what each step of the engine computes for this model and input, or why the model is left to autograd.

    For a model in training mode, also say what `fuse_for_training` fuses.

    Args:
        model: any module, in the modes in which it is to run. For DistributedDataParallel, AveragedModel and
            DataParallel on one device, the module inside is explained, because attacks call that one.
        example_input: a batch of its input, or the shape [N, C, H, W] of one.

    Returns:
        One line for each step, or one line with the reason why autograd computes the gradients. The line of a
        convolution ends with its kernel: sparse, dense (oneDNN or cuDNN on the masked weight), Winograd or sparse
        Winograd. If the backward pass has another kernel, both are named: "dense, backward sparse".

    Raises:
        ValueError: if `example_input` is neither a tensor nor 4 positive integers. If the engine cannot run the model,
            nothing is raised: the reason is returned.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_adv import engine
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).eval()
        >>> for line in engine.explain(model, (1, 3, 8, 8)):
        ...     print(line)
        _0: convolution + BatchNorm + ReLU [dense]
        _3: PyTorch and autograd: _3
    """
    model = unwrapped(model)  # as attacks do
    x = as_input(model, example_input)
    entry = _entry_of(model, x)
    if entry.program is None:
        return [f"autograd: {entry.reason}", *_explain_training(model, x)]
    if entry.lock.acquire(blocking=False):  # else another thread uses it, so it is folded
        try:
            entry.program.fold()  # chooses the kernels for the present masks
        finally:
            entry.lock.release()
    return [_line_of(step) for step in entry.program.steps]


def _line_of(step: Step) -> str:
    line = f"{step.name}: {step.describe()}"
    return f"{line} [{step.kernel_names()}]" if isinstance(step, ConvolutionStep) else line


def _explain_training(model: nn.Module, x: Tensor) -> list[str]:
    if not any(module.training for module in model.modules()):
        return []
    graph = graph_for_training(model, x)
    return [f"training is not fused: {graph}"] if isinstance(graph, str) else graph.fused


def _entry_of(model: nn.Module, x: Tensor) -> _Entry:
    def make() -> _Entry:
        entry = _make(model, x)
        if entry.reason:
            _log_reason(model, entry.reason)
        return entry

    entry = _entries.find(model, x, (padded_batch(len(x)), *x.shape[1:]), make)
    return _Entry(reason=entry) if isinstance(entry, str) else entry


def _log_reason(model: nn.Module, reason: str) -> None:
    """Log why a model is left to autograd. If it has masks, which should make it fast, warn, but only once."""
    in_training = any(module.training for module in model.modules())  # as the caller asked
    is_warning = bool(masked_layers(model)) and not in_training and model not in _warned_of
    if is_warning:
        _warned_of.add(model)
    level = logging.WARNING if is_warning else logging.INFO
    log.log(level, "the engine leaves this %s to autograd: %s", type(model).__name__, reason)


def _make(model: nn.Module, x: Tensor) -> _Entry:
    if not x.is_floating_point() or not len(x):
        return _Entry(reason="its input is empty or not floating point")
    if any(module.training for module in model.modules()):
        return _Entry(reason="a part of it is in training mode")
    x = outside_inference(x)
    # A model may draw random numbers: this trial must not change the numbers that later code draws.
    with KeptGenerators(x.device):
        try:
            program = Program(model, x)  # first, so that the trace reads the model's own modules
            compared = x[:_CHECKED_IMAGES]
            if reason := _verdicts.find(
                model, lambda: state_of(model, compared, compared.shape), lambda: _verdict(model, compared)
            ):
                return _Entry(reason=reason)
            _try(program, model, x)
            return _Entry(program)
        except NotTraceable as error:
            return _Entry(reason=str(error))
        except (Undecided, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a layer is used in a way that no step expects; the model itself may run
            return _Entry(reason=f"a step of it fails: {first_line(error)}")


def _verdict(model: nn.Module, x: Tensor) -> str:
    try:
        _check(model, x)
    except NotTraceable as error:
        return str(error)
    return ""


def _check(model: nn.Module, x: Tensor) -> None:
    """Raise NotTraceable if the steps of a model do not give autograd's gradient of a function of the logits."""
    with comparing(x.device):
        copied, x = double_copy(model), without_ties(x)
        program = Program(copied, x, len(x) + 1)  # padded: this shows whether images depend on each other
        program.fold()
        for images in {len(x), 1}:  # operations may compute a single image in another way
            actual, expected = (form.gradient(x[:images], quadratic_loss) for form in (program, Autograd(copied)))
            check_finite([expected])
            difference = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
            if not difference <= _TOLERANCE:
                raise NotTraceable(f"its gradient would differ from autograd's by {difference:.2g}")


def _try(program: Program, model: nn.Module, x: Tensor) -> None:
    """Raise NotTraceable if a kernel refuses its operands, or the logits are of another dtype than the model's.

    The comparison of the gradients, in float64, shows neither.
    """
    try:
        program.fold()
        program.gradient(x, torch.sum)
        dtypes = [form.logits(x[:1]).dtype for form in (program, Autograd(model))]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotTraceable(f"a step of it fails: {first_line(error)}") from error
    if dtypes[0] != dtypes[1]:
        raise NotTraceable(f"its logits are {dtypes[1]}, those of the steps {dtypes[0]}")
