"""A legal call of every op, and what it must compute: the float64 reference of the arguments that were given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers.written_passes import random_gate
from torch import Tensor
from torch.nn.modules.utils import _pair

from fuzz.call import Arguments, Call, Results, all_wide, wide
from fuzz.convolution_makers import (
    compile_pattern,
    masked_conv2d,
    masked_conv2d_grad_input_out,
    masked_conv2d_out,
    masked_winograd_conv2d_out,
    masked_winograd_conv2d_weight,
    pack_pattern,
    plan,
    set_kernels,
    winograd_conv2d,
    winograd_conv2d_out,
    winograd_conv2d_weight,
)
from fuzz.random_operands import DTYPES, dense_layout, random_images, random_shape, some
from sparse_adv import ops
from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import reference
from sparse_adv.ops.random_start import as_philox_state


def _window(rng: random.Random, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    return rng.randint(1, min(4, shape[2])), rng.randint(1, min(4, shape[3]))


def max_pool2d_out(rng: random.Random) -> Call:
    shape, layout = random_shape(rng), dense_layout(rng)
    size = _window(rng, shape)
    input = random_images(rng, shape, rng.choice((torch.float32, torch.float64)), layout)
    out = in_layout_of(input, input.new_zeros(*shape[:2], shape[2] // size[0], shape[3] // size[1]))
    index = some(rng, lambda: torch.zeros_like(out, dtype=torch.uint8))

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        return {
            "out": (after["out"], _pooled(before["input"].double(), _pair(before["kernel_size"])).flatten(4).amax(4))
        }

    return Call(ops.max_pool2d_out, {"input": input, "kernel_size": size, "out": out, "index": index}, results)


def _pooled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The windows, [N, C, P, Q, rows, columns]."""
    return images.unfold(2, size[0], size[0]).unfold(3, size[1], size[1])


def max_pool2d_grad_input_out(rng: random.Random) -> Call:
    shape, layout, dtype = random_shape(rng), dense_layout(rng), rng.choice((torch.float32, torch.float64))
    size = _window(rng, shape)
    out = random_images(rng, shape, dtype, layout)
    grad = in_layout_of(out, random_images(rng, (*shape[:2], shape[2] // size[0], shape[3] // size[1]), dtype, layout))
    index = torch.randint_like(grad, size[0] * size[1]).to(torch.uint8)
    arguments = {
        **{"grad_output": grad, "index": index, "kernel_size": size},
        "residual": rng.choice((None, out, random_images(rng, shape, dtype, layout))),
        **{"gate": some(rng, lambda: random_gate(out)), "out": out},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        rows, cols = _pair(before["kernel_size"])
        expected = torch.zeros_like(before["out"], dtype=torch.float64, memory_format=torch.contiguous_format)
        chosen = F.one_hot(before["index"].long(), 256)[..., : rows * cols].unflatten(4, (rows, cols)).bool()
        _pooled(expected, (rows, cols)).copy_(before["grad_output"].double()[..., None, None].where(chosen, 0))
        gate, residual = before["gate"], wide(before["residual"])
        passes = None if gate is None else ops.gate_to_bool(gate, before["out"])
        return {"out": (after["out"], reference.pointwise(expected, residual=residual, gate=passes))}

    return Call(ops.max_pool2d_grad_input_out, arguments, results)


def batch_norm_act(rng: random.Random) -> Call:
    shape, dtype = random_shape(rng), rng.choice(DTYPES)
    while shape[0] * shape[2] * shape[3] < 2:
        shape = random_shape(rng)

    def vector() -> Tensor:
        return torch.rand(shape[1], dtype=torch.float64).add(0.5).to(dtype)

    arguments = {
        "input": random_images(rng, shape, dtype),
        **{name: some(rng, vector) for name in ("weight", "bias", "running_mean", "running_var")},
        "residual": some(rng, lambda: random_images(rng, shape, dtype)),
        **{"relu": rng.random() < 0.5, "momentum": rng.choice((0.0, 0.1, 1.0)), "eps": rng.choice((1e-5, 0.1))},
    }

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        operands, statistics = all_wide(before), ("running_mean", "running_var")
        given = [name for name in statistics if before[name] is not None]
        # PyTorch takes both or none.
        operands |= {name: torch.zeros(before["input"].shape[1]).double() for name in statistics if name not in given}
        compared = {"output": (returned, reference.batch_norm_act(**operands))}
        return compared | {name: (after[name], operands[name]) for name in given}

    return Call(ops.batch_norm_act, arguments, results, "reduction")


def pointwise_out(rng: random.Random) -> Call:
    shape, layout, dtype = random_shape(rng), dense_layout(rng), rng.choice(DTYPES)
    out, other = random_images(rng, shape, dtype, layout), random_images(rng, shape, dtype, layout)
    relu = rng.random() < 0.5
    arguments = {
        "input": rng.choice((out, other)),
        **{name: some(rng, lambda: torch.rand(shape[1]).to(dtype)) for name in ("scale", "bias")},
        "residual": rng.choice((None, out, other)),
        **{"relu": relu, "gate": None if relu else some(rng, lambda: random_gate(out)), "out": out},
        "gate_out": some(rng, lambda: random_gate(out)) if relu else None,
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        gate = before["gate"]
        passes = None if gate is None else ops.gate_to_bool(gate, before["out"])
        expected = reference.pointwise(**all_wide(before, "gate", "out", "gate_out"), gate=passes)
        compared = {"out": (after["out"], expected)}
        if after["gate_out"] is not None:
            written = after["out"]
            compared["gate_out"] = (ops.gate_to_bool(after["gate_out"], written), ~(written <= 0))
        return compared

    return Call(ops.pointwise_out, arguments, results)


def _step(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Arguments:
    return {
        "adv": random_images(rng, shape, dtype),
        "grad": random_images(rng, shape, rng.choice(DTYPES) if rng.random() < 0.3 else dtype),
        "clean": random_images(rng, shape, dtype),
        **{"alpha": rng.choice((0.0, -0.25, 0.1, 2 / 255)), "eps": rng.choice((0.0, 8 / 255, 0.5, math.inf))},
        **dict(
            zip(("lo", "hi"), rng.choice(((0.0, 1.0), (-1.0, 1.0), (-math.inf, math.inf), (0.5, 0.5))), strict=True)
        ),
    }


def _image_shape(rng: random.Random) -> tuple[int, ...]:
    return random_shape(rng)[: rng.randint(1, 4)] if rng.random() < 0.3 else random_shape(rng)


def _plain(arguments: Arguments) -> Arguments:
    """Numbers of all types as floats, as the ops take them."""
    numbers = {k: float(v) for k, v in arguments.items() if k in ("alpha", "eps", "lo", "hi")}
    return arguments | numbers


def _step_results(before: Arguments, after: Arguments, returned: Any) -> Results:
    if math.isinf(before["eps"]) and not before["clean"].isfinite().all():
        return {}  # the ball has the bound inf - inf
    return {"images": (returned, reference.pgd_step(**_plain(before)))}


def pgd_step(rng: random.Random) -> Call:
    arguments = _step(rng, _image_shape(rng), rng.choice(DTYPES)) | {"norm": rng.choice(("linf", "l2"))}
    return Call(ops.pgd_step, arguments, _step_results)


def pgd_step_(rng: random.Random) -> Call:
    return Call(ops.pgd_step_, pgd_step(rng).arguments, _step_results)


def pgd_step_normalized(rng: random.Random) -> Call:
    shape = random_shape(rng)
    arguments = _step(rng, shape, torch.float32)
    arguments |= {"mean": torch.rand(shape[1]), "std": torch.rand(shape[1]) + 0.25}

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        expected = reference.pgd_step_normalized(**_plain(before))
        return dict(zip(("images", "normalized"), zip(returned, expected, strict=True), strict=True))

    return Call(ops.pgd_step_normalized, arguments, results)


def random_start(rng: random.Random) -> Call:
    arguments = {
        "clean": random_images(rng, _image_shape(rng), rng.choice(DTYPES)),
        **{"eps": rng.choice((0.0, 8 / 255, 0.5)), "norm": rng.choice(("linf", "l2"))},
        "seed": rng.choice((0, -1, 2**63 - 1, torch.tensor([5, 2**40]))),
        **dict(zip(("lo", "hi"), rng.choice(((0.0, 1.0), (-math.inf, math.inf))), strict=True)),
    }

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        if not isinstance(before["seed"], int | Tensor):
            return {}  # a number is drawn
        expected = reference.random_start(**_plain(before) | {"seed": as_philox_state(before["seed"])})
        return {"images": (returned, expected)}

    return Call(ops.random_start, arguments, results)


def empty_gate(rng: random.Random) -> Call:
    shape, layout = random_shape(rng), dense_layout(rng)

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"size": (8 * returned.numel() >= before["like"].numel(), True)}

    return Call(ops.empty_gate, {"like": random_images(rng, shape, rng.choice(DTYPES), layout)}, results)


def gate_to_bool(rng: random.Random) -> Call:
    like = random_images(rng, random_shape(rng), rng.choice(DTYPES), dense_layout(rng))

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"shape": (returned.shape, before["like"].shape), "dtype": (returned.dtype, torch.bool)}

    return Call(ops.gate_to_bool, {"gate": random_gate(like), "like": like}, results)


MAKERS: dict[str, Callable[[random.Random], Call]] = {
    maker.__name__: maker
    for maker in (
        *(masked_conv2d, masked_conv2d_out, masked_conv2d_grad_input_out, max_pool2d_out, max_pool2d_grad_input_out),
        *(batch_norm_act, pointwise_out, pgd_step, pgd_step_, pgd_step_normalized, random_start, compile_pattern),
        *(
            masked_winograd_conv2d_out,
            masked_winograd_conv2d_weight,
            winograd_conv2d,
            winograd_conv2d_out,
            winograd_conv2d_weight,
            pack_pattern,
            set_kernels,
            plan,
            empty_gate,
            gate_to_bool,
        ),
    )
}
