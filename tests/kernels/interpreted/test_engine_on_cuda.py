"""The engine with its kernels for CUDA, on the CPU: Triton interpreted, plain PyTorch for the fused calls of cuDNN."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import nn

from sparse_adv import engine, masks
from sparse_adv import nn as sparse_nn
from sparse_adv.engine import kernels_cuda, program
from sparse_adv.engine.folding import fold_norms
from sparse_adv.kernels.epilogue import Epilogue
from sparse_adv.ops import set_kernels
from sparse_adv.ops.masked_conv2d_pattern import block_pattern


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(32, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def network(pool: bool) -> nn.Module:
    end = [nn.MaxPool2d(2)] if pool else []
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), Block(32, 1), *end, Block(64, 2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Lets the engine take its CUDA kernels on the CPU; returns the calls of cuDNN and of the Triton kernels."""
    calls: list[str] = []

    def conv_add_relu(x, weight, residual, alpha, bias, *geometry):
        calls.append(f"cudnn conv + {'add + ' if residual.any() else ''}relu")
        return (F.conv2d(x, weight, bias, *geometry) + alpha * residual).relu()

    def count(name, module, function):
        kernel = getattr(module, function)

        def counted(*args):
            bits = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.uint8 for arg in args)
            calls.append(f"{name} {function}{', bits' if bits else ''}")
            return kernel(*args)

        monkeypatch.setattr(module, function, counted)

    on_cpu, fold, gates = sparse_nn.MaskedConv2d.pattern.fget, program.Program.fold, program.buffers.gates
    on_cuda = False

    def pattern(layer):
        """Of blocks for the engine only: a model that runs on the CPU itself needs a pattern of the CPU."""
        compiled = on_cpu(layer)
        return set_kernels(block_pattern(compiled), "sparse", "sparse", "sparse") if on_cuda else compiled

    def as_on_cuda(function):
        def run(*args):
            nonlocal on_cuda
            before, on_cuda = on_cuda, True
            result = function(*args)
            on_cuda = before
            return result

        return run

    monkeypatch.setattr(sparse_nn.MaskedConv2d, "pattern", property(pattern))
    monkeypatch.setattr(program.Program, "fold", as_on_cuda(fold))
    monkeypatch.setattr(program.buffers, "gates", as_on_cuda(gates))
    monkeypatch.setattr(program, "choose_kernels", lambda steps, x: kernels_cuda.CudaKernels(x.dtype))
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", conv_add_relu, raising=False)
    for function in ("forward", "grad_input"):
        count("blocks", kernels_cuda.block_kernels, function)
    for function in ("forward", "backward"):
        count("max pooling", kernels_cuda.max_pool2d, function)
    return calls


@pytest.mark.parametrize("pool", [False, True], ids=["residual", "pooled"])
@pytest.mark.parametrize("density", [None, 0.5], ids=["dense", "blocks"])
def test_logits_and_gradients_equal_those_of_autograd(calls, density, pool):
    torch.manual_seed(0)
    model, x = network(pool), torch.rand(3, 3, 6, 6)  # two tiles of pixels, the second not full
    twin = model
    if density is not None:
        chosen = masks.prune(model, density, block=(32, 32), scope="uniform", linear=False)
        twin = copy.deepcopy(model)
        for name, mask in chosen.items():
            twin.get_submodule(name).weight.data.masked_fill_(~mask, 0)
        model = sparse_nn.sparsify(model, chosen)

    def loss(logits):
        return F.cross_entropy(logits, torch.tensor([1, 0, 4]), reduction="none")

    leaf = x.clone().requires_grad_()
    expected = twin(leaf)
    loss(expected).sum().backward()
    assert not any(line.startswith("autograd") for line in engine.explain(model, x)), engine.explain(model, x)
    with engine.input_gradients(model, x) as gradients:
        calls.clear()
        assert_close(gradients.logits(x), expected.detach())
        assert_close(gradients.gradient(x, loss), leaf.grad)
    of_blocks = {"blocks forward", "blocks forward, bits", "blocks grad_input", "blocks grad_input, bits"}
    fused = {"cudnn conv + relu", "cudnn conv + add + relu"} if density is None else of_blocks
    # The index of max pooling is uint8, too.
    assert set(calls) == fused | ({"max pooling forward, bits", "max pooling backward, bits"} if pool else set())


class Sum(nn.Module):
    """Two convolutions with biases, added without a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return (self.first(x) + self.second(x)).flatten(1)


def test_bias_and_residual_without_a_relu_are_one_pass(calls, monkeypatch):
    model, x, passes, kernel = Sum().eval(), torch.rand(2, 3, 6, 6), [], kernels_cuda.pointwise
    monkeypatch.setattr(kernels_cuda, "pointwise", lambda *args: passes.append(args) or kernel(*args))
    with engine.input_gradients(model, x) as gradients:
        passes.clear()
        assert_close(gradients.logits(x), model(x).detach())
    assert [(bias is not None, residual is not None) for _, _, bias, residual, *_ in passes] == [
        (True, False),
        (True, True),
    ]


def test_gates_follow_the_kernels_of_new_masks(calls, monkeypatch):
    torch.manual_seed(0)
    model, x = network(pool=True), torch.rand(3, 3, 6, 6)
    programs, request = [], set_kernels
    for kernel, gates in (("dense", 0), ("sparse", 5), ("dense", 0)):
        monkeypatch.setitem(
            globals(), "set_kernels", lambda pattern, *_, kernel=kernel: request(pattern, *[kernel] * 3)
        )
        model = sparse_nn.sparsify(model, masks.prune(model, 0.5, block=(32, 32), scope="uniform", linear=False))
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        with engine.input_gradients(model, x) as gradients:
            assert_close(gradients.gradient(x, lambda logits: logits.square().sum(1)), leaf.grad)
            assert len(gradients._memory.gates) == gates
        programs.append(gradients)
    assert programs[0] is programs[1] is programs[2]


def test_the_gates_of_a_pass_are_not_where_another_pass_writes(calls, monkeypatch):
    """A replay of one, beside another thread's pass, would overwrite them."""
    torch.manual_seed(0)
    written: list[torch.Tensor] = []

    def note(module):
        kernel = module.forward

        def noted(*args):
            written.extend(arg for arg in args if isinstance(arg, torch.Tensor) and arg.dtype == torch.uint8)
            return kernel(*args)

        monkeypatch.setattr(module, "forward", noted)

    note(kernels_cuda.block_kernels)
    note(kernels_cuda.max_pool2d)
    model, x = network(pool=True), torch.rand(3, 3, 6, 6)
    model = sparse_nn.sparsify(model, masks.prune(model, 0.5, block=(32, 32), scope="uniform", linear=False))
    with engine.input_gradients(model, x) as gradients:
        written.clear()
        for _ in range(2):
            gradients.gradient(x, lambda logits: logits.sum(1))
    assert len(written) == 2 * 6 == len({tensor.data_ptr() for tensor in written})


@pytest.mark.parametrize("channels", [16, 12])  # whole bytes of bits, and others
def test_gates_of_steps_without_a_convolution(calls, channels):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, channels, 3),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3),
    ]
    model, x = nn.Sequential(*layers, nn.Flatten()).eval(), torch.rand(2, 3, 10, 10)
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    with engine.input_gradients(model, x) as gradients:
        assert_close(gradients.gradient(x, lambda logits: logits.square().sum(1)), leaf.grad)
        assert len(gradients._memory.gates) == (channels == 16)


@pytest.mark.parametrize("flag", ["algorithms", "cudnn"])
def test_deterministic_algorithms_are_not_left_to_the_fused_calls_of_cudnn(calls, monkeypatch, flag):
    """PyTorch passes `deterministic=False` to cuDNN in these, whatever its flags say."""
    torch.manual_seed(0)
    model, x = network(pool=False), torch.rand(3, 3, 8, 8)
    if flag == "cudnn":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    leaf = x.clone().requires_grad_()
    expected = model(leaf)
    expected.square().sum().backward()
    with engine.input_gradients(model, x) as gradients:
        assert_close(gradients.logits(x), expected.detach())
        assert_close(gradients.gradient(x, lambda logits: logits.square().sum(1)), leaf.grad)
    assert isinstance(gradients, program.Program) and not calls


def test_a_layer_that_cudnn_cannot_fuse_takes_two_calls_and_the_others_one(calls, monkeypatch):
    torch.manual_seed(0)
    model, x, fused = network(pool=False), torch.rand(3, 3, 8, 8), torch.ops.aten.cudnn_convolution_add_relu

    def refusing(x, *operands):
        if x.shape[1] == 3:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return fused(x, *operands)

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", refusing)
    with engine.input_gradients(model, x) as gradients:
        calls.clear()
        assert_close(gradients.logits(x), model(x).detach())
    assert isinstance(gradients, program.Program)
    assert calls.count("cudnn conv + relu") == 2 and calls.count("cudnn conv + add + relu") == 2


def test_lists_of_a_strided_gradient_are_made_once_in_an_attack(calls, monkeypatch):
    torch.manual_seed(0)
    model, x, made, select = network(pool=False), torch.rand(2, 3, 6, 6), [], kernels_cuda.select_phases

    def selected(*operands):
        made.append(max(operands[3]))
        return select(*operands)

    def loss(logits):
        return logits.square().sum(1)

    monkeypatch.setattr(kernels_cuda, "select_phases", selected)
    for density in (0.7, 0.4):
        model = sparse_nn.sparsify(model, masks.prune(model, density, block=(32, 32), scope="uniform"))
        with engine.input_gradients(model, x) as gradients:
            first = gradients.gradient(x, loss)
            count = len(made)
            assert torch.equal(gradients.gradient(x, loss), first) and len(made) == count
        leaf = x.clone().requires_grad_()
        loss(model(leaf)).sum().backward()
        assert_close(first, leaf.grad)
        made.clear()
        with engine.input_gradients(model, x):
            assert sorted(stride for stride in made if stride > 1) == [2, 2]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("backward", ["sparse", "dense"])
@pytest.mark.parametrize("forward", ["sparse", "dense"])
def test_only_passes_of_cudnn_have_a_dense_weight(forward, backward, stride):
    torch.manual_seed(0)
    mask = (torch.rand(2, 2, 3, 3) < 0.6).repeat_interleave(32, 0).repeat_interleave(32, 1)
    layer = sparse_nn.MaskedConv2d(64, 64, 3, stride, 1, mask=mask, block=(32, 32))
    norm = nn.BatchNorm2d(64).eval()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    x = torch.randn(2, 64, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    pattern = set_kernels(block_pattern(layer.pattern), forward, backward)
    convolution = kernels_cuda.BlockConvolution(layer, x.shape, kernels_cuda.CudaKernels(torch.float32), pattern)
    assert [convolution.kernel(way) for way in ("forward", "grad_input")] == [forward, backward]
    (folded,) = fold_norms([norm], torch.float32)
    convolution.fold(folded)
    expected = norm(layer(x))
    grad = torch.randn(expected.shape).contiguous(memory_format=torch.channels_last)
    expected.backward(grad)
    assert_close(convolution.forward(x.detach(), Epilogue(), None), expected.detach())
    assert_close(convolution.grad_input(grad, Epilogue(), None), x.grad)
    assert (convolution.weight.data_ptr() == layer.weight.data_ptr()) == (forward == backward == "sparse")
