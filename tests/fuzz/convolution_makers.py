"""Legal calls of the convolutions and of the functions that make their operands."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from helpers.convolution_cases import BLOCKS, FILTERS, LAYOUTS, Case, block_mask
from helpers.written_passes import random_gate
from torch import Tensor

from fuzz.call import Arguments, Call, Results, all_wide, wide
from fuzz.random_operands import DTYPES, comparable, random_images, random_shape, some
from sparse_adv import ops
from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import reference


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


def _geometry(case: Case) -> Arguments:
    return dict(zip(("stride", "padding", "dilation", "groups"), case.shape, strict=True))


def masked_conv2d(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    arguments = {"input": to(case.input), "weight": to(case.weight), "pattern": pattern, **_geometry(case)}
    arguments |= {name: to(v) if isinstance(v, Tensor) else v for name, v in case.epilogue.items()}

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        if not comparable(before):
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
        "bias": some(rng, lambda: to(torch.randint(-4, 5, case.output_size[1:2]))),
        "residual": rng.choice((None, out, in_layout_of(input, to(torch.randint(-4, 5, case.output_size))))),
        **{"relu": relu, "out": out, "gate_out": random_gate(out) if relu and rng.random() < 0.5 else None},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        if not comparable(before):
            return {}
        operands = all_wide(before, "pattern", "out", "gate_out")
        expected = reference.masked_conv2d(**operands, mask=before["pattern"].mask)
        compared = {"out": (after["out"], expected)}
        if after["gate_out"] is not None:
            compared["gate_out"] = (ops.gate_to_bool(after["gate_out"], after["out"]), after["out"] > 0)
        return compared

    return Call(ops.masked_conv2d_out, arguments, results, "reduction")


def masked_conv2d_grad_input_out(rng: random.Random) -> Call:
    case, to, pattern = convolution(rng)
    grad = to(case.grad_output)
    out = in_layout_of(grad, to(torch.zeros(case.input_size)))
    arguments = {
        **{"grad_output": grad, "weight": to(case.weight), "pattern": pattern, **_geometry(case)},
        "residual": rng.choice((None, out, in_layout_of(grad, to(torch.randint(-4, 5, case.input_size))))),
        **{"gate": some(rng, lambda: random_gate(out)), "out": out},
    }

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        if not comparable(before):
            return {}
        operands = all_wide(before, "pattern", "out", "gate")
        gate, size = before["gate"], before["out"].shape
        passes = None if gate is None else ops.gate_to_bool(gate, before["out"])
        mask = before["pattern"].mask
        expected = reference.masked_conv2d_grad_input(**operands, mask=mask, input_size=size, gate=passes)
        return {"out": (after["out"], expected)}

    return Call(ops.masked_conv2d_grad_input_out, arguments, results, "reduction")


def _winograd(rng: random.Random) -> tuple[Arguments, tuple[int, int, int, int]]:
    """Images, weights, padding and bias, and the size of the result."""
    batch, channels, *size = random_shape(rng)
    padding = rng.randint(0, 2), rng.randint(0, 2)
    size = [max(length, 3 - 2 * zeros) for length, zeros in zip(size, padding, strict=True)]
    out_channels = rng.choice((1, 3, 8, 16, 17, 33))
    arguments = {
        "input": random_images(rng, (batch, channels, *size), torch.float32),
        "weight": LAYOUTS[rng.choice(sorted(LAYOUTS))](torch.randint(-4, 5, (out_channels, channels, 3, 3)).float()),
        **{"padding": padding, "bias": some(rng, lambda: torch.randint(-4, 5, (out_channels,)).float())},
    }
    rows, cols = (length + 2 * zeros - 2 for length, zeros in zip(size, padding, strict=True))
    return arguments, (batch, out_channels, rows, cols)


def winograd_conv2d(rng: random.Random) -> Call:
    arguments, _ = _winograd(rng)

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        if not comparable(before):
            return {}
        operands = {name: wide(value) for name, value in before.items() if name != "tile"}
        return {"output": (returned, F.conv2d(**operands))}

    return Call(ops.winograd_conv2d, {**arguments, "tile": rng.choice((2, 4))}, results, "reduction")


def _winograd_out(rng: random.Random, layout: str) -> tuple[Arguments, Tensor]:
    """Operands of the ops that write, but for their weight, and the weight that it is made of."""
    arguments, size = _winograd(rng)
    weight = arguments["weight"]
    out, other = (random_images(rng, size, torch.float32, layout) for _ in range(2))
    is_nchw = layout == "contiguous"
    relu, has_gates = rng.random() < 0.5, (is_nchw or size[1] > 1 < size[2] * size[3]) and rng.random() < 0.5
    memory_format = torch.contiguous_format if is_nchw else torch.channels_last
    arguments |= {
        "input": arguments["input"].contiguous(memory_format=memory_format),
        **{"residual": rng.choice((None, out, other)), "relu": relu, "out": out},
        "gate": random_gate(out) if has_gates and not relu else None,
        "gate_out": random_gate(out) if has_gates and relu else None,
    }
    return arguments, weight


def _winograd_results(before: Arguments, after: Arguments, weight: Tensor) -> Results:
    if not comparable(before):  # what is not finite reaches whole tiles
        return {}
    sums = F.conv2d(wide(before["input"]), wide(weight), wide(before["bias"]), padding=before["padding"])
    passes = None if before["gate"] is None else ops.gate_to_bool(before["gate"], before["out"])
    expected = reference.pointwise(sums, residual=wide(before["residual"]), relu=before["relu"], gate=passes)
    compared = {"out": (after["out"], expected)}
    if after["gate_out"] is not None:
        compared["gate_out"] = (ops.gate_to_bool(after["gate_out"], after["out"]), ~(after["out"] <= 0))
    return compared


def winograd_conv2d_out(rng: random.Random) -> Call:
    arguments, weight = _winograd_out(rng, "channels_last")
    arguments["weight"] = ops.winograd_conv2d_weight(weight, tile=rng.choice((2, 4)))

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        return _winograd_results(before, after, weight)

    return Call(ops.winograd_conv2d_out, arguments, results, "reduction")


def masked_winograd_conv2d_out(rng: random.Random) -> Call:
    arguments, weight = _winograd_out(rng, "contiguous")
    block = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3)), *rng.choice(((1, 1), (3, 3)))
    mask = block_mask(tuple(weight.shape), block, rng.choice((0.0, 0.1, 0.5, 1.0)), rng.randrange(1000))
    arguments["weight"] = ops.masked_winograd_conv2d_weight(weight, ops.compile_pattern(mask, block))

    def results(before: Arguments, after: Arguments, _: Any) -> Results:
        return _winograd_results(before, after, weight.where(mask, 0))

    return Call(ops.masked_winograd_conv2d_out, arguments, results, "reduction")


def _transformed(weight: Tensor, tile: int, transposed: bool) -> Tensor:
    """G w G^T for each filter, [elements, output channels, input channels]."""
    rows = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
    if tile == 4:
        rows = [[1 / 4, 0, 0], [-1 / 6] * 3, [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6]]
        rows += [[1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
    taps, matrix = wide(weight), torch.tensor(rows).double()
    taps = taps.transpose(0, 1).flip(2, 3) if transposed else taps
    return torch.einsum("ir,js,kcrs->ijkc", matrix, matrix, taps).flatten(0, 1)


def winograd_conv2d_weight(rng: random.Random) -> Call:
    tile, transposed, layout = rng.choice((2, 4)), rng.random() < 0.5, rng.choice(sorted(LAYOUTS))
    out_channels, channels = rng.choice((0, 1, 5, 33)), rng.choice((0, 1, 3, 17, 40))
    weight = LAYOUTS[layout](torch.randint(-4, 5, (out_channels, channels, 3, 3)).float())

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        expected = _transformed(**before)
        # [elements, panels, C, 32] to [elements, K, C]
        return {"weight": (returned.transpose(2, 3).flatten(1, 2)[:, : expected.shape[1]], expected)}

    arguments = {"weight": weight, "tile": tile, "transposed": transposed}
    return Call(ops.winograd_conv2d_weight, arguments, results, "reduction")


def masked_winograd_conv2d_weight(rng: random.Random) -> Call:
    weight = LAYOUTS[rng.choice(sorted(LAYOUTS))](torch.randint(-4, 5, (rng.choice((1, 5, 9)), 6, 3, 3)).float())
    block = rng.choice((1, 2, 3, 4)), rng.choice((1, 2, 3)), *rng.choice(((1, 1), (3, 3)))
    mask = block_mask(tuple(weight.shape), block, rng.choice((0.0, 0.1, 0.5, 1.0)), rng.randrange(1000))

    def results(before: Arguments, after: Arguments, returned: Any) -> Results:
        if not comparable(before):
            return {}
        expected = _transformed(before["weight"].where(mask, 0), 4, before["transposed"])
        actual, oc_block = torch.zeros(36, expected.shape[1] + 3, expected.shape[2]), returned.values.shape[2]
        rows = torch.arange(len(returned.row_offsets) - 1).repeat_interleave(returned.row_offsets.diff())
        for j in range(oc_block):
            actual[:, oc_block * rows + j, returned.channels.long()] = returned.values[..., j]
        return {"weight": (actual[:, : expected.shape[1]], expected)}

    arguments = {"weight": weight, "pattern": ops.compile_pattern(mask, block), "transposed": rng.random() < 0.5}
    return Call(ops.masked_winograd_conv2d_weight, arguments, results, "reduction")


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
