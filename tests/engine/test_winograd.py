"""Dense 3 x 3 layers by Winograd's filtering: which, and that gradients stay those of autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.convolution_cases import block_mask
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import engine, masks, models
from sparse_adv.engine.fastest_kernel import is_faster_in_nchw, takes_live_filters, winograd_tile
from sparse_adv.engine.kernels_cpu import DenseWinogradConvolution, MaskedWinogradConvolution, NchwConvolution
from sparse_adv.engine.steps import ConvolutionStep
from sparse_adv.engine.trained_convolution import TrainedConvolution
from sparse_adv.nn import sparsify


def program_of(model, x):
    program = engine.Program(model, x)
    program.fold()
    filtered = [
        step._convolution.tile
        for step in program.steps
        if isinstance(step, ConvolutionStep) and isinstance(step._convolution, DenseWinogradConvolution)
    ]
    return program, filtered


def trained_statistics(name, **options):
    """A network whose BatchNorms have statistics of noise."""
    torch.manual_seed(0)
    model = models.build(name, **options)
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(16, 3, 32, 32))
    return model.eval()


def assert_equals_autograd(program, model, x):
    """Logits and gradients, against those in float64."""
    y = torch.randint(0, 10, (len(x),))

    def loss(logits):
        return F.cross_entropy(logits, y.to(logits.device), reduction="none")

    exact = engine.Autograd(model.double())
    expected, logits = exact.gradient(x.double(), loss), exact.logits(x.double())
    assert (program.logits(x) - logits).norm() <= 1e-5 * logits.norm()
    # A ReLU whose input is nearly 0 may open in one of the two alone.
    assert (program.gradient(x, loss) - expected).norm() <= 1e-2 * expected.norm()
    assert (program.gradient(x, loss).sign() == expected.sign()).double().mean() > 0.998
    assert (program.logits(x[:3]) - logits[:3]).norm() <= 1e-5 * logits.norm()


def test_it_is_explained_beside_the_other_kernels():
    model, x = models.build("resnet18", width=32).eval(), torch.rand(16, 3, 32, 32)
    kept = masks.prune(model, density=0.05, scope="uniform")
    sparsify(model, {name: mask for name, mask in kept.items() if name.startswith("layer1")})
    lines = {name: line for name, _, line in (line.partition(": ") for line in engine.explain(model, x))}
    assert lines["layer1_0_conv1"] == "convolution + BatchNorm + ReLU [sparse]"
    assert lines["layer2_0_conv1"] == "convolution + BatchNorm + ReLU [dense]"  # of stride 2
    assert lines["layer2_1_conv2"] == "convolution + BatchNorm + residual + ReLU [Winograd]"
    sparsify(model, {"layer1.0.conv1": torch.ones_like(kept["layer1.0.conv1"])})
    line = next(line for line in engine.explain(model, x) if line.startswith("layer1_0_conv1"))
    assert line.endswith("[Winograd]"), line


@pytest.mark.parametrize("name, density", [("resnet18", 0.9), ("vgg16", 1.0), ("preact_resnet18", 1.0)])
def test_gradients_are_those_of_autograd(name, density):
    model = trained_statistics(name, width=16)
    if density < 1:
        sparsify(model, masks.prune(model, density=density, block=(1, 1)))
    x = torch.rand(16, 3, 32, 32)
    program, filtered = program_of(model, x)
    assert set(filtered) == {2, 4} and len(filtered) >= 6
    assert_equals_autograd(program, model, x)


@pytest.mark.parametrize(
    "layer, shape",
    {
        "1 x 1": (nn.Conv2d(64, 64, 1), (64, 64, 8, 8)),
        "5 x 5": (nn.Conv2d(64, 64, 5, padding=2), (64, 64, 8, 8)),
        "stride": (nn.Conv2d(64, 64, 3, 2, 1), (64, 64, 8, 8)),
        "dilation": (nn.Conv2d(64, 64, 3, padding=2, dilation=2), (64, 64, 8, 8)),
        "groups": (nn.Conv2d(64, 64, 3, padding=1, groups=2), (64, 64, 8, 8)),
        "circular": (nn.Conv2d(64, 64, 3, padding=1, padding_mode="circular"), (64, 64, 8, 8)),
        "wide padding": (nn.Conv2d(64, 64, 3, padding=3), (64, 64, 8, 8)),
        "few channels": (nn.Conv2d(3, 64, 3, padding=1), (64, 3, 32, 32)),
        "few images": (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 8, 8)),
        "one pixel": (nn.Conv2d(64, 64, 3, padding=1), (256, 64, 1, 1)),
    }.values(),
)
def test_other_layers_are_left_to_onednn(layer, shape):
    assert winograd_tile(layer, shape) is None


@pytest.mark.parametrize("size, tile", [(2, 2), (3, 4), (4, 4), (5, 2), (6, 2), (7, 4), (8, 4), (9, 4), (32, 4)])
def test_tiles_that_multiply_least_are_chosen(size, tile):
    assert winograd_tile(nn.Conv2d(16, 16, 3, padding=1), (1024, 16, size, size)) == tile


def test_float64_and_nchw_are_left_to_onednn():
    model = trained_statistics("resnet18", width=16)
    x = torch.rand(16, 3, 32, 32)
    assert not program_of(model.double(), x.double())[1]
    model = model.float()
    sparsify(model, masks.prune(model, density=0.1, block=(4, 4), scope="uniform"))
    assert not program_of(model, x)[1]


@pytest.mark.parametrize("block, low, high", [((1, 1), 0.2, 0.3), ((2, 2), 0.3, 0.4), ((4, 4), 0.3, 0.5)])
def test_masked_layers_are_filtered_where_that_is_faster(block, low, high):
    x = torch.rand(16, 3, 32, 32)
    for density, is_sparse in ((low, True), (high, False)):
        model = trained_statistics("resnet18", width=16)
        sparsify(model, masks.prune(model, density=density, block=block, scope="uniform"))
        assert (not program_of(model, x)[1]) == is_sparse


def test_wide_layers_of_few_pixels_run_in_nchw():
    torch.manual_seed(0)
    wide = nn.Conv2d(256, 256, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.ReLU(), wide, nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
    x = torch.rand(4, 3, 4, 4)
    model(x)
    program, _ = program_of(model.eval(), x)
    kinds = [type(step._convolution) for step in program.steps if isinstance(step, ConvolutionStep)]
    assert kinds[-1] is NchwConvolution
    assert_equals_autograd(program, model, x)


def test_images_in_channels_last_stay_so_in_training():
    layer = nn.Conv2d(256, 256, 3, padding=1)
    x = torch.rand(4, 256, 4, 4, requires_grad=True)
    formats = []
    handle = layer.register_forward_pre_hook(lambda layer, args: formats.append(args[0].is_contiguous()))
    y = TrainedConvolution(layer)(x.contiguous(memory_format=torch.channels_last))
    handle.remove()
    assert formats == [True] and y.is_contiguous(memory_format=torch.channels_last)
    grad = torch.rand_like(y)
    given = torch.autograd.grad(y, [x, layer.weight], grad)
    plain = torch.autograd.grad(layer(x), [x, layer.weight], grad)
    for actual, expected in zip(given, plain, strict=True):
        torch.testing.assert_close(actual, expected)


def test_other_layers_stay_in_channels_last():
    layer = nn.Conv2d(256, 256, 3, padding=1)
    assert is_faster_in_nchw(layer, (4, 256, 4, 4)) and not is_faster_in_nchw(layer, (4, 256, 8, 8))
    assert not is_faster_in_nchw(layer, (4, 256, 1, 1))
    assert not is_faster_in_nchw(nn.Conv2d(128, 256, 3, padding=1), (4, 128, 4, 4))
    assert not is_faster_in_nchw(nn.Conv2d(256, 256, 1), (4, 256, 4, 4))
    assert not is_faster_in_nchw(nn.Conv2d(256, 256, 3, 2, 1), (4, 256, 8, 8))
    assert not is_faster_in_nchw(layer, (1, 256, 4, 4)) and not is_faster_in_nchw(layer.double(), (4, 256, 4, 4))


def live_filtered(model, x):
    """A program, and the names of the layers whose live filters it transforms."""
    program = engine.Program(model, x)
    program.fold()
    steps = [step for step in program.steps if isinstance(step, ConvolutionStep)]
    return program, [step.name for step in steps if isinstance(step._convolution, MaskedWinogradConvolution)]


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "preact_resnet18"])
@pytest.mark.parametrize("block", [(4, 4, 3, 3), (1, 1, 3, 3)])
def test_gradients_of_networks_without_whole_filters_are_those_of_autograd(name, block):
    model = trained_statistics(name, width=32)
    sparsify(model, masks.prune(model, density=0.2, block=block, scope="uniform"))
    x = torch.rand(8, 3, 32, 32)
    program, filtered = live_filtered(model, x)
    assert len(filtered) >= 6
    assert_equals_autograd(program, model, x)


def test_live_filters_follow_the_weights_and_the_mask():
    model = trained_statistics("resnet18", width=32)
    sparsify(model, masks.prune(model, density=0.2, block=(1, 1, 3, 3), scope="uniform"))
    x = torch.rand(16, 3, 32, 32)
    program, filtered = live_filtered(model, x)
    layer = model.layer1[0].conv1
    with torch.no_grad():
        layer.weight.mul_(2)
    program.fold()
    assert (program.logits(x) - model(x)).norm() <= 1e-5 * model(x).norm()
    layer.set_mask(layer.weight_mask.flip(0))
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight))
    program.fold()
    assert filtered and (program.logits(x) - model(x)).norm() <= 1e-5 * model(x).norm()


WHOLE = (1, 1, 3, 3)


@pytest.mark.parametrize(
    "channels, density, block, shape, taken",
    {
        "whole filters": (64, 0.1, WHOLE, (64, 64, 8, 8), True),
        "whole filters of 4 x 4 channels": (64, 0.6, (4, 4, 3, 3), (64, 64, 8, 8), True),
        "too many for single ones": (64, 0.5, WHOLE, (64, 64, 8, 8), False),
        "single weights": (64, 0.1, (1, 1), (64, 64, 8, 8), False),
        "single weights, dense enough for live filters": (64, 0.5, (4, 4), (64, 64, 8, 8), False),
        "few channels": (16, 0.1, WHOLE, (64, 16, 8, 8), False),
        "few tiles": (64, 0.1, WHOLE, (4, 64, 8, 8), False),
        "2 x 2 pixels": (64, 0.1, WHOLE, (64, 64, 2, 2), False),
        "nothing": (64, 0.0, WHOLE, (64, 64, 8, 8), False),
    }.values(),
)
def test_layers_that_take_live_filters(channels, density, block, shape, taken):
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    mask = block_mask((channels, channels, 3, 3), block, density)
    model = sparsify(nn.Sequential(layer), {"0": mask}, block)
    assert takes_live_filters(model[0], shape) == taken


def test_other_dtypes_and_strides_take_no_live_filters():
    model = trained_statistics("resnet18", width=32)
    sparsify(model, masks.prune(model, density=0.2, block=WHOLE, scope="uniform"))
    x = torch.rand(16, 3, 32, 32)
    assert not any(name.startswith(("layer2_0_conv1", "conv1")) for name in live_filtered(model, x)[1])
    assert not live_filtered(model.double(), x.double())[1]


class CountedOps(TorchDispatchMode):
    """Counts the calls of this library's ops."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("sparse_adv::winograd"):
            name = name.removeprefix("sparse_adv::winograd_conv2d")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padding", [1, "same"])
def test_an_update_takes_it_in_all_passes(padding):
    torch.manual_seed(0)
    model, exact = models.build("resnet18", width=16), models.build("resnet18", width=16).double()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1):
            layer.padding = padding if layer.kernel_size == (3, 3) else 0
    exact.load_state_dict(model.state_dict())
    x, y = torch.rand(16, 3, 32, 32), torch.randint(0, 10, (16,))
    with CountedOps() as counted:
        loss = F.cross_entropy(engine.fuse_for_training(model, x)(x), y)
        loss.backward()
    assert counted.counts == {"": 2 * 13, "_grad_weight": 13}  # forward and gradient of the input
    expected = F.cross_entropy(exact(x.double()), y)
    expected.backward()
    assert abs(loss.item() - expected.item()) <= 1e-5 * expected.item()
    for own, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert (own.grad - other.grad).norm() <= 1e-2 * other.grad.norm().clamp_min(1e-3)


@pytest.mark.parametrize("change", ["hook", "float64", "subclass", "autocast"])
def test_convolutions_that_do_more_are_left_as_they_are(change):
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    convolution = (Doubled if change == "subclass" else nn.Conv2d)(16, 16, 3, padding=1)
    model, x = nn.Sequential(convolution, nn.BatchNorm2d(16), nn.ReLU()), torch.rand(16, 16, 8, 8)
    called = []
    if change == "hook":
        convolution.register_forward_hook(lambda *_: called.append(True))
    if change == "float64":
        model, x = model.double(), x.double()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"), CountedOps() as counted:
        out = engine.fuse_for_training(model, x)(x)
        expected = model(x)
    assert not counted.counts and (change != "hook" or called)
    rounding = torch.finfo(expected.dtype).eps if change == "autocast" else 1e-5  # bfloat16 is rounded at other places
    assert (out - expected).abs().max() <= rounding * expected.abs().max()


def test_strided_convolutions_of_few_channels_get_the_pixels_they_read():
    """oneDNN's AVX2 kernel of their weights' gradient overwrites other memory where one of both is channels_last."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8)
    ).to(memory_format=torch.channels_last)
    strides = []
    conv2d, twin, x = F.conv2d, copy.deepcopy(model).double(), torch.rand(20, 3, 32, 32)
    factors = torch.rand(20, 8, 16, 16)  # the sum of squares behind a BatchNorm would have no gradient

    def watched(input, weight, *args):
        strides.append((weight.shape[2], args[1:2]))
        return conv2d(input, weight, *args)

    fused = engine.fuse_for_training(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "conv2d", watched)
        for _ in range(20):
            model.zero_grad()
            out = fused(x)
            (out * factors).sum().backward()
    assert {stride for size, stride in strides if size == 1} == {()}
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = twin(x.double())
    (expected * factors).sum().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    ours, exact = model[2].weight.grad.double(), twin[2].weight.grad
    assert (ours - exact).norm() <= 1e-3 * exact.norm()
