"""Properties of every device: tested on the CPU, and on a GPU if there is one (`benchmarks/gpu_check.sh`)."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.convolution_cases import LAYOUTS, Case, block_mask, cases
from helpers.moved_images import assert_moved_alike, step_images
from helpers.tolerances import assert_close, assert_equal
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.models import build
from sparse_adv.nn import MaskedConv2d, frozen_weights, sparsify
from sparse_adv.ops import (
    batch_norm_act,
    compile_pattern,
    cuda_ops,
    masked_conv2d,
    max_pool2d_grad_input_out,
    max_pool2d_out,
    pack_pattern,
    pgd_step,
    pgd_step_,
    pgd_step_normalized,
    random_start,
    reference,
)
from sparse_adv.ops.pgd_step import NORMS

OPS = torch.ops.sparse_adv
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
examples = settings(max_examples=100, suppress_health_check=[HealthCheck.differing_executors])


# The convolution. Integers are exact in float32 and in TF32, but not in every algorithm that cuDNN may choose.


@examples
@given(cases())
def test_every_pass_equals_the_reference(device, case):
    expected = case.expected()
    actual = case.on(device).results(case.pattern())
    for name in expected:
        assert actual[name].device.type == device.type
        assert_close(actual[name].cpu(), expected[name])
    assert (actual["grad_weight"][~case.mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_other_dtypes(device, dtype, layout):
    case = Case(layout=layout, weight_layout=layout, seed=15)
    expected = case.expected()
    for name in ("input", "weight", "grad_output"):
        vars(case)[name] = getattr(case, name).to(dtype)
    vars(case)["epilogue"] = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.epilogue.items()}
    for name, actual in case.on(device).results(case.pattern()).items():
        assert actual.dtype == dtype
        assert_close(actual.cpu(), expected[name])


WIDE = {
    "3x3": Case(3, 1, 70, 96, (7, 9), block=(32, 32)),
    "strided, with an epilogue": Case(2, 1, 64, 128, (9, 8), stride=(2, 2), block=(64, 64), density=0.5, seed=15),
    "dilated groups": Case(2, 2, 32, 64, (9, 11), dilation=(2, 1), block=(64, 32), layout="channels_last"),
    "1x1": Case(4, 1, 100, 40, (4, 4), (1, 1), padding=(0, 0), block=(32, 64), density=0.7),
    "nothing kept": Case(2, 1, 64, 64, (5, 5), block=(32, 32), density=0.0, seed=2),
    "no images": Case(0, 1, 64, 64, (5, 5), block=(32, 32)),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blocks_with_triton_kernels(device, name, dtype):
    case = copy.deepcopy(WIDE[name])
    expected = case.expected()
    for tensor in ("input", "weight", "grad_output"):
        vars(case)[tensor] = getattr(case, tensor).to(dtype)
    vars(case)["epilogue"] = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in case.epilogue.items()}
    pattern = case.on(device).pattern("sparse")
    unpacked = case.results(pattern)
    vars(case)["weight"] = case.weight.where(case.mask, 0)
    for actual in (unpacked, case.results(pack_pattern(pattern, case.weight))):
        for pass_, value in actual.items():
            assert_close(value.cpu(), expected[pass_])
        assert (actual["grad_weight"][~case.mask] == 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", ["masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_of_the_convolution_on_cuda(op, layout):
    """test_masked_conv2d_gradients.py has those of the CPU."""
    device = torch.device("cuda")
    case = Case(layout=layout, stride=(2, 1)).on(device)
    tensors = case.pattern().flatten()
    input, weight, grad = (t.clone().requires_grad_() for t in (case.input, case.weight, case.grad_output))
    channels = torch.randn(2, case.output_size[1], device=device)
    calls = {
        "masked_conv2d": (input, weight, tensors, channels[0], *case.shape, channels[1], case.grad_output, True),
        "masked_conv2d_grad_input": (grad, weight, tensors, list(case.input_size), *case.shape),
        "masked_conv2d_grad_weight": (grad, input, tensors, *case.shape),
    }
    torch.library.opcheck(getattr(OPS, op).default, calls[op])


def test_gradients_of_gradients(device):
    case = Case(2, 1, 3, 4, (5, 4), stride=(2, 1)).on(device)
    pattern = case.pattern()
    tensors = [t.double().requires_grad_() for t in (case.input, case.weight, torch.randn(4, device=device))]

    def convolve(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_conv2d(input, weight, pattern, bias, *case.shape, relu=False)

    assert torch.autograd.gradcheck(convolve, tensors) and torch.autograd.gradgradcheck(convolve, tensors)


def test_a_compiled_layer(device):
    layer = MaskedConv2d(8, 16, 3, padding=1, mask=block_mask((16, 8, 3, 3), (1, 1), 0.3)).to(device)
    x = torch.randn(2, 8, 9, 9, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), layer(x))


def test_autocast_computes_in_its_dtype_and_casts_frozen_weights_once(device):
    layer = MaskedConv2d(8, 16, 3, padding=1, mask=block_mask((16, 8, 3, 3), (1, 1), 0.3)).to(device)
    x = torch.randn(2, 8, 9, 9, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
        with frozen_weights(layer):
            assert_close(layer(x), y)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), layer(x).detach().bfloat16())


def test_training_keeps_pruned_weights_at_zero(device):
    model = build("digits_cnn").to(device)
    masks = {name: block_mask(tuple(m.weight.shape), (1, 1), 0.2) for name, m in model.named_modules() if conv(m)}
    sparsify(model, {name: mask.to(device) for name, mask in masks.items()})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    x, y = torch.rand(16, 1, 8, 8, device=device), torch.arange(16, device=device) % 10
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(attacks.pgd(model, x, y, eps=0.1, alpha=0.05, steps=2)), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, mask in masks.items():
        assert (model.get_submodule(name).weight.cpu()[~mask] == 0).all()
    model.eval()
    assert_close(copy.deepcopy(model)(x), model(x))


def conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def test_a_packed_pattern(device):
    case = Case().on(device)
    weight = case.weight.where(case.mask, 0)
    packed = pack_pattern(compile_pattern(case.mask), weight)
    assert_close(masked_conv2d(case.input, weight, packed, None, *case.shape).cpu(), case.expected()["forward"].cpu())


# The ops of attacks give the same numbers on every device.


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 7, 9), (2, 3, 64, 64), (1, 1), (0, 3, 4, 4), (3, 20000)])
def test_the_step_gives_the_numbers_of_the_cpu(device, shape, dtype, norm):
    adv, grad, clean = step_images(shape, dtype)
    grad = grad.to(dtype)
    expected = pgd_step(adv, grad, clean, alpha=0.1, eps=0.2, norm=norm)
    on_device = [t.to(device) for t in (adv, grad, clean)]
    for actual in (
        pgd_step(*on_device, alpha=0.1, eps=0.2, norm=norm),
        pgd_step_(on_device[0].clone(), *on_device[1:], alpha=0.1, eps=0.2, norm=norm),
    ):
        assert_moved_alike(actual.cpu(), expected, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", ["contiguous", "channels_last"])
def test_the_step_takes_any_layout(device, layout, other, norm):
    adv, grad, clean = step_images((3, 3, 8, 6), torch.float32)
    expected = pgd_step(adv, grad, clean, alpha=0.1, eps=0.2, norm=norm)
    adv, grad, clean = (t.to(device) for t in (adv, grad, clean))
    adv, clean, grad = LAYOUTS[layout](adv), LAYOUTS[layout](clean), LAYOUTS[other](grad)
    assert_moved_alike(pgd_step(adv, grad, clean, alpha=0.1, eps=0.2, norm=norm).cpu(), expected, norm)
    assert_moved_alike(pgd_step_(adv, grad, clean, alpha=0.1, eps=0.2, norm=norm).cpu(), expected, norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_the_step_takes_any_alignment_and_gradient(device, grad_dtype, offset, norm):
    tensors = step_images((4, 333), torch.float32)
    expected = pgd_step(*tensors, alpha=0.1, eps=0.2, norm=norm)
    memory = [torch.empty(t.numel() + offset, device=device) for t in tensors]
    adv, grad, clean = (m[offset:].view(t.shape).copy_(t) for m, t in zip(memory, tensors, strict=True))
    actual = pgd_step(adv, grad.to(grad_dtype), clean, alpha=0.1, eps=0.2, norm=norm)
    if norm == "linf" or grad_dtype in (torch.float32, torch.float64):
        assert_moved_alike(actual.cpu(), expected, norm)
    else:
        assert_moved_alike(
            actual.cpu(),
            pgd_step(tensors[0], tensors[1].to(grad_dtype), tensors[2], alpha=0.1, eps=0.2, norm=norm),
            norm,
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other"])
def test_the_start_gives_the_numbers_of_the_cpu(device, layout, dtype, norm):
    clean, seed = torch.rand(5, 3, 7, 9).to(dtype), torch.tensor([-(2**60), 2**40])
    expected = random_start(clean, 0.3, norm=norm, seed=seed)
    actual = random_start(LAYOUTS[layout](clean.to(device)), 0.3, norm=norm, seed=seed.to(device))
    if dtype == torch.float64:  # an FMA may round otherwise
        assert_close(actual.cpu(), expected, "elementwise")
    else:
        assert_moved_alike(actual.cpu(), expected, norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_the_normalised_step(device, layout, grad_dtype):
    adv, grad, clean = step_images((3, 2, 8, 6), torch.float32)
    mean, std = torch.tensor([[0.5, 0.3], [0.2, 0.25]])
    expected = reference.pgd_step_normalized(adv, grad, clean, mean, std, 0.1, 0.2)
    adv, clean = (LAYOUTS[layout](t.to(device)) for t in (adv, clean))
    moved, normalized = pgd_step_normalized(
        adv, grad.to(device, grad_dtype), clean, mean.to(device), std.to(device), alpha=0.1, eps=0.2
    )
    assert_equal(moved.cpu(), expected[0])
    assert_equal(normalized.cpu(), expected[1])
    assert normalized.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck_of_the_attacks_ops(device, norm):
    adv, grad, clean = (t.to(device) for t in step_images((2, 3, 5, 4), torch.float32))
    numbers = (0.1, 0.2, norm == "l2", 0.0, 1.0)
    torch.library.opcheck(OPS.pgd_step.default, (adv, grad, clean, *numbers))
    torch.library.opcheck(OPS.pgd_step_.default, (adv, grad, clean, *numbers))
    statistics = torch.rand(2, 3, device=device)
    images = (adv.to(memory_format=torch.channels_last), grad, clean)
    torch.library.opcheck(OPS.pgd_step_normalized.default, (*images, *statistics, 0.1, 0.2, 0.0, 1.0))
    seed = torch.tensor([1, 2], device=device)
    torch.library.opcheck(OPS.random_start.default, (clean, seed, 0.3, norm == "l2", 0.0, 1.0))


STEP, START = (0.1, 0.2, False, 0.0, 1.0), (0.3, False, 0.0, 1.0)
UNSAFE: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a gradient of other sizes": lambda x, seed: OPS.pgd_step(x, x[:1], x, *STEP),
    "clean images of other sizes": lambda x, seed: OPS.pgd_step_(x, x, x[..., :2], *STEP),
    "whole numbers": lambda x, seed: OPS.pgd_step(x.long(), x, x, *STEP),
    "a short seed": lambda x, seed: OPS.random_start(x, seed[:1], *START),
    "a seed of floats": lambda x, seed: OPS.random_start(x, seed.double(), *START),
    "a start of whole numbers": lambda x, seed: OPS.random_start(x.long(), seed, *START),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_native_ops_refuse_unsafe_arguments(device, name):
    if device.type == "cuda" and not cuda_ops().startswith("CUDA C++"):
        pytest.skip("the CUDA C++ ops are not built: torch has no CUDA, or there was no nvcc")
    x, seed = torch.rand(2, 3, 4, 4, device=device), torch.tensor([1, 2], device=device)
    before = x.clone()
    with pytest.raises(RuntimeError, match="sparse_adv: "):
        UNSAFE[name](x, seed)
    assert x.equal(before)  # and the device still answers


def test_a_generator_of_the_device_gives_reproducible_starts(device):
    clean = torch.rand(4, 3, 8, 8, device=device)
    generator = torch.Generator(device)
    first, second, again = (random_start(clean, 0.1, seed=generator.manual_seed(seed)) for seed in (1, 2, 1))
    assert first.equal(again) and not first.equal(second)


# BatchNorm in training, and max pooling.


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 64, 8, 8), (3, 37, 5, 7)], ids=["even", "odd"])
def test_batch_norm_act_equals_the_reference(device, shape, dtype, layout):
    input, residual, grad = (LAYOUTS[layout](torch.randn(shape).to(dtype)) for _ in range(3))
    weight, bias = torch.rand(shape[1], dtype=torch.promote_types(dtype, torch.float32)), torch.randn(shape[1])
    narrow = {"input": input, "weight": weight, "bias": bias.to(weight), "residual": residual}
    wide = {name: tensor.double() for name, tensor in narrow.items()}
    # An element that is rounded to another side of 0 would pass its gradient in one and not in the other.
    grad = grad.where(reference.batch_norm_act(**wide, relu=False).abs() > 1e-2, 0)
    results = []
    for function, operands in (
        (batch_norm_act, {k: v.to(device) for k, v in narrow.items()}),
        (reference.batch_norm_act, wide),
    ):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in operands.items()}
        running = {name: torch.zeros_like(leaves["bias"]) for name in ("running_mean", "running_var")}
        out = function(**leaves, **{name: tensor.detach() for name, tensor in running.items()})
        results.append(
            [out.detach(), *running.values(), *torch.autograd.grad(out, list(leaves.values()), grad.to(out))]
        )
    for actual, expected in zip(*results, strict=True):
        assert actual.device.type == device.type
        assert_close(actual.cpu(), expected, "reduction")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 64, 8, 8), (3, 5, 7, 9)])
def test_max_pooling(device, shape, layout):
    x, residual = (LAYOUTS[layout](torch.randn(shape)) for _ in range(2))
    expected, indices = F.max_pool2d(x, 2, return_indices=True)
    grad = torch.randn_like(expected)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    wanted = backward(grad, x, (2, 2), (2, 2), (0, 0), (1, 1), False, indices) + residual
    x, residual, grad = x.to(device), residual.to(device), LAYOUTS[layout](grad).to(device)
    out, index, grad_input = torch.empty_like(grad), torch.empty_like(grad, dtype=torch.uint8), torch.empty_like(x)
    max_pool2d_out(x, (2, 2), out=out, index=index)
    max_pool2d_grad_input_out(grad, index, (2, 2), residual=residual, out=grad_input)
    assert_equal(out.cpu(), expected)
    assert_close(grad_input.cpu(), wanted, "elementwise")


# CUDA graphs.


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_draws_new_numbers_in_each_replay_and_the_same_after_a_reset_of_its_seed():
    clean = torch.rand(8, 3, 32, 32, device="cuda")
    adv, words = clean.clone(), torch.tensor([5, 0], device="cuda")
    grad, blocks = torch.randn_like(clean), torch.tensor([0, (clean.numel() + 3) // 4], device="cuda")

    def attack() -> None:
        adv.copy_(random_start(clean, 0.1, seed=words))
        pgd_step_(adv, grad, clean, alpha=0.01, eps=0.1)
        words.add_(blocks)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attack()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attack()
    results = []
    for offset in (0, None, 0):
        if offset is not None:
            words[1] = offset
        graph.replay()
        results.append(adv.clone())
    assert not results[0].equal(results[1]) and results[0].equal(results[2])
    expected = pgd_step(random_start(clean, 0.1, seed=torch.tensor([5, 0])), grad, clean, alpha=0.01, eps=0.1)
    assert results[0].equal(expected)
