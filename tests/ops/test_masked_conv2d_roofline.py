"""The roofline model that chooses between live blocks and the dense convolution on a GPU."""

import json
from pathlib import Path

import pytest

from sparse_adv.ops.masked_conv2d_roofline import PassSizes, blocks_are_faster

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PASSES = {"h100": ("forward", "grad_input"), "h200": ("forward", "grad_input", "grad_weight")}
"""Those of which the rows of a GPU are of today's kernels."""


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


@pytest.mark.parametrize(("gpu", "taken", "given_up"), [("h100", 84, 0), ("h200", 108, 12)])
def test_no_row_measured_on_a_gpu_takes_block_kernels_that_were_slower(gpu, taken, given_up):
    gains = {False: [], True: []}
    for row in json.loads((RESULTS / f"gpu_{gpu}.json").read_text())["rows"]:
        if row["op"] != "masked_conv2d" or row["block"] == "1x1" or row["pass"] not in PASSES[gpu]:
            continue
        channels, size = map(int, row["layer"].split("@"))
        cost = conv3x3(channels, size, row["kept"], row["batch"], int(row["block"].split("x")[0]))
        is_taken = blocks_are_faster(cost, gradient_of_weight=row["pass"] == "grad_weight")
        assert row["ratio"] > 0.98 or not is_taken, row
        if row["ratio"] > 1.02:
            gains[is_taken].append((row["ratio"], row["pass"]))
    assert (len(gains[True]), len(gains[False])) == (taken, given_up)
    # What is given up are gradients of weights, for which the model is cautious.
    assert all(ratio < 1.51 and name == "grad_weight" for ratio, name in gains[False])
