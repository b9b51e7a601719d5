"""Index lists in memory that an op writes are refused: changed after their checks they lead out of bounds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse_adv import ops

X, WEIGHT = torch.rand(1, 8, 12, 12), torch.randn(8, 8, 3, 3)
SPARSE = ops.pack_pattern(
    ops.set_kernels(ops.compile_pattern(WEIGHT > 0), forward="sparse", grad_input="sparse"), WEIGHT.relu()
)
FILTERS = ops.compile_pattern(torch.eye(8).bool()[..., None, None].expand_as(WEIGHT), (1, 1, 3, 3))
LIVE = ops.masked_winograd_conv2d_weight(WEIGHT, FILTERS)


def inside(memory: Tensor, list_: Tensor) -> Tensor:
    """A copy of the list that lies in the memory."""
    view = memory.view(-1).view(torch.uint8)[: list_.nbytes].view(list_.dtype).view(list_.shape)
    return view.copy_(list_)


def out_and_gate() -> dict[str, Tensor]:
    return {"out": torch.empty_like(X), "gate_out": torch.empty(1, 8, 12, 2, dtype=torch.uint8)}


@pytest.mark.parametrize("written", ["out", "gate_out"])
@pytest.mark.parametrize("name", ["row_offsets", "channels"])
def test_lists_of_live_filters(name, written):
    results = out_and_gate()
    live = LIVE._replace(**{name: inside(results[written], getattr(LIVE, name))})
    with pytest.raises(RuntimeError, match=f"^sparse_adv: {written} shares memory with {name}"):
        ops.masked_winograd_conv2d_out(X, live, relu=True, **results)


PARTS = ("header", "mask", "row_offsets", "col_indices", "grad_input_row_offsets", "grad_input_col_indices")


@pytest.mark.parametrize("name", [*PARTS, "values", "grad_input_values"])
def test_tensors_of_a_pattern(name):
    out = torch.empty(4, 8, 12, 12)
    pattern = replace(SPARSE, **{name: inside(out, getattr(SPARSE, name))})
    images = torch.rand(out.shape)
    for op in (ops.masked_conv2d_out, ops.masked_conv2d_grad_input_out):
        with pytest.raises(RuntimeError, match=f"out shares memory with the pattern's {name}"):
            op(images, WEIGHT.relu(), pattern, padding=1, out=out)


def test_a_gate_on_a_pattern():
    results = out_and_gate()
    pattern = replace(SPARSE, row_offsets=inside(results["gate_out"], SPARSE.row_offsets))
    with pytest.raises(RuntimeError, match="gate_out shares memory with the pattern's row_offsets"):
        ops.masked_conv2d_out(X, WEIGHT.relu(), pattern, padding=1, relu=True, **results)
