"""Patterns as lists of tensors, tampered with, in every op that takes one: refused, or computed without a crash."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from fuzz.case import REFUSALS, Wrong, check_refusal
from fuzz.convolution_makers import convolution
from fuzz.wrong_values import spoil
from sparse_adv.ops import pack_pattern

_NAMES = ("pattern", "weight", "input", "grad_output", "tensors")
_NUMBERS = (-(2**63), -(2**31), -4097, -1, 0, 1, 2, 3, 4, 64, 4095, 4096, 2**20, 2**31 - 1, 2**31, 2**62, 2**63 - 1)


def case(rng: random.Random, folder: Path) -> str:
    """Tamper with one to three places of a pattern and run all passes with it."""
    convolution_case, to, pattern = convolution(rng)
    weight = to(convolution_case.weight.where(convolution_case.mask, 0))
    if rng.random() < 0.5:
        pattern = pack_pattern(pattern, weight)
    tensors = [tensor.clone() for tensor in pattern.flatten()]
    changes = [_tamper(rng, tensors) for _ in range(rng.choice((1, 1, 2, 3)))]
    input, grad = to(convolution_case.input), to(convolution_case.grad_output)
    shape, ops = convolution_case.shape, torch.ops.sparse_adv
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: ops.masked_conv2d(input, weight, tensors, None, *shape, None, None, False),
        "grad_input": lambda: ops.masked_conv2d_grad_input(grad, weight, tensors, convolution_case.input_size, *shape),
        "grad_weight": lambda: ops.masked_conv2d_grad_weight(grad, input, tensors, *shape),
        "plan": lambda: ops.masked_conv2d_plan(input, tensors, *shape[:3]),
        "pack": lambda: ops.pack_values(weight, tensors),
    }
    refused = 0
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            refused += 1
            try:
                check_refusal(error, REFUSALS, _NAMES)
            except Wrong as wrong:
                raise Wrong(f"{name} of {convolution_case}, {'; '.join(changes)}: {wrong}") from error
    return f"{'refused' if refused else 'accepted'} by {refused} of {len(calls)} passes"


def _tamper(rng: random.Random, tensors: list[Tensor]) -> str:
    """Change the list, and say how."""
    if not tensors:
        return "nothing left"
    place, kind = rng.randrange(len(tensors)), rng.random()
    tensor = tensors[place]
    if kind < 0.65 and tensor.numel() and tensor.is_contiguous():
        element = rng.randrange(tensor.numel())
        number = rng.choice((*_NUMBERS, _near(tensor.flatten()[element], rng)))
        if not tensor.is_floating_point():
            bits = torch.iinfo(tensor.dtype).bits if tensor.dtype != torch.bool else 1
            number = (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) if bits > 1 else number & 1
        tensor.detach().view(-1)[element] = number
        return f"element {element} of tensor {place} is {number}"
    if kind < 0.8:
        changed = spoil(rng, tensor)
        if _is_plain(changed):
            tensors[place] = changed
        return f"tensor {place} replaced"
    if kind < 0.87:
        del tensors[place]
        return f"tensor {place} left out"
    if kind < 0.94:
        other = rng.randrange(len(tensors))
        tensors[place], tensors[other] = tensors[other], tensors[place]
        return f"tensors {place} and {other} exchanged"
    tensors.insert(place, tensor)
    return f"tensor {place} twice"


def _near(element: Tensor, rng: random.Random) -> int:
    return (int(element) if element.float().isfinite() else 0) + rng.choice((-1, 1))


def _is_plain(value: object) -> TypeGuard[Tensor]:
    """PyTorch itself refuses others: the list of tensors is no public argument."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return plain and not value.is_neg() and not value.is_complex()
