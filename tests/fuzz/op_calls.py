"""Calls of every op: legal ones of all shapes, dtypes and layouts, and the same with wrong arguments put in."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from helpers.tolerances import assert_close
from torch import Tensor

from fuzz.call import Call
from fuzz.case import REFUSALS, Wrong, check_refusal
from fuzz.op_makers import MAKERS
from fuzz.wrong_values import spoil

_WORDS_OF_THE_KERNELS = ("images", "window", "filter", "tensors", "pattern")
"""By which the native ops call arguments that they share."""


def case(rng: random.Random, folder: Path) -> str:
    """Call one op, half of the time with one or two arguments replaced."""
    name = rng.choice(sorted(MAKERS))
    call = MAKERS[name](rng)
    legal = rng.random() < 0.5
    arguments = dict(call.arguments)
    if not legal:
        for argument in rng.sample(sorted(arguments), min(len(arguments), rng.choice((1, 1, 2)))):
            arguments[argument] = spoil(rng, arguments[argument])
    before = copied(arguments)
    shown = ", ".join(f"{key}={shown_value(value)}" for key, value in arguments.items())
    try:
        returned = call.function(**arguments)
    except Exception as error:
        try:
            if legal:
                raise Wrong(f"a legal call raised {type(error).__name__}: {str(error)[:300]}") from error
            check_refusal(error, REFUSALS, [*arguments, *_WORDS_OF_THE_KERNELS])
            _check_unchanged(before, arguments)
        except Wrong as wrong:
            raise Wrong(f"{name}({shown}): {wrong}") from error
        return f"{name}: refused"
    try:
        _check_value(call, before, arguments, returned)
    except Exception as error:
        raise Wrong(f"{name}({shown}): {type(error).__name__}: {str(error)[:500]}") from error
    return f"{name}: right value"


def copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with tensors copied; tensors that were one stay one."""
    known: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in known:
            known[id(value)] = value.detach().clone() if value.layout == torch.strided else value.detach()
        return known[id(value)]

    return {name: copy(value) for name, value in arguments.items()}


def shown_value(value: object) -> str:
    if isinstance(value, Tensor):
        strides = list(value.stride()) if value.layout == torch.strided else value.layout
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}@{strides}"
    return f"{value!r:.60}"


def _check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name, value in after.items():
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            try:
                torch.testing.assert_close(value.detach(), before[name], rtol=0, atol=0, equal_nan=True)
            except AssertionError as error:
                raise Wrong(f"a call that raised has changed {name}") from error


def _check_value(call: Call, before: dict[str, Any], after: dict[str, Any], returned: Any) -> None:
    results: Callable[..., Mapping[str, Any]] = call.results
    for name, (actual, expected) in results(before, after, returned).items():
        if not isinstance(expected, Tensor):
            if actual != expected:
                raise Wrong(f"{name} is {actual!r}, expected {expected!r}")
        elif not expected.is_floating_point():
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert_close(actual.detach(), expected.detach(), call.tolerance)
