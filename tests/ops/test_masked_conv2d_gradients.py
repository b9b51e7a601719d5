"""Derivatives of the convolution, and the ops under autograd, autocast, torch.compile and torch.export."""

import pytest
import torch
from helpers.convolution_cases import Case, cases
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given, settings
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from sparse_adv.ops import Pattern, compile_pattern, masked_conv2d, pack_pattern, reference
from sparse_adv.ops.masked_conv2d_gradients import is_masked

KERNELS = ("sparse", "auto", "dense")
OPS = torch.ops.sparse_adv
DIFFERENTIABLE = ("input", "weight", "bias", "scale", "residual")
# Small sizes, because gradcheck computes finite differences of every element.
SMALL = {
    "plain": Case(2, 1, 2, 3, (4, 5)),
    "strided": Case(1, 1, 2, 2, (5, 6), stride=(2, 3), padding=(2, 0)),
    "dilated": Case(1, 1, 1, 2, (6, 5), (2, 3), dilation=(2, 1), layout="channels_last"),
    "grouped": Case(1, 2, 1, 2, (3, 3), block=(2, 1)),
}


def differentiable_tensors(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    channels = case.output_size[1]
    sizes = (case.input_size, case.weight_size, (channels,), (channels,), case.output_size)
    return {
        name: torch.randn(size, dtype=dtype).requires_grad_() for name, size in zip(DIFFERENTIABLE, sizes, strict=True)
    }


def convolve(case: Case, pattern: Pattern, tensors: dict[str, Tensor], relu: bool) -> Tensor:
    epilogue = {name: tensors[name] for name in tensors if name in ("scale", "residual")}
    return masked_conv2d(
        tensors["input"], tensors["weight"], pattern, tensors.get("bias"), *case.shape, **epilogue, relu=relu
    )


def expect(case: Case, tensors: dict[str, Tensor], relu: bool) -> Tensor:
    return reference.masked_conv2d(
        tensors["input"],
        tensors["weight"],
        case.mask,
        tensors["bias"],
        *case.shape,
        scale=tensors["scale"],
        residual=tensors["residual"],
        relu=relu,
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_every_argument_equal_autograds(kernel, relu):
    @settings(max_examples=30)
    @given(cases())
    def check(case: Case) -> None:
        # Integers, so that float32 and float64 agree on the sign at the ReLU.
        tensors = {k: v.detach() for k, v in differentiable_tensors(case, torch.float32).items()}
        tensors = {k: (v * 4).round().requires_grad_() for k, v in tensors.items()}
        actual = torch.autograd.grad(
            convolve(case, case.pattern(kernel), tensors, relu), list(tensors.values()), case.grad_output
        )
        doubles = {k: v.detach().double().requires_grad_() for k, v in tensors.items()}
        expected = torch.autograd.grad(expect(case, doubles, relu), list(doubles.values()), case.grad_output.double())
        for name, gradient, value in zip(tensors, actual, expected, strict=True):
            value = value.where(case.mask, 0) if name == "weight" else value
            assert_close(gradient, value)
            assert gradient.shape == value.shape
        assert not actual[1][~case.mask].any()

    check()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck_and_gradgradcheck(name, relu):
    case = SMALL[name]
    tensors = differentiable_tensors(case)
    pattern = case.pattern()

    def function(*values: Tensor) -> Tensor:
        return convolve(case, pattern, dict(zip(DIFFERENTIABLE, values, strict=True)), relu)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("name", SMALL)
def test_gradcheck_and_gradgradcheck_of_the_gradient_ops(name):
    case = SMALL[name]
    tensors = case.pattern().flatten()
    input, weight, grad = (
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in (case.input_size, case.weight_size, case.output_size)
    )

    def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
        return OPS.masked_conv2d_grad_input(grad, weight, tensors, case.input_size, *case.shape)

    def grad_weight(grad: Tensor, input: Tensor) -> Tensor:
        return OPS.masked_conv2d_grad_weight(grad, input, tensors, *case.shape)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(grad_input, (grad, weight))
        assert check(grad_weight, (grad, input))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("packed", [False, True])
def test_second_derivatives_of_the_sparse_kernels_equal_the_references(kernel, packed):
    case = Case(3, 2, 5, 4, stride=(2, 1), block=(2, 1))
    tensors = {name: t.detach() for name, t in differentiable_tensors(case, torch.float32).items()}
    tensors["weight"] = tensors["weight"].where(case.mask, 0)
    pattern = case.pattern(kernel)
    if packed:
        pattern = pack_pattern(pattern, tensors["weight"])

    def penalty(function, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The gradient of a gradient's norm, as in a GradAlign loss."""
        tensors = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        output = function(tensors).sigmoid().sum()
        grad_input, grad_weight = torch.autograd.grad(output, [tensors["input"], tensors["weight"]], create_graph=True)
        loss = grad_input.square().sum() + grad_weight.square().sum()
        return torch.autograd.grad(loss, list(tensors.values()))

    actual = penalty(lambda t: convolve(case, pattern, t, relu=True), tensors)
    expected = penalty(lambda t: expect(case, t, relu=True), {k: v.double() for k, v in tensors.items()})
    for gradient, value in zip(actual, expected, strict=True):
        assert_close(gradient, value)


def sample_calls(case: Case, pattern: Pattern, grad: bool) -> dict[str, tuple]:
    input, weight, grad_output = (t.clone().requires_grad_(grad) for t in (case.input, case.weight, case.grad_output))
    channels = case.output_size[1]
    bias, scale, tensors = torch.randn(channels), torch.randn(channels), pattern.flatten()
    return {
        "masked_conv2d": (input, weight, tensors, bias, *case.shape, scale, case.grad_output, True),
        "masked_conv2d_grad_input": (grad_output, weight, tensors, list(case.input_size), *case.shape),
        "masked_conv2d_grad_weight": (grad_output, input, tensors, *case.shape),
    }


OPCHECK_CASES = {
    "plain": Case(),
    "channels_last": Case(layout="channels_last", weight_layout="channels_last", stride=(2, 1)),
    "sliced": Case(layout="sliced", groups=2, stride=(2, 1)),
    "one channel": Case(group_in=1, group_out=1, layout="channels_last"),
    "one pixel": Case(image=(1, 1), filter=(1, 1), padding=(0, 0), layout="channels_last"),
    "empty batch": Case(batch=0),
}


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("name", OPCHECK_CASES)
@pytest.mark.parametrize("op", ["masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight"])
def test_opcheck(op, name, kernel):
    case = OPCHECK_CASES[name]
    grad = (kernel == "sparse") == (list(OPCHECK_CASES).index(name) % 2 == 0)  # each kernel and op meets both
    arguments = sample_calls(case, case.pattern(kernel), grad)[op]
    torch.library.opcheck(getattr(OPS, op).default, arguments)


def test_opcheck_of_the_ops_on_patterns():
    # Only the schema: they are not called while a graph is traced, and have no fake kernels.
    case = Case()
    torch.library.opcheck(OPS.pack_values.default, (case.weight, case.pattern().flatten()), test_utils=("test_schema",))
    arguments = (case.input, case.pattern().flatten(), *case.shape[:3])
    torch.library.opcheck(OPS.masked_conv2d_plan.default, arguments, test_utils=("test_schema",))


class Net(nn.Module):
    def __init__(self, case: Case, kernel: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(case.weight.clone()), nn.Parameter(torch.randn(case.weight_size[0]))
        self.case, self.pattern = case, case.pattern(kernel)

    def forward(self, x: Tensor) -> Tensor:
        return masked_conv2d(x, self.weight, self.pattern, self.bias, *self.case.shape, relu=True).sin()


@pytest.mark.parametrize("kernel", ["sparse", "auto"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_compiled_graph_equals_eager_for_every_batch(kernel, layout):
    case = Case(batch=6, layout=layout, stride=(2, 1))
    net = Net(case, kernel)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (6, 2, 5):
        x = case.input[:batch].detach().requires_grad_()
        wanted = [x, *net.parameters()]
        actual, expected = compiled(x), net(x)
        assert actual.stride() == expected.stride()
        assert_equal(actual, expected)
        pairs = zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (actual, expected)), strict=True)
        for gradient, value in pairs:
            assert_equal(gradient, value)


def test_one_graph_of_compiled_autograd_equals_eager():
    case = Case()
    net = Net(case, "sparse")
    expected = torch.autograd.grad(net(case.input).square().sum(), list(net.parameters()))
    with compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        net(case.input).square().sum().backward()
    for parameter, value in zip(net.parameters(), expected, strict=True):
        assert_equal(parameter.grad, value)


def test_exported_with_a_free_batch_equals_eager():
    case = Case(batch=6)
    net = Net(case, "sparse")
    program = torch.export.export(net, (case.input,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert any("masked_conv2d" in str(node.target) for node in program.graph.nodes)
    for batch in (6, 3):
        assert_equal(program.module()(case.input[:batch]), net(case.input[:batch]))


def test_only_the_required_gradients_are_computed():
    case = Case()
    tensors = differentiable_tensors(case, torch.float32)
    for name in DIFFERENTIABLE:
        frozen = {k: v.detach().requires_grad_(k == name) for k, v in tensors.items()}
        with torch.profiler.profile() as profile:
            convolve(case, case.pattern("sparse"), frozen, relu=True).sum().backward()
        calls = {event.key for event in profile.key_averages()}
        assert ("sparse_adv::masked_conv2d_grad_input" in calls) == (name == "input")
        assert ("sparse_adv::masked_conv2d_grad_weight" in calls) == (name in ("weight", "scale"))
        assert frozen[name].grad is not None


@pytest.mark.parametrize("autocast", [False, True])
def test_a_gradient_that_an_op_alone_has_formed_is_known_to_be_masked(autocast):
    mask = torch.rand(4, 2, 3, 3) < 0.5
    pattern = compile_pattern(mask)
    weight = (torch.rand(4, 2, 3, 3) * mask).requires_grad_()
    x, known = torch.rand(2, 2, 5, 5), []
    weight.register_hook(lambda gradient: known.append(is_masked(gradient, pattern.mask)))
    weight.register_hook(lambda gradient: known.append(is_masked(gradient, mask.clone())))

    def total():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return masked_conv2d(x, weight, pattern).sum()

    for others, expected in ((0, True), (weight.sum(), False), (total(), False)):
        (total() + others).backward()
        assert known == [expected, False]
        known.clear()
