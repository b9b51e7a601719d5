"""Networks by name."""

import pytest
import torch
from torch import nn

from sparse_adv import models
from sparse_adv.models.normalize import Normalize


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_network_takes_its_input_shape_and_gives_class_scores(name):
    model = models.build(name).eval()
    images = torch.rand(3, *models.find(name).input_shape)
    assert model(images).shape == (3, 10)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_network_normalises_inside(name):
    assert any(isinstance(module, Normalize) for module in models.build(name).modules())


def test_normalize_gives_mean_zero_and_deviation_one_per_channel():
    images = torch.rand(50, 3, 8, 8) * torch.tensor([0.2, 0.5, 1.0]).view(3, 1, 1)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    out = Normalize(mean.tolist(), std.tolist())(images)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3))


def test_the_seed_decides_the_weights_and_the_global_random_state_stays():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (models.build("digits_cnn", seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv2.weight"], other["conv2.weight"])


def test_digits_cnn_is_wide_enough_for_sparse_kernels():
    widths = [module.out_channels for module in models.build("digits_cnn") if isinstance(module, nn.Conv2d)]
    assert widths == [64, 128, 128]


def test_an_unknown_network_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r'"resnet9".*digits_cnn'):
        models.build("resnet9")
