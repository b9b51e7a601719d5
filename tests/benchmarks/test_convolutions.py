"""The masked convolutions of the benchmarks: their least work, and that a wrong side is noticed."""

import itertools

import pytest
import torch
from convolutions import Layer, MaskedConvolution, least_work, random_mask

from sparse_adv import ops


@pytest.mark.parametrize(("size", "stride", "padding"), [((5, 4), 1, 1), ((6, 7), 2, 1), ((4, 4), 2, 0)])
def test_the_least_work_is_counted_tap_by_tap(size, stride, padding):
    mask = random_mask((4, 3, 3, 3), (2, 1), 0.4)
    height, width = ((length + 2 * padding - 3) // stride + 1 for length in size)
    macs = sum(
        0 <= y * stride - padding + r < size[0] and 0 <= x * stride - padding + s < size[1]
        for _, _, r, s in mask.nonzero().tolist()
        for y, x in itertools.product(range(height), range(width))
    )
    elements = 2 * 3 * size[0] * size[1] + 2 * 4 * height * width + int(mask.sum())
    assert least_work(mask, (2, 3, *size), stride, padding) == (2 * macs, 4 * elements)


def test_the_least_work_of_a_large_layer_is_exact():
    """Counts beyond what float32 represents: with 4 x 4 pixels and padding, the rows of taps meet 3 + 4 + 3 rows."""
    macs, _ = least_work(torch.ones(512, 512, 3, 3, dtype=torch.bool), (64, 512, 4, 4))
    assert macs == 64 * 512**2 * 10**2


@pytest.mark.parametrize("layer", [Layer(16, 8, 6, 2), Layer(8, 16, 7, 3, 3, 2), Layer(16, 8, 4, 2, 1)], ids=str)
def test_all_sides_of_a_pass_return_the_same(layer):
    convolution = MaskedConvolution(layer, (4, 4), 0.5)
    for name in ops.PASSES:
        case = convolution.case(name, {})
        ours, *dense = (side() for side in case.sides.values())
        assert case.sides.keys() == {"ours", *case.rivals} and len(dense) == 2
        for rival in dense:
            rival = rival * convolution.mask if name == "grad_weight" else rival
            torch.testing.assert_close(ours, rival, rtol=1e-3, atol=1e-3)


def test_a_wrong_result_of_ours_is_noticed():
    convolution = MaskedConvolution(Layer(8, 8, 6, 2), (1, 1), 0.5)
    convolution.check()
    convolution.weight = convolution.weight.clone()
    convolution.weight[convolution.mask] += 1  # the packed values stay as they were
    with pytest.raises(AssertionError):
        convolution.check()
