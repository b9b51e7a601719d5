"""`tune`: measure, once, which kernel each pass of each masked layer should take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_adv.masks.layers import run_once, unknown_module
from sparse_adv.nn.masked_conv2d import PASSES, MaskedConv2d
from sparse_adv.ops import Pattern, chosen_paths, masked_conv2d, pack_pattern, set_kernels
from sparse_adv.ops.masked_conv2d_pattern import BlockPattern

Choices = dict[str, dict[str, Any]]

_HYSTERESIS = 0.95
"""Of the table's time: another choice must be faster than this, or noise would decide between equals."""


def tune(
    model: nn.Module,
    shape: Sequence[int] | Tensor,
    choices: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    trials: int = 5,
    seconds: float = 0.5,
) -> Choices:
    """Time the sparse and the dense kernel of each pass of each masked layer, and fix the faster one.

    Without it, a static table chooses. A choice stays with its layer until the layer gets another mask or device, goes
    through `deepcopy` and `pickle`, and is no part of the `state_dict`. Under
    `torch.use_deterministic_algorithms(True)` nothing measured counts. A choice have float32 layers on the CPU, and on
    CUDA layers with blocks of 32 or 64 channels: these are timed in the dtype of the autocast that surrounds the call,
    under CUDA graphs.

    Args:
        model: a model with masked layers; it runs one forward pass, in eval mode.
        shape: shape [N, C, H, W] of its input, or a sample of it.
        choices: what an earlier call returned: applied without measuring anything.
        trials: how often each kernel is timed at most, taking turns; the shortest time counts.
        seconds: when to stop timing one pass of one layer, after two trials at least.

    Returns:
        Plain data, keyed by module name, then by pass ("forward", "grad_input", "grad_weight"): the "path" chosen and
        the milliseconds "sparse_ms" and "dense_ms".

    Raises:
        ValueError: if `choices` name a module or a path that does not exist.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MaskedConv2d)}
    found: Choices = {}
    if choices is None:
        names = {layer: name for name, layer in layers.items()}

        def visit(layer: nn.Conv2d, input: Tensor, output: Tensor) -> None:
            if isinstance(layer, MaskedConv2d) and _has_choice(layer, input) and names[layer] not in found:
                found[names[layer]] = _measure(layer, input, output, trials, seconds)

        run_once(model, shape, visit)
    else:
        found = {name: dict(choice) for name, choice in choices.items()}
        for name, choice in found.items():
            _check_choice(name, choice, layers)
    for name, choice in found.items():
        layers[name].choose_paths(choice)
    return found


def _has_choice(layer: MaskedConv2d, input: Tensor) -> bool:
    if input.dim() != 4:
        return False
    if input.device.type == "cuda":
        return isinstance(layer.pattern, BlockPattern)
    return input.device.type == "cpu" and input.dtype == torch.float32


def _check_choice(name: str, choice: Mapping[str, Any], layers: Mapping[str, nn.Module]) -> None:
    if name not in layers:
        raise ValueError(f"choices: {unknown_module(name, layers)}")
    for pass_ in PASSES:
        path = choice.get(pass_, {}).get("path")
        if path not in ("sparse", "dense"):
            raise ValueError(f'choices of {name!r}: path of {pass_} must be "sparse" or "dense", got {path!r}')


def _measure(layer: MaskedConv2d, input: Tensor, output: Tensor, trials: int, seconds: float) -> dict[str, Any]:
    x, padding = layer.padded(input)
    plain, weight, grad = set_kernels(layer.pattern), layer.weight.detach(), torch.ones_like(output)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, grad = (tensor.to(dtype) for tensor in (x, weight, grad))
    if x.device.type == "cuda":
        plain = pack_pattern(plain, weight)  # as an attack's passes find it
    by_table = chosen_paths(plain, x.shape, layer.stride, padding, layer.dilation)
    choice = {}
    for name, run in _passes(layer, x, weight, padding, grad).items():
        patterns = {path: set_kernels(plain, **{name: path}) for path in ("sparse", "dense")}
        times = _race(run, patterns, trials, seconds)
        table = by_table[name]
        other = "dense" if table == "sparse" else "sparse"
        path = other if times[other] < _HYSTERESIS * times[table] else table
        choice[name] = {"path": path} | {f"{key}_ms": round(1e3 * value, 4) for key, value in times.items()}
    return choice


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
    """The shortest time of each, taking turns so that a slow moment of the machine strikes both."""
    best = dict.fromkeys(patterns, float("inf"))
    end = time.perf_counter() + seconds
    clocks = {path: _clock(partial(run, pattern), pattern.mask.device) for path, pattern in patterns.items()}
    for trial in range(max(2, trials)):
        for path, clock in clocks.items():
            best[path] = min(best[path], clock())
        if trial >= 1 and time.perf_counter() > end:
            break
    return best


def _clock(run: Callable[[], Tensor], device: torch.device) -> Callable[[], float]:
    """What runs it once and returns the seconds; on CUDA those of the GPU alone, by replays of a graph."""
    if device.type == "cuda":
        return _graph_clock(run)

    def clock() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return clock


def _graph_clock(run: Callable[[], Tensor], calls: int = 10) -> Callable[[], float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    return clock
