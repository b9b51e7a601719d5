"""The convolution and its gradient into given memory: values, gates, aliases, layouts, dtypes, errors."""

import pytest
import torch
from helpers.convolution_cases import Case, cases, integers
from helpers.tolerances import assert_equal
from helpers.written_passes import check_forward, check_grad_input, random_gate
from hypothesis import given, settings
from torch import Tensor

from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.ops import (
    compile_pattern,
    empty_gate,
    gate_to_bool,
    masked_conv2d_grad_input_out,
    masked_conv2d_out,
    pack_pattern,
    reference,
)

KERNELS = ("sparse", "auto", "dense")
FORMATS = (torch.contiguous_format, torch.channels_last)
BLOCKS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (1, 1, 3, 3))
IMAGES = ((7, 7), (14, 14), (28, 28), (5, 3), (4, 4), (32, 32))


def check_case(case: Case, kernel: str) -> None:
    """Both passes; the residual and the activation are chosen by the seed."""
    residual = ("none", "out", "another tensor")[case.seed % 3]
    check_forward(case, case.pattern(kernel), residual, relu=case.seed % 2 == 0)
    check_grad_input(case, case.pattern(kernel), residual, gated=case.seed % 2 == 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_passes_equal_the_reference(kernel):
    @settings(max_examples=200 if kernel == "sparse" else 50)
    @given(cases())
    def check(case: Case) -> None:
        check_case(case, kernel)

    check()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_and_image_equals_the_reference(block, image, layout):
    for seed, (batch, stride, density) in enumerate([(1, 2, 0.1), (3, 1, 1.0), (16, 1, 0.1), (33, 2, 0.0)]):
        case = Case(batch, 1, 13, 10, image, stride=(stride, stride), block=block, density=density, layout=layout)
        vars(case)["weight"] = case.weight.where(case.mask, 0)
        pattern = pack_pattern(case.pattern("sparse"), case.weight)
        residual = ("none", "out", "another tensor")[seed % 3]
        check_forward(case, pattern, residual, relu=True)
        check_grad_input(case, pattern, residual, gated=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("image", "channels"),
    [
        *((image, (20, 13)) for image in [(7, 7), (19, 19), (12, 8), (6, 20), (1, 33), (33, 1), (28, 28), (40, 56)]),
        *((image, (20, 13)) for image in [(9, 37), (5, 70), (2, 131), (1, 300)]),
        ((132, 128), (17, 21)),  # more pixels than the accumulators in the cache
        ((24, 25), (150, 140)),  # more channels than the input tile in the cache
        ((24, 24), (150, 140)),
    ],
    ids=str,
)
def test_single_pixels_in_rows_of_any_length_equal_the_reference(image, channels, gated, layout):
    """Filters of 1 x 1, for which all rows count as one; those of gates are padded to bytes."""
    for seed, block in enumerate(BLOCKS[:-1]):
        case = Case(3, 1, *channels, image, (1, 1), padding=(0, 0), block=block, density=0.4, layout=layout, seed=seed)
        residual = ("none", "out", "another tensor")[seed % 3]
        check_forward(case, case.pattern("sparse"), residual, relu=gated)
        check_grad_input(case, case.pattern("sparse"), residual, gated=gated)
        grad_weight = torch.ops.sparse_adv.masked_conv2d_grad_weight
        actual = grad_weight(case.grad_output, case.input, case.pattern("sparse").flatten(), *case.shape)
        assert_equal(actual, case.expected()["grad_weight"])


@pytest.mark.parametrize("residual", ["none", "out", "another tensor"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("filter", [(3, 3), (1, 1), (5, 4)], ids=str)
@pytest.mark.parametrize("width", [25, 40, 57])
def test_strides_of_wide_rows_equal_the_reference(width, filter, gated, residual):
    """Of NCHW images, columns of even and of odd number are rows of their own then."""
    for stride, block in (((2, 2), (4, 4)), ((1, 2), (1, 1)), ((3, 2), (2, 2))):
        for padding in ((0, 0), (1, 1), (2, 3)):
            case = Case(5, 1, 6, 10, (11, width), filter, stride, padding, block=block)
            check_forward(case, case.pattern("sparse"), residual, relu=gated)
            check_grad_input(case, case.pattern("sparse"), residual, gated=gated)
            actual = case.results(case.pattern("sparse"))["grad_weight"]
            assert_equal(actual, case.expected()["grad_weight"])


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("residual", ["none", "out", "another tensor"])
@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_epilogue_equals_the_reference(kernel, residual, activation, layout):
    for batch, image in ((5, (6, 10)), (17, (4, 4)), (2, (5, 24))):
        case = Case(batch, 2, group_in=5, group_out=6, image=image, layout=layout)
        check_forward(case, case.pattern(kernel), residual, activation)
        check_grad_input(case, case.pattern(kernel), residual, activation)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual", ["none", "out", "another tensor"])
def test_other_dtypes_equal_the_reference(dtype, layout, residual):
    # Sums are integers below 2**8, which bfloat16 represents exactly, so that rounding does not change the gates.
    case = Case(3, group_in=1, image=(7, 9), filter=(1, 3), padding=(0, 1), density=0.7, layout=layout)
    check_forward(case, case.pattern(), residual, True, dtype)
    check_grad_input(case, case.pattern(), residual, True, dtype)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("image", [(9, 11), (16, 16), (4, 4)], ids=str)
def test_the_bits_are_those_of_the_functional_ops(kernel, layout, image):
    case = Case(17, group_in=20, group_out=24, image=image, layout=layout).with_real_numbers()
    input, grads = (in_layout_of(Case(layout=layout).input, x) for x in (case.input, case.grad_output))
    bias, residual = torch.randn(24), in_layout_of(input, torch.randn(case.output_size))
    pattern, ops = case.pattern(kernel), torch.ops.sparse_adv
    expected = ops.masked_conv2d(input, case.weight, pattern.flatten(), bias, *case.shape, None, residual, True)
    out = torch.empty_like(expected)
    masked_conv2d_out(input, case.weight, pattern, bias, *case.shape, residual=residual, relu=True, out=out)
    assert_equal(out, expected)
    expected = ops.masked_conv2d_grad_input(grads, case.weight, pattern.flatten(), case.input_size, *case.shape)
    out = torch.empty_like(expected)
    masked_conv2d_grad_input_out(grads, case.weight, pattern, *case.shape, out=out)
    assert_equal(out, expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("format", FORMATS)
def test_images_of_one_pixel_take_either_layout(kernel, format):
    case = Case(3, image=(4, 4), filter=(4, 4), padding=(0, 0))
    assert case.output_size[2:] == (1, 1)
    input = case.input.contiguous(memory_format=format)
    out, gate = torch.empty(case.output_size), torch.empty(3, 6, 1, 1, dtype=torch.uint8)
    masked_conv2d_out(input, case.weight, case.pattern(kernel), relu=True, out=out, gate_out=gate)
    expected = reference.masked_conv2d(case.input, case.weight, case.mask, relu=True)
    assert_equal(out, expected)
    assert_equal(gate.bool(), expected > 0)
    grad_input = torch.empty_like(input)
    masked_conv2d_grad_input_out(case.grad_output, case.weight, case.pattern(kernel), out=grad_input)
    assert_equal(grad_input, case.expected()["grad_input"])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_empty_batch_writes_nothing(kernel, format):
    case = Case(0)
    memory = [torch.ones(1, *size[1:]).to(memory_format=format) for size in (case.output_size, case.input_size)]
    out, grad_input = (image[:0] for image in memory)
    masked_conv2d_out(case.input, case.weight, case.pattern(kernel), None, *case.shape, out=out)
    masked_conv2d_grad_input_out(case.grad_output, case.weight, case.pattern(kernel), *case.shape, out=grad_input)
    assert all(image.eq(1).all() for image in memory)


@pytest.mark.parametrize("kernel", ["sparse", "dense"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_a_network_of_two_layers_gets_the_gradients_of_autograd(kernel, stride, format):
    # y = relu(conv(h) + h[:, :, ::stride, ::stride]) with h = relu(conv(x)): h has two uses.
    first, second = Case(3, 1, 4, 6, seed=1), Case(3, 1, 6, 6, stride=(stride, stride), seed=2)
    x = first.input.double().requires_grad_()
    h = reference.masked_conv2d(x, first.weight.double(), first.mask, None, *first.shape, relu=True)
    skip = h[:, :, ::stride, ::stride]
    y = reference.masked_conv2d(h, second.weight.double(), second.mask, None, *second.shape, residual=skip, relu=True)
    grad_y = integers(*y.shape, seed=3)
    (expected,) = torch.autograd.grad(y, x, grad_y.double())

    def buffer(like: Tensor) -> Tensor:
        return torch.empty(like.shape, memory_format=format)

    images, hidden, output, grad_input = first.input.contiguous(memory_format=format), buffer(h), buffer(y), buffer(x)
    gates = [empty_gate(hidden), empty_gate(output)]
    layers = [(case.weight, case.pattern(kernel)) for case in (first, second)]
    masked_conv2d_out(images, *layers[0], None, *first.shape, relu=True, out=hidden, gate_out=gates[0])
    strided = hidden[:, :, ::stride, ::stride].contiguous(memory_format=format)
    epilogue = {"residual": strided, "relu": True, "out": output, "gate_out": gates[1]}
    masked_conv2d_out(hidden, *layers[1], None, *second.shape, **epilogue)
    grad_output = grad_y.where(gate_to_bool(gates[1], output), 0).contiguous(memory_format=format)
    grad_hidden = torch.zeros_like(hidden)
    grad_hidden[:, :, ::stride, ::stride] = grad_output
    added = {"residual": grad_hidden, "gate": gates[0], "out": grad_hidden}
    masked_conv2d_grad_input_out(grad_output, *layers[1], *second.shape, **added)
    masked_conv2d_grad_input_out(grad_hidden, *layers[0], *first.shape, out=grad_input)
    assert_equal(output, y)
    assert_equal(grad_input, expected)


def test_nan_passes_the_gate_as_in_torch():
    case = Case(2, image=(5, 9), density=1.0)
    case.input[0, 1, 2, 3] = torch.nan
    out = torch.empty(case.output_size)
    gate = empty_gate(out)
    pattern = case.pattern("sparse")
    masked_conv2d_out(case.input, case.weight, pattern, None, *case.shape, relu=True, out=out, gate_out=gate)
    assert out.isnan().any()
    passed = torch.ops.aten.threshold_backward(torch.ones_like(out), out, 0)
    assert_equal(gate_to_bool(gate, out), passed.bool())


def forward_in_threads(count: int, case: Case, images: Tensor) -> tuple[Tensor, Tensor]:
    """The output and its gate."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        out = in_layout_of(images, torch.empty(case.output_size))
        gate, pattern = random_gate(out), case.pattern("sparse")
        masked_conv2d_out(images, case.weight, pattern, None, *case.shape, relu=True, out=out, gate_out=gate)
    finally:
        torch.set_num_threads(before)
    return out, gate


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
@pytest.mark.parametrize("sizes", [(33, 1, 21, 19), (1, 1, 8, 150), (5, 2, 6, 36), (18, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("image", [(17, 23), (64, 12), (4, 4)], ids=str)
def test_results_are_the_same_for_every_number_of_threads(image, sizes, block, layout):
    case = Case(*sizes, image, block=block, layout=layout).with_real_numbers()
    images = in_layout_of(Case(layout=layout).input, case.input)
    once, gate_once = forward_in_threads(1, case, images)
    for count in (1, 2, 5):  # more threads than there are images share the output channels
        out, gate = forward_in_threads(count, case, images)
        assert_equal(gate_to_bool(gate, out), out > 0)
        assert_equal(out, once)
        assert_equal(gate, gate_once)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_opcheck(format, kernel):
    case = Case(2)
    tensors = case.pattern(kernel).flatten()
    input, grads = (x.contiguous(memory_format=format) for x in (case.input, case.grad_output))
    out, residual = torch.zeros_like(grads), torch.ones_like(grads)
    forward = (input, case.weight, tensors, torch.ones(6), *case.shape, residual, True, out, random_gate(out))
    torch.library.opcheck(torch.ops.sparse_adv.masked_conv2d_out, forward)
    out, residual = torch.zeros_like(input), torch.ones_like(input)
    backward = (grads, case.weight, tensors, *case.shape, residual, random_gate(out), out)
    torch.library.opcheck(torch.ops.sparse_adv.masked_conv2d_grad_input_out, backward)


CASE = Case()
OUT = torch.zeros(CASE.output_size)
BAD = {
    "out's size": ({"out": torch.zeros(2, 6, 9, 10)}, r"out must have size \[2, 6, 9, 11\], got \[2, 6, 9, 10\]"),
    "out's dtype": ({"out": OUT.double()}, "out must have the dtype of input, Float, got Double"),
    "out's layout": (
        {"out": OUT.to(memory_format=torch.channels_last)},
        r"out must be NCHW without gaps, as input is, got strides \[594, 1, 66, 6\]",
    ),
    "out with gaps": ({"out": torch.zeros(2, 6, 9, 22)[..., ::2]}, "out must be NCHW without gaps"),
    "input's layout": (
        {"input": CASE.input.to(memory_format=torch.channels_last)},
        "out must be channels_last without gaps, as input is",
    ),
    "input's channels": ({"input": torch.zeros(2, 4, 9, 11)}, "input has 4 channels, the pattern 5"),
    "no pixels": ({"input": torch.zeros(2, 5, 0, 8), "padding": 2}, "input must have pixels, got 0 x 8"),
    "weight": ({"weight": torch.zeros(6, 5, 3, 1)}, r"weight must have size \[6, 5, 3, 3\], got \[6, 5, 3, 1\]"),
    "weight's dtype": ({"weight": CASE.weight.double()}, "weight must have the dtype of .*, Float, got Double"),
    "groups": ({"groups": 2}, "groups is 2, the pattern was compiled for 1"),
    "bias": ({"bias": torch.zeros(5)}, r"bias must have size \[6\], got \[5\]"),
    "residual": ({"residual": torch.zeros(6, 9, 11)}, r"residual must have size \[2, 6, 9, 11\], got \[6, 9, 11\]"),
    "residual's layout": (
        {"residual": OUT.to(memory_format=torch.channels_last)},
        r"residual must have the layout of out, strides \[594, 99, 11, 1\], got \[594, 1, 66, 6\]",
    ),
    "gate's size": (
        {"gate_out": torch.zeros(2, 6, 9, 1, dtype=torch.uint8), "relu": True},
        r"gate_out must have size \[2, 6, 9, 2\], got \[2, 6, 9, 1\]",
    ),
    "gate's dtype": ({"gate_out": empty_gate(OUT).bool(), "relu": True}, "gate_out must be uint8 .*, got Bool"),
    "gate without relu": ({"gate_out": empty_gate(OUT)}, "gate_out receives the bits of the ReLU, but relu is False"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_reported_by_name_and_value(name):
    change, message = BAD[name]
    arguments = {"input": CASE.input, "weight": CASE.weight, "pattern": CASE.pattern(), "padding": 1}
    with pytest.raises(RuntimeError, match=message):
        masked_conv2d_out(**{**arguments, "out": torch.zeros_like(OUT), **change})


def test_bad_arguments_of_the_gradient_are_reported():
    arguments = {"grad_output": OUT, "weight": CASE.weight, "pattern": CASE.pattern(), "padding": 1}
    out = torch.zeros(CASE.input_size)
    with pytest.raises(RuntimeError, match=r"grad_output must have size \[3, 6, 9, 11\], got \[2, 6, 9, 11\]"):
        masked_conv2d_grad_input_out(**arguments, out=torch.zeros(3, 5, 9, 11))
    with pytest.raises(RuntimeError, match="out must be NCHW without gaps, as grad_output is"):
        masked_conv2d_grad_input_out(**arguments, out=out.to(memory_format=torch.channels_last))
    with pytest.raises(RuntimeError, match=r"gate must have size \[2, 5, 9, 2\], got \[2, 6, 9, 2\]"):
        masked_conv2d_grad_input_out(**arguments, out=out, gate=empty_gate(OUT))


def test_memory_that_two_tensors_share_is_refused():
    case = Case(1, group_in=6, group_out=6, density=1.0)
    memory = torch.zeros(2 * OUT[:1].numel())
    input, shifted = memory[:594].view(1, 6, 9, 11), memory[1:595].view(1, 6, 9, 11)
    arguments = (case.weight, case.pattern(), None, 1, 1)
    with pytest.raises(RuntimeError, match="out shares memory with input"):
        masked_conv2d_out(input, *arguments, out=input)
    other = torch.zeros(1, 6, 9, 11)
    with pytest.raises(RuntimeError, match="out shares memory with residual"):
        masked_conv2d_out(other, *arguments, residual=shifted, out=input)
    with pytest.raises(RuntimeError, match="out shares memory with weight"):
        masked_conv2d_out(other, memory[500:824].view(6, 6, 3, 3), *arguments[1:], out=input)
    with pytest.raises(RuntimeError, match="out shares memory with weight"):
        masked_conv2d_grad_input_out(other, memory[500:824].view(6, 6, 3, 3), case.pattern(), padding=1, out=input)


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_a_gate_that_shares_memory_with_an_operand_is_refused(name):
    case = Case(1, group_in=6, group_out=6, density=1.0)
    operands = {"weight": case.weight, "bias": torch.zeros(6), "residual": torch.zeros(1, 6, 9, 11)}
    memory = torch.zeros(1000)
    operands[name] = memory[: operands[name].numel()].view(operands[name].shape)
    out = torch.zeros(1, 6, 9, 11)
    gate = memory.view(torch.uint8)[20 : 20 + empty_gate(out).numel()].view(empty_gate(out).shape)
    with pytest.raises(RuntimeError, match=f"gate_out shares memory with {name}"):
        masked_conv2d_out(out.clone(), pattern=case.pattern(), padding=1, **operands, relu=True, out=out, gate_out=gate)


def test_an_expanded_operand_ends_with_its_last_element():
    """It has fewer bytes than elements times their size: what follows in memory is not its own."""
    case = Case(1, group_in=6, group_out=6, density=1.0)
    memory = torch.ones(2000)
    weight, bias = memory[0].expand(6, 6, 3, 3), memory[1].expand(6)
    out = memory[2 : 2 + 594].view(1, 6, 9, 11)
    masked_conv2d_out(torch.ones(1, 6, 9, 11), weight, case.pattern(), bias, 1, 1, out=out)
    assert out.max() == 6 * 9 + 1


def test_devices_gradients_and_patterns_are_checked_in_python():
    arguments = {
        "input": CASE.input,
        "weight": CASE.weight,
        "pattern": CASE.pattern(),
        "padding": 1,
        "out": OUT.clone(),
    }
    with pytest.raises(ValueError, match="gate_out is on meta, out on cpu"):
        masked_conv2d_out(**arguments, relu=True, gate_out=empty_gate(OUT).to("meta"))
    with pytest.raises(ValueError, match=r"weight requires grad: .* torch.no_grad\(\)"):
        masked_conv2d_out(**{**arguments, "weight": CASE.weight.clone().requires_grad_()})
    with pytest.raises(TypeError, match="pattern must be what compile_pattern returned, got list"):
        masked_conv2d_out(**{**arguments, "pattern": CASE.pattern().flatten()})
    with pytest.raises(TypeError, match="out must be a tensor, got NoneType"):
        masked_conv2d_out(**{**arguments, "out": None})


def test_compiled_functions_write_their_buffers():
    weight = torch.randn(8, 4, 3, 3)
    pattern = compile_pattern(torch.rand(8, 4, 3, 3) < 0.5)
    input = torch.randn(2, 4, 6, 9)

    def run(out: Tensor, gate: Tensor) -> None:
        masked_conv2d_out(input, weight, pattern, None, 1, 1, relu=True, out=out, gate_out=gate)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out, gate = torch.empty(2, 8, 6, 9), torch.empty(2, 8, 6, 2, dtype=torch.uint8)
        function(out, gate)
        results.append((out, gate))
    assert_equal(results[1][0], results[0][0])
    assert_equal(results[1][1], results[0][1])


@pytest.mark.parametrize("image", [(32, 32), (5, 24), (4, 4)], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_images_of_one_channel_go_with_results_of_either_layout(image, backward):
    """Their memory is that of both layouts, so only the result says which one is wanted."""
    case = Case(3, group_in=6 if backward else 1, group_out=1 if backward else 6, image=image)
    op = masked_conv2d_grad_input_out if backward else masked_conv2d_out
    images, size = (case.grad_output, case.input_size) if backward else (case.input, case.output_size)
    expected = case.expected()["grad_input" if backward else "forward"]
    for layout in FORMATS:
        for kernel in ("sparse", "dense"):
            out = torch.empty(size, memory_format=layout)
            arguments = () if backward else (None,)
            op(images, case.weight, case.pattern(kernel), *arguments, *case.shape, out=out)
            assert_equal(out, expected)
