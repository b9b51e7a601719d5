"""A legal call of every op, and what it must compute: the float64 reference of the arguments that were given."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers.convolution_cases import BLOCKS, FILTERS, LAYOUTS, Case
from helpers.written_passes import random_gate
from torch import Tensor

from fuzz.call import Arguments, Call, Results, all_wide, wide
from sparse_adv import ops
from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import reference
from sparse_adv.ops.random_start import as_philox_state

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _some(rng: random.Random, value: Callable[[], Any]) -> Any:
    return value() if rng.random() < 0.5 else None


def _shape(rng: random.Random) -> tuple[int, int, int, int]:
    sizes = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33)
    return rng.choice((0, 1, 2, 5)), rng.choice(sizes), rng.choice(sizes), rng.choice(sizes)


def _images(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype, layout: str | None = None) -> Tensor:
    images = torch.randint(-16, 17, shape).div(8).to(dtype)
    layout = layout or rng.choice(sorted(LAYOUTS))
    return LAYOUTS[layout](images) if len(shape) == 4 else images


def _dense_layout(rng: random.Random) -> str:
    return rng.choice(("contiguous", "channels_last"))


def convolution(rng: random.Random) -> tuple[Case, Callable[[Tensor], Tensor], Any]:
    """A convolution, the conversion to its dtype, and its pattern, with a kernel requested for each pass."""
    filter = rng.choice(FILTERS)
    stride, padding, dilation = (
        (rng.randint(low, high), rng.randint(low, high)) for low, high in ((1, 3), (0, 3), (1, 2))
    )
    least = [max(1, d * (f - 1) + 1 - 2 * p) for f, p, d in zip(filter, padding, dilation, strict=True)]
    named = {"R": filter[0], "S": filter[1]}
    case = Case(
        batch=rng.choice((0, 1, 2, 5, 16, 17)),
        groups=rng.choice((1, 1, 2, 3)),
        group_in=rng.randint(1, 9),
        group_out=rng.choice((1, 2, 3, 4, 5, 8, 17)),
        image=(least[0] + rng.randint(0, 12), least[1] + rng.randint(0, 20)),
        filter=filter,
        stride=stride,
        padding=padding,
        dilation=dilation,
        block=tuple(named.get(size, size) for size in rng.choice(BLOCKS)),  # type: ignore[call-overload]
        density=rng.choice((0.0, 0.05, 0.3, 0.7, 1.0)),
        layout=rng.choice(sorted(LAYOUTS)),
        weight_layout=rng.choice(sorted(LAYOUTS)),
        seed=rng.randrange(1000),
    )
    dtype = rng.choice(DTYPES)
    pattern = ops.set_kernels(case.pattern(), *(rng.choice(("auto", "sparse", "dense")) for _ in range(3)))
    return case, lambda tensor: tensor.to(dtype), pattern


def _comparable(arguments: Arguments) -> bool:
    """Whether all is finite: sparse kernels skip the padding, a dense convolution multiplies it by the weight."""
    tensors = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return all(tensor.isfinite().all() for tensor in tensors)


def _geometry(case: Case) -> Arguments:
    return dict(zip(("stride", "padding", "dilation", "groups"), case.shape, strict=True))


def masked_conv2d(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    arguments = {"input": to(case.input), "weight": to(case.weight), "pattern": pattern, **_geometry(case)}
    arguments |= {name: to(v) if isinstance(v, Tensor) else v for name, v in case.epilogue.items()}

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        if not _comparable(before):
            return {}
        expected = reference.masked_conv2d(**all_wide(before, "pattern"), mask=before["pattern"].mask)
        return {"output": (returned, expected)}

    return Call(ops.masked_conv2d, arguments, results, "reduction")


def masked_conv2d_out(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    input = to(case.input)
    out = in_layout_of(input, to(torch.zeros(case.output_size)))
    relu = rng.random() < 0.5
    arguments = {
        **{"input": input, "weight": to(case.weight), "pattern": pattern, **_geometry(case)},
        "bias": _some(rng, lambda: to(torch.randint(-4, 5, case.output_size[1:2]))),
        "residual": rng.choice((None, out, in_layout_of(input, to(torch.randint(-4, 5, case.output_size))))),
        **{"relu": relu, "out": out, "gate": random_gate(out) if relu and rng.random() < 0.5 else None},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        if not _comparable(before):
            return {}
        expected = reference.masked_conv2d(**all_wide(before, "pattern", "out", "gate"), mask=before["pattern"].mask)
        compared = {"out": (after["out"], expected)}
        if after["gate"] is not None:
            compared["gate"] = (ops.gate_to_bool(after["gate"], after["out"]), after["out"] > 0)
        return compared

    return Call(ops.masked_conv2d_out, arguments, results, "reduction")


def masked_conv2d_grad_input_out(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    grad = to(case.grad_output)
    out = in_layout_of(grad, to(torch.zeros(case.input_size)))
    arguments = {
        **{"grad_output": grad, "weight": to(case.weight), "pattern": pattern, **_geometry(case)},
        "residual": rng.choice((None, out, in_layout_of(grad, to(torch.randint(-4, 5, case.input_size))))),
        **{"gate": _some(rng, lambda: random_gate(out)), "out": out},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        if not _comparable(before):
            return {}
        operands = all_wide(before, "pattern", "out", "gate")
        gate, size = before["gate"], before["out"].shape
        passes = None if gate is None else ops.gate_to_bool(gate, before["out"])
        mask = before["pattern"].mask
        expected = reference.masked_conv2d_grad_input(**operands, mask=mask, input_size=size, gate=passes)
        return {"out": (after["out"], expected)}

    return Call(ops.masked_conv2d_grad_input_out, arguments, results, "reduction")


def _window(rng: random.Random, shape: tuple[int, int, int, int]) -> tuple[int, int]:
    return rng.randint(1, min(4, shape[2])), rng.randint(1, min(4, shape[3]))


def max_pool2d_out(rng: random.Random) -> Call:
    shape, layout = _shape(rng), _dense_layout(rng)
    size = _window(rng, shape)
    input = _images(rng, shape, rng.choice((torch.float32, torch.float64)), layout)
    out = in_layout_of(input, input.new_zeros(*shape[:2], shape[2] // size[0], shape[3] // size[1]))
    index = _some(rng, lambda: torch.zeros_like(out, dtype=torch.uint8))

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        return {"out": (after["out"], _pooled(before["input"].double(), before["size"]).flatten(4).amax(4))}

    return Call(ops.max_pool2d_out, {"input": input, "size": size, "out": out, "index": index}, results)


def _pooled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The windows, [N, C, P, Q, rows, columns]."""
    return images.unfold(2, size[0], size[0]).unfold(3, size[1], size[1])


def max_pool2d_grad_input_out(rng: random.Random) -> Call:
    shape, layout, dtype = _shape(rng), _dense_layout(rng), rng.choice((torch.float32, torch.float64))
    size = _window(rng, shape)
    out = _images(rng, shape, dtype, layout)
    grad = in_layout_of(out, _images(rng, (*shape[:2], shape[2] // size[0], shape[3] // size[1]), dtype, layout))
    index = torch.randint_like(grad, size[0] * size[1]).to(torch.uint8)
    arguments = {
        **{"grad": grad, "index": index, "size": size},
        "residual": rng.choice((None, out, _images(rng, shape, dtype, layout))),
        **{"gate": _some(rng, lambda: random_gate(out)), "out": out},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        rows, cols = before["size"]
        expected = torch.zeros_like(before["out"], dtype=torch.float64, memory_format=torch.contiguous_format)
        chosen = F.one_hot(before["index"].long(), 256)[..., : rows * cols].unflatten(4, (rows, cols)).bool()
        _pooled(expected, (rows, cols)).copy_(before["grad"].double()[..., None, None].where(chosen, 0))
        gate, residual = before["gate"], wide(before["residual"])
        passes = None if gate is None else ops.gate_to_bool(gate, before["out"])
        return {"out": (after["out"], reference.pointwise(expected, residual=residual, gate=passes))}

    return Call(ops.max_pool2d_grad_input_out, arguments, results)


def batch_norm_act(rng: random.Random) -> Call:
    shape, dtype = _shape(rng), rng.choice(DTYPES)
    while shape[0] * shape[2] * shape[3] < 2:
        shape = _shape(rng)

    def vector() -> Tensor:
        return torch.rand(shape[1], dtype=torch.float64).add(0.5).to(dtype)

    arguments = {
        "input": _images(rng, shape, dtype),
        **{name: _some(rng, vector) for name in ("weight", "bias", "running_mean", "running_var")},
        "residual": _some(rng, lambda: _images(rng, shape, dtype)),
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
    shape, layout, dtype = _shape(rng), _dense_layout(rng), rng.choice(DTYPES)
    out, other = _images(rng, shape, dtype, layout), _images(rng, shape, dtype, layout)
    relu = rng.random() < 0.5
    arguments = {
        "input": rng.choice((out, other)),
        **{name: _some(rng, lambda: torch.rand(shape[1]).to(dtype)) for name in ("scale", "bias")},
        "residual": rng.choice((None, out, other)),
        **{"relu": relu, "gate": None if relu else _some(rng, lambda: random_gate(out)), "out": out},
        "gate_out": _some(rng, lambda: random_gate(out)) if relu else None,
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
        "adv": _images(rng, shape, dtype),
        "grad": _images(rng, shape, rng.choice(DTYPES) if rng.random() < 0.3 else dtype),
        "clean": _images(rng, shape, dtype),
        **{"alpha": rng.choice((0.0, -0.25, 0.1, 2 / 255)), "eps": rng.choice((0.0, 8 / 255, 0.5, math.inf))},
        **dict(
            zip(("lo", "hi"), rng.choice(((0.0, 1.0), (-1.0, 1.0), (-math.inf, math.inf), (0.5, 0.5))), strict=True)
        ),
    }


def _image_shape(rng: random.Random) -> tuple[int, ...]:
    return _shape(rng)[: rng.randint(1, 4)] if rng.random() < 0.3 else _shape(rng)


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
    shape = _shape(rng)
    arguments = _step(rng, shape, torch.float32)
    arguments |= {"mean": torch.rand(shape[1]), "std": torch.rand(shape[1]) + 0.25}

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        expected = reference.pgd_step_normalized(**_plain(before))
        return dict(zip(("images", "normalized"), zip(returned, expected, strict=True), strict=True))

    return Call(ops.pgd_step_normalized, arguments, results)


def random_start(rng: random.Random) -> Call:
    arguments = {
        "clean": _images(rng, _image_shape(rng), rng.choice(DTYPES)),
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


def compile_pattern(rng: random.Random) -> Call:
    case, _, _ = convolution(rng)

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"mask": (returned.mask, before["mask"]), "kept": (returned.nonzeros, int(before["mask"].sum()))}

    return Call(ops.compile_pattern, {"mask": case.mask, "block": case.block, "groups": case.groups}, results)


def pack_pattern(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    weight = to(case.weight.where(case.mask, 0))

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        input = to(case.input)
        weight = before["weight"]
        if weight.dtype != input.dtype or weight.where(~case.mask, 0).any() or not weight.isfinite().all():
            return {"mask": (returned.mask, case.mask)}
        actual = ops.masked_conv2d(input, before["weight"], returned, None, *case.shape)
        expected = reference.masked_conv2d(wide(input), wide(before["weight"]), case.mask, None, *case.shape)
        return {"output": (actual, expected)}

    return Call(ops.pack_pattern, {"pattern": pattern, "weight": weight}, results, "reduction")


def set_kernels(rng: random.Random) -> Call:
    arguments = {
        "pattern": convolution(rng)[2],
        **{name: rng.choice(("auto", "sparse", "dense")) for name in ops.PASSES},
    }

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"kernels": (returned.requested_kernels, tuple(before[name] for name in ops.PASSES))}

    return Call(ops.set_kernels, arguments, results)


def plan(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    arguments = {"pattern": pattern, "input": to(case.input), **_geometry(case)}
    del arguments["groups"]

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"kernels": (all(each.kernel in ("sparse", "dense") and each.macs >= 0 for each in returned), True)}

    return Call(ops.plan, arguments, results)


def empty_gate(rng: random.Random) -> Call:
    shape, layout = _shape(rng), _dense_layout(rng)

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"size": (8 * returned.numel() >= before["like"].numel(), True)}

    return Call(ops.empty_gate, {"like": _images(rng, shape, rng.choice(DTYPES), layout)}, results)


def gate_to_bool(rng: random.Random) -> Call:
    like = _images(rng, _shape(rng), rng.choice(DTYPES), _dense_layout(rng))

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        return {"shape": (returned.shape, before["like"].shape), "dtype": (returned.dtype, torch.bool)}

    return Call(ops.gate_to_bool, {"gate": random_gate(like), "like": like}, results)


MAKERS: dict[str, Callable[[random.Random], Call]] = {
    maker.__name__: maker
    for maker in (
        *(masked_conv2d, masked_conv2d_out, masked_conv2d_grad_input_out, max_pool2d_out, max_pool2d_grad_input_out),
        *(batch_norm_act, pointwise_out, pgd_step, pgd_step_, pgd_step_normalized, random_start, compile_pattern),
        *(pack_pattern, set_kernels, plan, empty_gate, gate_to_bool),
    )
}
