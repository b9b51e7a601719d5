"""The roofline model that chooses between live blocks and the dense convolution on a GPU."""

import json
from pathlib import Path

import pytest

from sparse_adv.ops.masked_conv2d_roofline import PassSizes, blocks_are_faster

ROWS = json.loads((Path(__file__).parents[2] / "benchmarks/results/gpu_h100.json").read_text())["rows"]


def conv3x3(channels: int, size: int, density: float, batch: int = 512, block: int = 64) -> PassSizes:
    """Stride 1, bfloat16."""
    elements, weights = channels * size**2, 9 * channels**2
    sides = (channels, channels), (block, block)
    return PassSizes(batch, elements, elements, size**2, weights, round(density * weights), 2, *sides)


@pytest.mark.parametrize("layer", [(256, 8), (512, 4), (320, 16), (640, 8)])
def test_wide_layers_take_the_block_kernels(layer):
    assert blocks_are_faster(conv3x3(*layer, 0.1)) and blocks_are_faster(conv3x3(*layer, 0.1), gradient_of_weight=True)


def test_a_layer_bound_by_memory_takes_cudnn_for_every_mask():
    """1x1 convolutions of images with few channels: only fewer channels would reduce their cost."""
    few = PassSizes(512, 64 * 1024, 64 * 1024, 1024, 64 * 64, 64, 2, (64, 64), (64, 64))
    assert not blocks_are_faster(few)


def test_a_layer_faster_than_the_minimum_kernel_time_takes_cudnn():
    for gradient in (False, True):
        assert not blocks_are_faster(conv3x3(256, 8, 0.1, batch=2), gradient)


@pytest.mark.parametrize("density", [0.6, 0.9, 1.0])
def test_dense_masks_take_cudnn(density):
    for gradient in (False, True):
        assert not blocks_are_faster(conv3x3(512, 4, density), gradient)


@pytest.mark.parametrize("gradient", [False, True])
def test_less_density_never_turns_a_gain_into_a_loss(gradient):
    gains = [blocks_are_faster(conv3x3(640, 8, density / 20), gradient) for density in range(21)]
    assert gains == sorted(gains, reverse=True) and gains[0]


def test_no_row_measured_on_an_h100_takes_block_kernels_that_were_slower():
    gains = {False: [], True: []}
    for row in ROWS:
        if row["op"] != "masked_conv2d" or row["block"] == "1x1":
            continue
        channels, size = map(int, row["layer"].split("@"))
        cost = conv3x3(channels, size, row["kept"], row["batch"], int(row["block"].split("x")[0]))
        taken = blocks_are_faster(cost, gradient_of_weight=row["pass"] == "grad_weight")
        assert row["ratio"] > 0.98 or not taken, row
        if row["ratio"] > 1.02:
            gains[taken].append((row["ratio"], row["pass"]))
    assert len(gains[True]) + len(gains[False]) == 111
    # What is given up are gradients of weights, for which the model is cautious.
    assert len(gains[False]) == 9 and {name for _, name in gains[False]} == {"grad_weight"}
    assert max(gains[False])[0] < 1.5
