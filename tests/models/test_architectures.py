"""Networks: published sizes, module names, initialisation, and that copying, tracing, pruning and seeding work."""

import copy
import pickle

import pytest
import torch

from sparse_adv import data, masks, models
from sparse_adv.models import Normalize
from sparse_adv.nn import densify, sparsify

PUBLISHED_PARAMETERS = {
    "resnet18": 11_173_962,
    "vgg16": 14_987_722,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "vgg16_kuangliu": 14_728_266,
    "preact_resnet18": 11_172_170,  # with BatchNorm before the pooling
    "preact_resnet18_kuangliu": 11_171_146,
    "preact_resnet18_wong": 11_172_170,
    "wrn-70-16-silu": 266_796_506,
    "wrn-34-10": 46_160_474,
    "wrn-28-10": 36_479_194,
    "wrn-22-10": 26_797_914,
    "wrn-16-10": 17_116_634,
    "wrn-10-10": 7_435_354,
    "wrn-34-1": 466_714,
}
NAMES = (
    "resnet18",
    "resnet50",
    "vgg16",
    "vgg16_hydra",
    "preact_resnet18",
    "preact_resnet18_robustbench",
    "wrn-10-2",
    "wrn-10-2-silu",
    "digits_cnn",
)


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_number_of_parameters_is_the_published_one(name):
    with torch.device("meta"):
        model = models.build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 17)])
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("silu")])
def test_networks_take_any_image_size_and_can_be_pickled_copied_and_traced(name, shape):
    model = models.build(name, width=4, classes=7, input_shape=shape).eval()
    images = torch.rand(2, *shape)
    logits = model(images)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.fx.symbolic_trace(model)):
        assert other(images).equal(logits)


@pytest.mark.parametrize("name", NAMES)
def test_networks_can_be_sparsified_trained_and_densified(name):
    model = models.build(name, width=4)
    images = torch.rand(4, *models.find(name).input_shape)
    sparsify(model, masks.prune(model, 0.5, score="relative_magnitude", linear=True))
    model(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    sparse_logits = model(images)
    torch.testing.assert_close(densify(model)(images), sparse_logits, rtol=1e-4, atol=1e-5)


def test_weights_depend_on_the_seed_and_the_global_random_state_does_not_change():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second, other = (models.build("resnet18", seed, width=4) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(before)
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.conv1.weight.equal(other.conv1.weight)


def test_width_scales_all_channels():
    narrow, wide = (models.build("resnet18", width=width).state_dict() for width in (4, 8))
    assert narrow["layer4.1.conv2.weight"].shape[:2] == (32, 32) and wide["layer4.1.conv2.weight"].shape[:2] == (64, 64)
    assert models.build("wrn-10-3", width=4).layer3[0].conv1.out_channels == 4 * 3 * 4


def test_resnet18_has_the_module_names_of_torchvision():
    keys = models.build("resnet18", width=4).state_dict().keys()
    assert {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "fc.bias"} <= keys


def test_convolutions_of_resnets_are_initialised_with_he_fan_out():
    for name in ("resnet18", "preact_resnet18"):
        weight = models.build(name, width=16).layer3[0].conv1.weight  # 32 channels in, 64 out
        assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)


def test_vgg16_is_initialised_as_in_the_code_of_the_boosting_ticket_paper():
    layers = list(models.build("vgg16", width=16).modules())
    norms = [layer for layer in layers if isinstance(layer, torch.nn.BatchNorm2d)]
    assert len(norms) == 13 and all((norm.weight == 0.5).all() for norm in norms)
    hidden, last = (layer for layer in layers if isinstance(layer, torch.nn.Linear))
    assert hidden.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert (hidden.bias == 0).all() and (last.bias == 0).all()


def test_every_stage_but_the_first_halves_the_resolution():
    for name, stages in (("resnet18", 4), ("preact_resnet18", 4), ("wrn-10-1", 3)):
        model, sizes = models.build(name, width=4), []
        for i in range(stages):
            getattr(model, f"layer{i + 1}").register_forward_hook(
                lambda module, args, output, sizes=sizes: sizes.append(output.shape[-1])
            )
        model(torch.rand(2, 3, 32, 32))
        assert sizes == [32, 16, 8, 4][:stages]


@pytest.mark.parametrize("stage", ["layer1", "layer2"])
def test_residual_blocks_compute_the_formulas_of_their_papers(stage):
    x, relu = torch.randn(2, 4, 6, 6), torch.relu
    basic, preact = (getattr(models.build(name, width=4), stage)[0] for name in ("resnet18", "preact_resnet18"))
    y = relu(basic.bn1(basic.conv1(x)))
    shortcut = basic.downsample(x) if basic.downsample else x
    assert basic(x).equal(relu(basic.bn2(basic.conv2(y)) + shortcut))
    y = relu(preact.bn1(x))
    shortcut = preact.downsample(y) if preact.downsample else x
    assert preact(x).equal(preact.conv2(relu(preact.bn2(preact.conv1(y)))) + shortcut)


def test_normalize_uses_the_statistics_of_the_data_set_or_else_one_half_and_one_quarter():
    layer = Normalize.of("cifar10", 3)
    assert layer(layer.mean.expand(1, 3, 2, 2)).abs().max() == 0
    assert torch.allclose(layer((layer.mean + layer.std).expand(1, 3, 2, 2)), torch.ones(1, 3, 2, 2))
    assert Normalize.of("mnist", 1).mean.item() == pytest.approx(0.1307)
    assert Normalize.of("holiday pictures", 3).mean.flatten().tolist() == [0.5] * 3
    assert Normalize.of("cifar10", 1).mean.flatten().tolist() == [0.5]


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ("mnist", (0.1307,), (0.3081,)),
        ("fashion_mnist", (0.2860,), (0.3530,)),
    ],
)
def test_the_statistics_of_a_data_set_are_the_published_ones(name, mean, std):
    layer = models.build("resnet18", width=2, input_shape=(len(mean), 8, 8), data=name).normalize
    assert layer.mean.flatten().tolist() == pytest.approx(mean) and layer.std.flatten().tolist() == pytest.approx(std)


def test_the_statistics_of_the_digits_are_those_of_their_images():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    images, layer = data.to_unit(data.load("digits").train.images), models.build("digits_cnn").normalize
    assert layer.mean.item() == pytest.approx(images.mean().item(), abs=2e-3)
    assert layer.std.item() == pytest.approx(images.std().item(), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, 'there is no architecture "resnet19" .did you mean "resnet18"'),
        ("wrn-30-10", {}, "the depth D of wrn-D-K must be 4 plus a multiple of 6 .* got 30"),
        ("wrn-28-0", {}, "the factor K of wrn-D-K must be at least 1, got 0"),
        ("wrn-28-x", {}, "wrn-28-10"),
        ("wrn-10-2-silu", {"input_shape": (3, 33, 32)}, r"sides are multiples of 4, got \[33, 32\]"),
        ("resnet18", {"width": 0}, "width must be an integer of at least 1, got 0"),
        ("resnet18", {"classes": 0}, "classes must be an integer of at least 1, got 0"),
        ("vgg16", {"input_shape": (1, 8, 8)}, "at least 16 x 16 pixels, got 8 x 8"),
        ("vgg16", {"input_shape": (3, 32, 8)}, "at least 16 x 16 pixels, got 32 x 8"),
        ("vgg16", {"input_shape": (3, 8, 32)}, "at least 16 x 16 pixels, got 8 x 32"),
        ("vgg16_kuangliu", {"input_shape": (3, 28, 28)}, "halves images five times: .* at least 32 x 32 pixels"),
        ("resnet18", {"input_shape": (32, 32)}, r"input_shape must be \[C, H, W\], each at least 1, got \[32, 32\]"),
    ],
)
def test_invalid_arguments_raise_an_error_that_names_them(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.build(name, **options)


def test_a_normalisation_by_integers_computes_in_floating_point():
    layer = models.Normalize(mean=[0, 1], std=[1, 2])
    assert layer.mean.dtype == layer.std.dtype == torch.float32
    assert layer(torch.full((1, 2, 1, 1), 0.5)).flatten().tolist() == [0.5, -0.25]
