"""`tune`: measure once which kernel is faster for each pass of each masked convolution."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import checks_types
from sparse_adv.masks.layers import check_whole, naming, run_once, unknown_module
from sparse_adv.nn.masked_conv2d import Choice, LayerChoices, MaskedConv2d
from sparse_adv.ops import PASSES, Pattern, masked_conv2d, plan, set_kernels
from sparse_adv.ops.cuda_graph import Capturer
from sparse_adv.ops.cudnn_benchmark import fastest_convolutions
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast
from sparse_adv.ops.masked_conv2d_pattern import pack_checked
from sparse_adv.ops.masked_conv2d_plan import missing_kernel

Choices = dict[str, LayerChoices]
"""The choices for each masked convolution, by its module name."""

_HYSTERESIS = 0.95
"""Another kernel replaces the table's choice only if it takes less than this share of its time: differences within 5 %
are mostly noise."""


@checks_types
def tune(
    model: nn.Module,
    example_input: Sequence[int] | Tensor,
    choices: Mapping[str, LayerChoices] | None = None,
    *,
    trials: int = 5,
    seconds: float = 0.5,
) -> Choices:
    """Time the sparse and the dense kernel of each pass of each masked convolution, and fix the faster one.

    Without it, a cost model fitted to measurements (on CUDA, a roofline) chooses. A choice is valid until the layer
    gets another mask or device; `deepcopy` and `pickle` copy it, and the `state_dict` does not contain it. Under
    `torch.use_deterministic_algorithms(True)` choices are ignored. They have no effect where an attack uses Winograd's
    filtering; `engine.explain` shows where. Layers with a sparse kernel are timed: layers in float32 on the CPU, and
    layers with blocks of 32 or 64 channels on CUDA. On CUDA they are timed as CUDA graphs, in the dtype of the autocast
    around the call.

    Args:
        model: a model with masked layers; it runs one forward pass, in eval mode.
        example_input: a batch of its input, or the shape [N, C, H, W] of one.
        choices: what an earlier call returned; it is applied and nothing is measured.
        trials: greatest number of times that each kernel is timed; the shortest time counts.
        seconds: time limit for one pass of one layer, checked from the second trial on.

    Returns:
        Plain data, by module name, then by pass ("forward", "grad_input", "grad_weight"): the "kernel" chosen, and the
        milliseconds "sparse_ms" and "dense_ms".

    Raises:
        ValueError: if `choices` name a module or a kernel that does not exist.

    Examples:
        >>> from sparse_adv.nn import explain, sparsify
        >>> model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3)), {"0": torch.rand(8, 3, 3, 3) < 0.1})
        >>> choice = {"kernel": "dense"}
        >>> _ = tune(model, (1, 3, 8, 8), {"0": {"forward": choice, "grad_input": choice, "grad_weight": choice}})
        >>> explain(model).rows[0].kernels["forward"]
        'dense (given)'
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedConv2d)}
    applied: Choices = {}
    if choices is None:
        names = {layer: name for name, layer in layers.items()}
        for name, layer in layers.items():
            with naming(name):
                check_whole(layer)

        def visit(layer: nn.Conv2d, input: Tensor, output: Tensor) -> None:
            if isinstance(layer, MaskedConv2d) and _has_choice(layer, input) and names[layer] not in applied:
                applied[names[layer]] = _measure(layer, input, output, trials, seconds)

        run_once(model, example_input, visit)
    else:
        for name, choice in choices.items():
            _check_choice(name, choice, layers)
        applied = {name: dict(choice) for name, choice in choices.items()}
    for name, choice in applied.items():
        layers[name].choose_kernels(choice)
    return applied


def _has_choice(layer: MaskedConv2d, input: Tensor) -> bool:
    return input.dim() == 4 and not missing_kernel(layer.pattern, dtype_under_autocast(input), input.device.type)


def _check_choice(name: str, choices: LayerChoices, layers: Mapping[str, nn.Module]) -> None:
    if name not in layers:
        raise ValueError(f"choices: {unknown_module(name, layers)}")
    for pass_ in PASSES:
        choice: object = choices.get(pass_) if isinstance(choices, Mapping) else None
        kernel = choice.get("kernel") if isinstance(choice, Mapping) else None
        if kernel not in ("sparse", "dense"):
            raise ValueError(f'choices of {name!r}: kernel of {pass_} must be "sparse" or "dense", got {kernel!r}')


def _measure(layer: MaskedConv2d, input: Tensor, output: Tensor, trials: int, seconds: float) -> LayerChoices:
    x, padding = layer.padded(input)
    operands = x, layer.weight.detach(), torch.ones_like(output)
    x, weight, grad = (tensor.to(dtype_under_autocast(tensor)) for tensor in operands)
    plain = set_kernels(layer.pattern)
    if x.device.type == "cuda":
        plain = pack_checked(plain, weight)  # as in the passes of an attack
    by_table = plan(plain, x, layer.stride, padding, layer.dilation)
    choices: LayerChoices = {}
    for name, run in _passes(layer, x, weight, padding, grad).items():
        patterns = {kernel: set_kernels(plain, **{name: kernel}) for kernel in ("sparse", "dense")}
        # PyTorch keeps the cuDNN algorithm that it used first for a shape.
        with fastest_convolutions(x.device):
            times = _race(run, patterns, trials, seconds)
        table = getattr(by_table, name).kernel
        other = "dense" if table == "sparse" else "sparse"
        choices[name] = Choice(
            kernel=other if times[other] < _HYSTERESIS * times[table] else table,
            sparse_ms=round(1e3 * times["sparse"], 4),
            dense_ms=round(1e3 * times["dense"], 4),
        )
    return choices


def _passes(
    layer: MaskedConv2d, x: Tensor, weight: Tensor, padding: tuple[int, int], grad: Tensor
) -> dict[str, Callable[[Pattern], Tensor]]:
    ops, bias = torch.ops.sparse_adv, layer.bias
    geometry = (layer.stride, padding, layer.dilation, layer.groups)
    return {
        "forward": lambda pattern: masked_conv2d(x, weight, pattern, bias, *geometry),
        "grad_input": lambda pattern: ops.masked_conv2d_grad_input(grad, weight, pattern.flatten(), x.shape, *geometry),
        "grad_weight": lambda pattern: ops.masked_conv2d_grad_weight(grad, x, pattern.flatten(), *geometry),
    }


def _race(
    run: Callable[[Pattern], Tensor], patterns: Mapping[str, Pattern], trials: int, seconds: float
) -> dict[str, float]:
    """The shortest time of each kernel. They are timed in turns, so that other load on the machine affects both."""
    best = dict.fromkeys(patterns, float("inf"))
    end = time.perf_counter() + seconds
    clocks = {kernel: _clock(partial(run, pattern), pattern.mask.device) for kernel, pattern in patterns.items()}
    for trial in range(max(2, trials)):
        for kernel, clock in clocks.items():
            best[kernel] = min(best[kernel], clock())
        if trial >= 1 and time.perf_counter() > end:
            break
    return best


def _clock(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """A function that runs `run` once and returns the seconds; on CUDA those of the GPU, by replays of a graph."""
    if device.type == "cuda":
        return _graph_clock(run, device)

    def clock() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return clock


def _graph_clock(run: Callable[[], Tensor], device: torch.device, calls: int = 10) -> Callable[[], float]:
    capturer = Capturer(device)
    capturer.run(run)

    def repeat() -> None:  # results are freed at once, so the memory of one call is enough
        for _ in range(calls):
            run()

    replay = capturer.capture(repeat)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock() -> float:
        stream = torch.cuda.current_stream(device)  # this device may not be the current one
        begin.record(stream)
        replay()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return clock
