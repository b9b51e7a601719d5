"""Size and memory layout of outputs, compared with PyTorch's convolution."""

import torch
from helpers.convolution_cases import LAYOUTS, cases
from hypothesis import given

from sparse_adv.kernels.layout import in_layout_of, output_size


@given(cases())
def test_the_size_of_an_output_equals_that_of_torch(case):
    assert output_size(case.image, case.filter, case.stride, case.padding, case.dilation) == case.output_size[2:]


def test_channels_last_stays_channels_last_and_other_layouts_become_nchw():
    images = torch.rand(2, 3, 4, 5)
    for name, change in LAYOUTS.items():
        expected = torch.channels_last if name == "channels_last" else torch.contiguous_format
        assert in_layout_of(change(images), images).is_contiguous(memory_format=expected)
