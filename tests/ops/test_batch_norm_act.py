"""BatchNorm with the batch's statistics, residual and ReLU: values, gradients, layouts, dtypes, errors."""

import pytest
import torch
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_adv.ops import batch_norm_act, reference

FORMATS = (torch.contiguous_format, torch.channels_last)
SIZES = ((7, 7), (14, 14), (5, 3), (4, 4), (32, 32), (1, 1), (3, 8), (1, 17), (9, 1), (33, 70))
OPERANDS = ("weight", "bias", "residual")


def operands_of(shape: tuple[int, ...], names: set[str], options: dict, offset: float = 0.0) -> dict[str, Tensor]:
    dtype = options["dtype"]
    vectors = {name: torch.randn(2 * shape[1], dtype=dtype)[::2] for name in sorted(names - {"residual"})}
    images = {"input": torch.randn(shape, dtype=torch.float64) + offset}
    if "residual" in names:
        images["residual"] = torch.randn(shape, dtype=torch.float64)
    made = {name: tensor.to(dtype).contiguous(memory_format=options["format"]) for name, tensor in images.items()}
    return made | vectors


def result_and_gradients(function, operands: dict[str, Tensor], grad: Tensor, relu: bool) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
    statistics = {name: torch.full(grad.shape[1:2], 0.5, dtype=grad.dtype) for name in ("running_mean", "running_var")}
    out = function(**leaves, **statistics, relu=relu)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return {"out": out.detach(), **statistics, **dict(zip(leaves, gradients, strict=True))}


@given(
    batch=st.sampled_from((2, 3, 16)),
    channels=st.sampled_from((1, 2, 3, 8, 13, 64, 150)),
    size=st.sampled_from(SIZES),
    names=st.sets(st.sampled_from(OPERANDS)),
    relu=st.booleans(),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)),
)
def test_results_and_gradients_equal_the_reference(batch, channels, size, names, relu, format, dtype):
    shape = (batch, channels, *size)
    operands = operands_of(shape, names, {"dtype": dtype, "format": format})
    grad = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=format)
    # PyTorch's gradient of a channels_last input is wrong where the weight has strides.
    wide = {name: tensor.double() + 0 for name, tensor in operands.items()}
    # An element that is rounded to another side of 0 would pass its gradient in one and not in the other.
    edge = reference.batch_norm_act(**wide, relu=False).abs() < 1e-2
    actual = result_and_gradients(batch_norm_act, operands, grad.where(~edge, 0).to(dtype), relu)
    expected = result_and_gradients(reference.batch_norm_act, wide, grad.where(~edge, 0).to(dtype).double(), relu)
    for name, value in expected.items():
        if name == "input" and batch * size[0] * size[1] < 8:
            continue  # of few values the gradient is a small difference of large numbers
        assert_close(actual[name], value, "reduction")
    assert actual["out"].is_contiguous(memory_format=format) and actual["input"].is_contiguous(memory_format=format)


@pytest.mark.parametrize("format", FORMATS)
def test_a_mean_far_from_zero_costs_no_precision(format):
    operands = operands_of((8, 5, 9, 11), set(), {"dtype": torch.float32, "format": format}, offset=1e3)
    out = batch_norm_act(**operands, relu=False)
    expected = reference.batch_norm_act(operands["input"].double(), relu=False)
    assert (out - expected).abs().max() < 1e-3  # 1e3 itself is rounded to 6e-5 of the deviation
    var, var_expected = torch.zeros(5), operands["input"].double().var((0, 2, 3))
    batch_norm_act(**operands, running_var=var, momentum=1.0)
    assert_close(var, var_expected)


@pytest.mark.parametrize("format", FORMATS)
def test_sums_over_a_million_elements_are_as_precise_as_short_ones(format):
    """Only the result is rounded to float32; a sum in float32 throughout would be wrong by 1e-6."""
    input = torch.rand(4096, 2, 16, 16).contiguous(memory_format=format).requires_grad_()
    weight, bias, var = torch.ones(2).requires_grad_(), torch.zeros(2).requires_grad_(), torch.zeros(2)
    out = batch_norm_act(input, weight, bias, torch.zeros(2), var, relu=False, momentum=1.0)
    grad = torch.rand(out.shape).contiguous(memory_format=format)
    out.backward(grad)
    assert torch.allclose(var.double(), input.detach().double().var((0, 2, 3)), rtol=1.2e-7, atol=0)
    assert torch.allclose(bias.grad.double(), grad.double().sum((0, 2, 3)), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(4, 4), (32, 32)])
def test_results_do_not_depend_on_the_number_of_threads(format, size):
    operands = operands_of((9, 37, *size), set(OPERANDS), {"dtype": torch.float32, "format": format})
    grad = torch.randn(9, 37, *size).contiguous(memory_format=format)
    results, before = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(result_and_gradients(batch_norm_act, operands, grad, relu=True))
    torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert_equal(value, results[0][name])


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_layouts_that_differ(relu):
    operands = operands_of((3, 4, 5, 6), {"residual"}, {"dtype": torch.float64, "format": FORMATS[0]})
    operands["residual"] = operands["residual"].contiguous(memory_format=FORMATS[1])
    operands["input"] = torch.randn(3, 4, 12, 5, dtype=torch.float64).transpose(2, 3)[..., ::2]
    grad = torch.randn(3, 4, 6, 5, dtype=torch.float64).transpose(2, 3)
    actual = result_and_gradients(batch_norm_act, operands, grad, relu)
    expected = result_and_gradients(reference.batch_norm_act, operands, grad, relu)
    for name, value in expected.items():
        assert_close(actual[name], value)


@pytest.mark.parametrize("format", FORMATS)
def test_gradcheck(format):
    options = {"dtype": torch.float64, "format": format}
    operands = [tensor.requires_grad_() for tensor in operands_of((3, 2, 3, 3), set(OPERANDS), options).values()]

    def function(input, residual, bias, weight):
        return batch_norm_act(input, weight, bias, residual=residual, relu=True)

    assert torch.autograd.gradcheck(function, operands)
    assert torch.autograd.gradgradcheck(function, operands)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("names", [{"weight"}, {"residual"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_penalty_of_the_gradient_has_the_gradients_of_the_reference(relu, names, dtype):
    operands = operands_of((3, 2, 5, 9), names, {"dtype": dtype, "format": FORMATS[1]})

    def gradients_of_penalty(function, operands):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
        loss = function(**leaves, relu=relu).double().pow(3).sum()  # that of squares is constant
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        return torch.autograd.grad(sum(gradient.double().square().sum() for gradient in gradients), leaves.values())

    wide = {name: tensor.double() + 0 for name, tensor in operands.items()}
    expected = gradients_of_penalty(reference.batch_norm_act, wide)
    for actual, value in zip(gradients_of_penalty(batch_norm_act, operands), expected, strict=True):
        assert (actual - value).norm() < 20 * torch.finfo(dtype).eps * value.norm()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("names", [set(), {"weight"}, set(OPERANDS)])
def test_opcheck(relu, names):
    format = FORMATS[(relu + len(names)) % 2]  # with and without a ReLU, each of the operands meets both
    operands = operands_of((2, 3, 4, 9), names, {"dtype": torch.float32, "format": format})
    arguments = [operands.get(name) for name in ("input", "residual", "weight", "bias")]
    for argument in arguments:
        if argument is not None:
            argument.requires_grad_()
    torch.library.opcheck(torch.ops.sparse_adv.batch_norm_act, (*arguments, 1e-5, relu))
    with torch.no_grad():
        out, mean, var, gate = torch.ops.sparse_adv.batch_norm_act(*arguments, 1e-5, relu)
    for needs_residual in (False, True):
        rest = (operands.get("weight"), mean, var, gate if relu else None, 1e-5, needs_residual)
        operands_of_grad = [
            tensor if tensor is None else getattr(tensor, "detach", lambda t=tensor: t)()
            for tensor in (out, operands["input"], *rest[:4])
        ]
        torch.library.opcheck(torch.ops.sparse_adv.batch_norm_act_grad, (*operands_of_grad, *rest[4:]))


def test_an_empty_batch_gives_an_empty_result_and_leaves_the_statistics():
    statistics = {"running_mean": torch.full((3,), 0.5), "running_var": torch.full((3,), 2.0)}
    input, weight = torch.empty(0, 3, 4, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    out = batch_norm_act(input, weight, **statistics, relu=True)
    out.sum().backward()
    assert out.shape == input.grad.shape == (0, 3, 4, 4) and not weight.grad.any()
    assert statistics["running_mean"].tolist() == [0.5] * 3 and statistics["running_var"].tolist() == [2.0] * 3


def test_not_a_number_stays():
    input = torch.randn(2, 2, 3, 3)
    input[0, 0, 0, 0] = torch.nan
    out = batch_norm_act(input, relu=True)
    assert out[:, 0].isnan().all() and out[:, 1].isfinite().all()


def test_a_frozen_operand_gets_no_gradient():
    operands = operands_of((2, 3, 4, 4), set(OPERANDS), {"dtype": torch.float32, "format": FORMATS[0]})
    weight = operands["weight"].requires_grad_()
    batch_norm_act(**operands, relu=True).sum().backward()
    assert weight.grad is not None and all(t.grad is None for name, t in operands.items() if name != "weight")


like = torch.zeros(2, 3, 4, 9)
BAD = {
    "no images": ({"input": torch.zeros(3, 9)}, RuntimeError, "input must have 4 dimensions, got 2"),
    "integers": ({"input": like.int()}, RuntimeError, "input must be float64, float32, bfloat16 or float16"),
    "one value": ({"input": torch.zeros(1, 3, 1, 1)}, ValueError, r"more than one value per channel.* \(1, 3, 1, 1\)"),
    "weight": ({"weight": torch.zeros(4)}, RuntimeError, r"weight must have size \[3\], got \[4\]"),
    "devices": ({"weight": torch.zeros(3, device="meta")}, ValueError, "weight is on meta, input on cpu"),
    "bias": ({"bias": torch.zeros(3).int()}, RuntimeError, "bias must be float64, float32"),
    "statistics of 8 bits": (
        {"running_var": torch.ones(3).to(torch.float8_e5m2)},
        ValueError,
        "16 bits or more, of shape",
    ),
    "statistics with a gradient": (
        {"running_mean": torch.zeros(3, requires_grad=True)},
        ValueError,
        "running_mean is written, and requires grad",
    ),
    "statistics that share memory": (
        {"running_var": torch.ones(1).expand(3)},
        ValueError,
        r"running_var is written: .* got strides \(0,\)",
    ),
    "residual's size": (
        {"residual": torch.zeros(2, 3, 4)},
        RuntimeError,
        r"residual must have size \[2, 3, 4, 9\], got \[2, 3, 4\]",
    ),
    "residual's dtype": ({"residual": like.double()}, RuntimeError, "residual must have the dtype of input, Float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message):
        batch_norm_act(**{"input": like, **change})


def test_statistics_of_large_images_are_summed_in_float64():
    x = torch.randn(1, 2, 1023, 1025) + 0.3
    _, mean, var, _ = torch.ops.sparse_adv.batch_norm_act(x, None, None, None, 1e-5, True)
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=0, atol=1e-7)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), unbiased=False), rtol=2e-7, atol=0)


def test_one_compiled_function_takes_layers_of_any_width():
    compiled = torch.compile(batch_norm_act, backend="aot_eager", fullgraph=True)
    for channels in (4, 8):
        x, found, expected = torch.randn(2, channels, 5, 5), [], []
        for function, statistics in ((compiled, found), (batch_norm_act, expected)):
            statistics += torch.zeros(channels), torch.ones(channels)
            statistics.append(function(x, None, None, *statistics, relu=True))
        for actual, wanted in zip(found, expected, strict=True):
            assert_equal(actual, wanted)


def test_running_statistics_are_updated_under_torch_func_too():
    x = torch.randn(4, 3, 5, 5)
    updated = []
    for call in (lambda f: f(x), lambda f: torch.func.grad(f)(x)):
        statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
        call(lambda images, statistics=statistics: batch_norm_act(images, **statistics, relu=True).square().sum())
        updated.append(torch.stack(list(statistics.values())))
    assert_close(updated[1], updated[0])
    assert (updated[0][0] != 0).all()
