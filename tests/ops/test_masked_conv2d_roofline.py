"""The roofline model that chooses between live blocks and the dense convolution on a GPU."""

import pytest

from sparse_adv.ops.masked_conv2d_roofline import Pass, blocks_are_faster


def conv3x3(channels: int, size: int, density: float, batch: int = 512, element_bytes: int = 2) -> Pass:
    """Stride 1."""
    elements, weights = channels * size**2, 9 * channels**2
    return Pass(batch, elements, elements, size**2, weights, round(density * weights), element_bytes)


@pytest.mark.parametrize("layer", [(256, 8), (512, 4), (320, 16), (640, 8)])
def test_wide_layers_take_the_block_kernels(layer):
    assert blocks_are_faster(conv3x3(*layer, 0.1)) and blocks_are_faster(conv3x3(*layer, 0.2), gradient_of_weight=True)


def test_a_layer_bound_by_memory_takes_cudnn_for_every_mask():
    """1x1 convolutions of images with few channels: only fewer channels would reduce their cost."""
    few = Pass(512, 64 * 1024, 64 * 1024, 1024, 64 * 64, 64, 2)
    assert not blocks_are_faster(few)


def test_a_layer_faster_than_the_minimum_kernel_time_takes_cudnn():
    assert not blocks_are_faster(conv3x3(256, 8, 0.1, batch=2))


@pytest.mark.parametrize("density", [0.6, 0.9, 1.0])
def test_dense_masks_take_cudnn(density):
    assert not blocks_are_faster(conv3x3(512, 4, density))


def test_less_density_never_turns_a_gain_into_a_loss():
    gains = [blocks_are_faster(conv3x3(640, 8, density / 20)) for density in range(21)]
    assert gains == sorted(gains, reverse=True) and gains[0]
