"""`doctor`: prints versions and hardware, and checks every op on every device here against plain PyTorch on the CPU."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparse_adv
from sparse_adv import ops
from sparse_adv.facts import machine
from sparse_adv.ops import reference
from sparse_adv.ops.masked_conv2d_mask import expand_blocks

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = {CPU: 1e-5, CUDA: 1e-4}
"""Largest accepted relative error. Sums of some hundred float32 products differ by less than 1e-5 when they are added
in another order. On CUDA, cuDNN chooses the algorithm; those that transform images (Winograd, FFT) lose more bits.
"""


def run() -> int:
    """Print versions and hardware, and check every op; returns 0 if all checks pass, else 1."""
    for name, value in facts().items():
        print(f"{name:<16}{value}")
    failures = []
    for name, device, check in checks():
        begin = time.perf_counter()
        try:
            error = check()
        except Exception as reason:  # any error means that the check failed
            verdict = f"FAILED: {type(reason).__name__}: {reason}"
        else:
            verdict = "ok" if error <= TOLERANCE[device] else f"FAILED: differs from the reference by {error:.2g}"
        print(f"{name:<40}{1e3 * (time.perf_counter() - begin):8.1f} ms  {verdict}")
        if verdict != "ok":
            failures.append(name)
    print("SUCCESS" if not failures else f"FAILURE: {', '.join(failures)}")
    return 1 if failures else 0


def checks() -> list[tuple[str, torch.device, Callable[[], float]]]:
    """Name, device and function of each check: all checks on the CPU and, if there is a GPU, `CHECKS` on it."""
    found = [(name, CPU, check) for name, check in CPU_CHECKS.items()]
    found += [(name, CPU, partial(check, CPU)) for name, check in CHECKS.items()]
    if torch.cuda.is_available():
        found += [(f"{name} on cuda", CUDA, partial(check, CUDA)) for name, check in CHECKS.items()]
    return found


def facts() -> dict[str, str]:
    """Versions, instruction set, threads, and the ops that are available."""
    built, here = ops.build_facts(), machine()
    return {
        "sparse_adv": f"{sparse_adv.__version__} (built with {built['compiler']})",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "processor": here.cpu,
        "instruction set": here.instruction_set,
        "threads": f"{here.threads} of {here.cores} cores",
        "ops": ", ".join(op for op in OPS if hasattr(torch.ops.sparse_adv, op)),
        "CUDA": f"{here.gpu} (torch built for {torch.version.cuda})" if here.gpu else "no",
        "ops on CUDA": ops.cuda_ops(),
    }


def _gradients(out: Tensor, leaves: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """The same as `torch.autograd.grad(out, leaves, grad)`. That call would first import SymPy, and the 1.8 s would
    count as the op's time."""
    return torch.autograd.grad((out * grad).sum(), leaves)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """On CUDA, convolve in full float32, in PyTorch and in the Triton kernels, which follow PyTorch's setting."""
    setting = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


@_without_tf32()
def _masked_conv2d(block: tuple[int, int], kernel: str, device: torch.device) -> float:
    """Forward with scale, bias, residual and ReLU, and all gradients, with one kernel, packed and not."""
    noise = torch.Generator().manual_seed(0)
    x, residual = torch.rand(2, 2, 64, 7, 9, generator=noise)
    weight, (bias, scale) = torch.randn(64, 64, 3, 3, generator=noise), torch.randn(2, 64, generator=noise)
    grid = torch.rand(64 // block[0], 64 // block[1], 3, 3, generator=noise) < 0.3
    mask = expand_blocks(grid, block, weight.shape)
    pattern = ops.set_kernels(ops.compile_pattern(mask.to(device), block), kernel, kernel, kernel)
    for name, planned in ops.plan(pattern, x.to(device), padding=1)._asdict().items():  # a request is no promise
        if planned.kernel != kernel:
            raise RuntimeError(f"{name} takes the {planned.kernel} kernel: {planned.reason}")
    kept = weight.where(mask, 0)
    packed = ops.pack_pattern(pattern, kept.to(device))

    def results(
        op: Callable[..., Tensor], weight: Tensor, mask: Tensor | ops.Pattern, device: torch.device
    ) -> list[Tensor]:
        leaves = _leaves((x, weight, bias, scale, residual), device)
        y = op(leaves[0], leaves[1], mask, leaves[2], 1, 1, scale=leaves[3], residual=leaves[4], relu=True)
        return [y.detach(), *torch.autograd.grad(y.square().mean(), leaves)]

    expected = results(reference.masked_conv2d, weight, mask, CPU)
    actual = [results(ops.masked_conv2d, *operands, device) for operands in ((weight, pattern), (kept, packed))]
    return max(_difference(tensors, expected) for tensors in actual)


def _masked_conv2d_out(kernel: str) -> float:
    """Forward with residual, ReLU and gate, and the gradient of the input with residual and that gate."""
    noise = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 2, 16, 7, 9, generator=noise)
    weight, mask = torch.randn(16, 16, 3, 3, generator=noise), torch.rand(16, 16, 3, 3, generator=noise) < 0.3
    pattern = ops.set_kernels(ops.compile_pattern(mask), kernel, kernel, kernel)
    if kernel == "sparse":
        weight = weight * mask
        pattern = ops.pack_pattern(pattern, weight)
    y, grad_input = torch.empty_like(x), torch.empty_like(x)
    gate = ops.empty_gate(y)
    ops.masked_conv2d_out(x, weight, pattern, None, 1, 1, residual=residual, relu=True, out=y, gate_out=gate)
    ops.masked_conv2d_grad_input_out(y, weight, pattern, 1, 1, residual=x, gate=gate, out=grad_input)
    expected = reference.masked_conv2d(x, weight, mask, None, 1, 1, residual=residual, relu=True)
    gated = reference.masked_conv2d_grad_input(y, weight, mask, x.shape, 1, 1, residual=x, gate=y > 0)
    return _difference([y, grad_input], [expected, gated])


def _pointwise(device: torch.device) -> float:
    """Scale, bias, residual and ReLU with its gate, and a backward pass through that gate."""
    noise = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 8, 5, 7, generator=noise).to(memory_format=torch.channels_last) for _ in range(2))
    scale, bias = torch.randn(2, 8, generator=noise)
    expected = reference.pointwise(x, scale, bias, residual, relu=True)
    expected_grad = reference.pointwise(x, residual=residual, gate=expected > 0)
    x, residual, scale, bias = (tensor.to(device) for tensor in (x, residual, scale, bias))
    gate = ops.empty_gate(x)
    if device.type == "cuda":  # there it is a kernel of the engine, not an op
        from sparse_adv.kernels.pointwise import pointwise

        y = pointwise(x, scale, bias, residual, relu=True, gate_out=gate)
        grad = pointwise(x, residual=residual, gate=gate)
    else:
        y, grad = torch.empty_like(x), torch.empty_like(x)
        ops.pointwise_out(x, scale, bias, residual, relu=True, gate_out=gate, out=y)
        ops.pointwise_out(x, residual=residual, gate=gate, out=grad)
    return _difference([y, grad], [expected, expected_grad])


def _batch_norm_act(device: torch.device) -> float:
    """Forward and all gradients, with residual and ReLU."""
    noise = torch.Generator().manual_seed(0)
    images, vectors = torch.randn(2, 3, 4, 5, 7, generator=noise), torch.randn(2, 4, generator=noise)
    grad = torch.randn(3, 4, 5, 7, generator=noise)

    def results(function: Callable[..., Tensor], device: torch.device) -> list[Tensor]:
        leaves = _leaves((*images, *vectors), device)
        input, residual, weight, bias = leaves
        out = function(input, weight, bias, residual=residual, relu=True)
        return [out.detach(), *_gradients(out, leaves, grad.to(device))]

    return _difference(results(ops.batch_norm_act, device), results(reference.batch_norm_act, CPU))


def _max_pool2d(device: torch.device) -> float:
    """Forward, and the gradient of the input."""
    x = torch.randn(3, 4, 6, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = torch.nn.functional.max_pool2d(x, 2)
    (expected_grad,) = _gradients(expected, [x], expected.detach().sin())
    input = x.detach().to(device)
    out, grad_input = torch.empty(expected.shape, device=device), torch.empty_like(input)
    index = torch.empty_like(out, dtype=torch.uint8)
    ops.max_pool2d_out(input, (2, 2), out=out, index=index)
    ops.max_pool2d_grad_input_out(out.sin(), index, (2, 2), out=grad_input)
    return _difference([out, grad_input], [expected.detach(), expected_grad])


def _winograd_conv2d(tile: int) -> float:
    """Forward and the gradients of input, weight and bias, and the op with residual, ReLU and gate."""
    noise = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=noise) for size in ((2, 16, 7, 9), (16, 16, 3, 3), (16,)))

    def results(convolution: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = convolution(*leaves, padding=(1, 1))
        return [out.detach(), *_gradients(out, leaves, x)]

    expected = results(torch.nn.functional.conv2d)
    images = x.to(memory_format=torch.channels_last)
    y, grad, gate = torch.empty_like(images), torch.empty_like(images), ops.empty_gate(images)
    transformed = (ops.winograd_conv2d_weight(weight, tile=tile, transposed=transposed) for transposed in (False, True))
    ops.winograd_conv2d_out(images, next(transformed), bias=bias, residual=images, relu=True, out=y, gate_out=gate)
    ops.winograd_conv2d_out(images, next(transformed), gate=gate, out=grad)
    rectified = (expected[0] + x).relu()
    actual = [*results(partial(ops.winograd_conv2d, tile=tile)), y, grad]
    return _difference(actual, [*expected, rectified, expected[1].where(rectified > 0, 0)])


def _masked_winograd_conv2d(oc_block: int) -> float:
    """With residual, ReLU and gate, and the gradient of the input."""
    noise = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=noise) for size in ((2, 8, 7, 9), (8, 8, 3, 3), (8,)))
    kept = torch.rand((2, 2, 1, 1), generator=noise) < 0.7
    mask = kept.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(8, 8, 3, 3).contiguous()
    pattern = ops.compile_pattern(mask, (oc_block, oc_block, 3, 3))
    expected = [torch.nn.functional.conv2d(x, weight * mask, bias, padding=1).add(x).relu()]
    expected.append(torch.nn.functional.conv_transpose2d(x, weight * mask, padding=1).where(expected[0] > 0, 0))
    y, grad, gate = torch.empty_like(x), torch.empty_like(x), ops.empty_gate(x)
    forward, backward = (
        ops.masked_winograd_conv2d_weight(weight, pattern, transposed=transposed) for transposed in (False, True)
    )
    ops.masked_winograd_conv2d_out(x, forward, bias, residual=x, relu=True, out=y, gate_out=gate)
    ops.masked_winograd_conv2d_out(x, backward, gate=gate, out=grad)
    return _difference([y, grad], expected)


def _pgd_step(norm: str, device: torch.device) -> float:
    noise = torch.Generator().manual_seed(0)
    clean, adv = torch.rand(2, 3, 2, 5, 7, generator=noise)
    grad = torch.randn(3, 2, 5, 7, generator=noise)
    numbers: dict[str, Any] = {"alpha": 0.1, "eps": 0.3, "norm": norm}
    expected = reference.pgd_step(adv, grad, clean, **numbers)
    adv, grad, clean = (images.to(device) for images in (adv, grad, clean))
    actual = [ops.pgd_step(adv, grad, clean, **numbers), ops.pgd_step_(adv.clone(), grad, clean, **numbers)]
    return _difference(actual, [expected, expected])


def _pgd_step_normalized(device: torch.device) -> float:
    noise = torch.Generator().manual_seed(0)
    clean, adv, grad = torch.rand(3, 3, 2, 5, 7, generator=noise)
    tensors = (adv, grad - 0.5, clean, torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.5]))

    def results(op: Callable[..., tuple[Tensor, Tensor]], device: torch.device) -> list[Tensor]:
        return [y.float() for y in op(*(tensor.to(device) for tensor in tensors), alpha=0.1, eps=0.3)]

    return _difference(results(ops.pgd_step_normalized, device), results(reference.pgd_step_normalized, CPU))


def _random_start(norm: str, device: torch.device) -> float:
    clean = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    seed = torch.tensor([7, 0])
    actual = ops.random_start(clean.to(device), 0.3, norm=norm, seed=seed.to(device))
    return _difference([actual], [reference.random_start(clean, seed, 0.3, norm)])


def _leaves(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on this device that require gradients."""
    return [tensor.to(device, copy=True).requires_grad_() for tensor in tensors]


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor; infinite if a value is NaN."""
    errors = [(a.cpu() - b).abs().max() / b.abs().max() for a, b in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).nan_to_num(nan=float("inf")).max())


OPS = (
    "pack_values",
    "masked_conv2d",
    "masked_conv2d_grad_input",
    "masked_conv2d_grad_weight",
    "masked_conv2d_out",
    "masked_conv2d_grad_input_out",
    "masked_winograd_conv2d_weight",
    "masked_winograd_conv2d_out",
    "winograd_conv2d",
    "winograd_conv2d_grad_weight",
    "winograd_conv2d_weight",
    "winograd_conv2d_out",
    "pointwise_out",
    "max_pool2d_out",
    "max_pool2d_grad_input_out",
    "batch_norm_act",
    "batch_norm_act_grad",
    "pgd_step",
    "pgd_step_",
    "pgd_step_normalized",
    "random_start",
)
CPU_CHECKS: dict[str, Callable[[], float]] = {
    **{f"masked_conv2d_out {kernel}": partial(_masked_conv2d_out, kernel) for kernel in ("sparse", "dense")},
    **{f"masked_winograd_conv2d {block}": partial(_masked_winograd_conv2d, block) for block in (1, 4)},
    **{f"winograd_conv2d tile {tile}": partial(_winograd_conv2d, tile) for tile in (2, 4)},
    **{f"masked_conv2d {block} sparse": partial(_masked_conv2d, block, "sparse", CPU) for block in ((1, 1), (4, 1))},
}
"""Checks of the ops that exist only on the CPU."""
CHECKS: dict[str, Callable[[torch.device], float]] = {
    "masked_conv2d (32, 32) sparse": partial(_masked_conv2d, (32, 32), "sparse"),
    "masked_conv2d (1, 1) dense": partial(_masked_conv2d, (1, 1), "dense"),
    "pointwise": _pointwise,
    "max_pool2d_out": _max_pool2d,
    "batch_norm_act": _batch_norm_act,
    **{f"pgd_step {norm}": partial(_pgd_step, norm) for norm in ("linf", "l2")},
    "pgd_step_normalized": _pgd_step_normalized,
    **{f"random_start {norm}": partial(_random_start, norm) for norm in ("linf", "l2")},
}
"""Checks on the CPU and on CUDA."""
