"""`batch_norm_act` by its Triton kernels, interpreted on the CPU: values, gradients, gates, and networks that train."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_adv import engine
from sparse_adv.kernels import batch_norm_act as kernels
from sparse_adv.ops import batch_norm_act, batch_norm_act_cuda, gate_to_bool, reference

NCHW, CHANNELS_LAST = FORMATS = (torch.contiguous_format, torch.channels_last)
OPS = torch.ops.sparse_adv


@pytest.fixture(autouse=True, scope="module")
def triton_on_cpu() -> Iterator[None]:
    """Makes the implementation for CUDA that of the CPU, with the gradient that PyTorch calls."""
    library = torch.library.Library("sparse_adv", "IMPL")
    with warnings.catch_warnings():  # up to torch 2.13 there is one
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for function in (batch_norm_act_cuda.batch_norm_act, batch_norm_act_cuda.batch_norm_act_grad):
            library.impl(function.__name__, function, "CPU")
    yield
    library._destroy()


def images(shape: tuple[int, ...], dtype: torch.dtype, format: torch.memory_format) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) + 2).to(dtype).contiguous(memory_format=format)


# Channels and pixels that fill tiles and bytes of the gate, and others.
SHAPES = ((3, 16, 8, 8), (2, 5, 3, 9), (3, 17, 5, 6), (2, 1, 7, 7), (2, 24, 4, 4))
OPERANDS = (("weight", "bias", "residual", "relu"), ("weight", "residual"), ("relu",))


@settings(max_examples=10)
@given(
    st.sampled_from(OPERANDS),
    st.sampled_from(SHAPES),
    st.sampled_from(FORMATS),
    st.sampled_from([torch.float64, torch.float32, torch.float16]),
)
def test_results_and_gradients_equal_the_reference(names, shape, format, dtype):
    torch.manual_seed(0)
    vector_dtype = torch.promote_types(dtype, torch.float32)
    operands = {"input": images(shape, dtype, format)}
    operands |= {name: torch.rand(shape[1], dtype=vector_dtype) + 0.5 for name in names if name in ("weight", "bias")}
    if "residual" in names:
        operands["residual"] = images(shape, dtype, format) - 2
    wide = {name: tensor.double() for name, tensor in operands.items()}
    # An element that is rounded to another side of 0 would pass its gradient in one and not in the other.
    edge = reference.batch_norm_act(**wide, relu=False).abs() < 1e-2
    grad = images(shape, dtype, format).where(~edge, 0)
    results = []
    for function, tensors in ((batch_norm_act, operands), (reference.batch_norm_act, wide)):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        statistics = {name: torch.ones(shape[1], dtype=vector_dtype).to(tensors["input"]) for name in ("mean", "var")}
        running = {f"running_{name}": tensor for name, tensor in statistics.items()}
        out = function(**leaves, **running, relu="relu" in names)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        results.append({"out": out.detach(), **running, **dict(zip(leaves, gradients, strict=True))})
    actual, expected = results
    for name, value in expected.items():
        assert_close(actual[name], value, "reduction")
    assert actual["out"].is_contiguous(memory_format=format) and actual["input"].is_contiguous(memory_format=format)


@pytest.mark.parametrize("format", FORMATS, ids=["NCHW", "channels_last"])
def test_the_gate_has_the_bits_of_the_output(format):
    x = images((2, 13, 3, 11), torch.float32, format)
    x[0, 0, 0, 0] = torch.nan
    out, _, _, gate = OPS.batch_norm_act(x, x - 4, None, None, 1e-5, True)
    assert_equal(gate_to_bool(gate, out), ~(out <= 0))


def test_large_images_are_summed_by_several_programs_and_tiles(monkeypatch):
    x = images((2, 3, 130, 70), torch.float32, NCHW)
    for format in FORMATS:
        x = x.contiguous(memory_format=format)
        for addends in (1, 2):  # tiles of one program
            monkeypatch.setattr(kernels, "_ADDENDS", addends)
            tiles = kernels._tiles_of(x, None)
            assert tiles.programs(tiles.span)[0] > tiles.groups
            _, mean, var, _ = OPS.batch_norm_act(x, None, None, None, 1e-5, False)
            assert_close(mean, x.double().mean((0, 2, 3)))
            assert_close(var, x.double().var((0, 2, 3), correction=0))


@pytest.mark.parametrize("format", FORMATS, ids=["NCHW", "channels_last"])
def test_a_mean_far_from_zero_costs_no_precision(format):
    x = images((8, 5, 9, 11), torch.float32, format) + 1e3
    _, mean, var, _ = OPS.batch_norm_act(x, None, None, None, 1e-5, False)
    assert_close(var, x.double().var((0, 2, 3), correction=0))
    assert_close(mean, x.double().mean((0, 2, 3)))


def test_offsets_of_64_bits(monkeypatch):
    x, grad = (images((2, 24, 5, 6), torch.float32, CHANNELS_LAST) for _ in range(2))
    results = []
    for wide in (False, True):
        tiles_of = kernels._tiles_of
        monkeypatch.setattr(kernels, "_tiles_of", lambda *args, wide=wide, of=tiles_of: of(*args)._replace(WIDE=wide))
        out, mean, var, gate = OPS.batch_norm_act(x, x, None, None, 1e-5, True)
        results.append([out, gate, *OPS.batch_norm_act_grad(grad, x, None, mean, var, gate, 1e-5, True)])
    for narrow, wide in zip(*results, strict=True):
        assert_equal(wide, narrow)


def test_an_empty_batch():
    x = torch.empty(0, 3, 4, 4)
    out, mean, var, gate = OPS.batch_norm_act(x, None, None, None, 1e-5, True)
    assert out.shape == x.shape and not mean.any() and not var.any()
    grad_input, grad_weight, grad_bias, _ = OPS.batch_norm_act_grad(x, x, None, mean, var, gate, 1e-5, False)
    assert grad_input.shape == x.shape and not grad_weight.any() and not grad_bias.any()


def test_the_engine_finds_the_gradients_of_a_network_right():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()).train()
    assert engine.fuse_for_training(model, torch.randn(3, 3, 6, 6)) is not model


like = torch.zeros(2, 3, 4, 9)
BAD = {
    "no images": ({"input": torch.zeros(3, 9)}, "input must have 4 dimensions, got 2"),
    "integers": ({"input": like.int()}, "input must be float64, float32, bfloat16 or float16, got torch.int32"),
    "weight": ({"weight": torch.zeros(4)}, r"weight must have size \[3\], got \[4\]"),
    "bias": ({"bias": torch.zeros(3).int()}, "bias must be float64, float32"),
    "residual's size": ({"residual": like[:1]}, r"residual must have size \[2, 3, 4, 9\], got \[1, 3, 4, 9\]"),
    "residual's dtype": ({"residual": like.double()}, "residual must be torch.float32, got torch.float64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, message = BAD[name]
    with pytest.raises(RuntimeError, match=f"sparse_adv: {message}"):
        batch_norm_act(**{"input": like, **change})


def test_bad_operands_of_the_gradient_are_refused():
    vector, gate = torch.ones(3), torch.zeros(2, 3, 4, 2, dtype=torch.uint8)
    good = {
        "grad_output": like,
        "input": like,
        "weight": None,
        "mean": vector,
        "var": vector,
        "gate": gate,
        "eps": 1e-5,
    }
    for change, message in (
        ({"grad_output": like[:1]}, "grad_output must have size"),
        ({"mean": vector.double()}, "mean must be torch.float32, got torch.float64"),
        ({"var": vector[:2]}, r"var must have size \[3\], got \[2\]"),
        ({"gate": gate[..., :1]}, r"gate must have size \[2, 3, 4, 2\], got \[2, 3, 4, 1\]"),
        ({"gate": gate.char()}, "gate must be uint8 and contiguous, got torch.int8"),
    ):
        with pytest.raises(RuntimeError, match=f"sparse_adv: {message}"):
            OPS.batch_norm_act_grad(**good | change, needs_residual=False)
