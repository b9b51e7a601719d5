"""The roofline that chooses between live blocks and the dense convolution, and what lists and header carry to it."""

import pytest
import torch
from helpers.convolution_cases import block_mask

from sparse_adv.ops import compile_pattern, masked_conv2d_cuda, set_kernels
from sparse_adv.ops.masked_conv2d_pattern import BlockPattern, CsrPattern, block_pattern
from sparse_adv.ops.masked_conv2d_roofline import Pass, blocks_are_faster


def work(channels: int, size: int, density: float, batch: int = 512, element_bytes: int = 2) -> Pass:
    """A 3x3 convolution of stride 1."""
    elements, weights = channels * size**2, 9 * channels**2
    return Pass(batch, elements, elements, size**2, weights, round(density * weights), element_bytes)


@pytest.mark.parametrize("layer", [(256, 8), (512, 4), (320, 16), (640, 8)])
def test_wide_layers_take_their_blocks(layer):
    assert blocks_are_faster(work(*layer, 0.1)) and blocks_are_faster(work(*layer, 0.2), gradient_of_weight=True)


def test_a_layer_bound_by_memory_takes_cudnn_whatever_the_mask():
    """1x1 convolutions and images of few channels: only removing channels moves what they cost."""
    few = Pass(512, 64 * 1024, 64 * 1024, 1024, 64 * 64, 64, 2)
    assert not blocks_are_faster(few)


def test_a_layer_below_the_launch_latency_takes_cudnn():
    assert not blocks_are_faster(work(256, 8, 0.1, batch=2))


@pytest.mark.parametrize("density", [0.6, 0.9, 1.0])
def test_dense_masks_take_cudnn(density):
    assert not blocks_are_faster(work(512, 4, density))


def test_less_density_never_turns_a_gain_into_a_loss():
    gains = [blocks_are_faster(work(640, 8, density / 20)) for density in range(21)]
    assert gains == sorted(gains, reverse=True) and gains[0]


def test_a_pattern_of_blocks_knows_its_block_and_paths():
    mask = block_mask((128, 64, 3, 3), (64, 32), 0.3)
    plain = compile_pattern(mask, (64, 32))
    pattern = block_pattern(plain)
    assert isinstance(pattern, BlockPattern) and isinstance(plain, CsrPattern)
    assert pattern.block == (64, 32, 1, 1) and pattern.nonzeros == int(mask.count_nonzero())
    choose = masked_conv2d_cuda.chosen_paths
    geometry = ([512, 64, 16, 16], (1, 1), (1, 1), (1, 1))
    for path, expected in {"dense": [2, 2, 2], "sparse": [1, 1, 1]}.items():
        assert choose(set_kernels(pattern, path, path, path).flatten(), *geometry) == expected
    assert choose(set_kernels(plain, "sparse", "sparse", "sparse").flatten(), *geometry) == [2, 2, 2]


def test_without_triton_blocks_take_the_dense_path_and_one_line_says_so(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)
    masked_conv2d_cuda._triton.cache_clear()
    pattern = block_pattern(compile_pattern(block_mask((64, 64, 3, 3), (32, 32), 0.3), (32, 32)))
    x = torch.rand(2, 64, 5, 5)
    try:
        for _ in range(2):
            masked_conv2d_cuda.masked_conv2d(
                x, torch.rand(64, 64, 3, 3), pattern.flatten(), None, (1, 1), (1, 1), (1, 1), 1, None, None, False
            )
    finally:
        masked_conv2d_cuda._triton.cache_clear()
    assert [record.getMessage()[:46] for record in caplog.records] == ["block masks take the dense convolution: Triton"]
