"""Convolutions that oneDNN, which PyTorch calls on the CPU, gets wrong: the op computes them in another way."""

import pytest
import torch
import torch.nn.functional as F

from sparse_adv import ops

CASES = [  # images, weight, stride, padding, dilation, groups
    ((8, 1, 5, 1), (16, 1, 3, 3), (1, 4), (1, 2), (2, 1), 1),
    ((2, 1, 3, 1), (16, 1, 3, 2), (1, 2), (2, 1), (1, 1), 1),
    ((2, 12, 3, 1), (4, 3, 1, 1), (1, 3), (0, 2), (1, 4), 4),
    ((8, 4, 4, 1), (1, 4, 1, 1), (2, 2), (3, 3), (2, 2), 1),
    ((8, 2, 1, 1), (16, 1, 3, 3), (3, 2), (1, 2), (1, 1), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_convolutions_at_which_onednn_fails_are_right(case, dtype):
    """It reads memory that nobody wrote, or ends the process, in channels_last."""
    size, filters, stride, padding, dilation, groups = case
    draw, geometry = torch.Generator().manual_seed(0), (stride, padding, dilation, groups)
    x, weight = torch.randn(size, generator=draw).to(dtype), torch.randn(filters, generator=draw).to(dtype)
    bias = torch.randn(filters[0], generator=draw).to(dtype)
    leaves = [tensor.double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv2d(*leaves, bias.double(), *geometry)
    grad = torch.randn(expected.shape, generator=draw).to(dtype)
    expected_gradients = torch.autograd.grad(expected, leaves, grad.double())
    pattern = ops.compile_pattern(torch.ones(filters, dtype=torch.bool), groups=groups)
    near = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.2}
    last = torch.channels_last
    for x_last, weight_last in ((False, False), (False, True), (True, False), (True, True)):
        own = [x.to(memory_format=last) if x_last else x, weight.to(memory_format=last) if weight_last else weight]
        for _ in range(5):
            junk = [torch.full((count,), 7e3) for count in (64, 256, 1024, 4096, 20_000)]
            del junk
            inputs = [tensor.detach().requires_grad_() for tensor in own]
            out = ops.masked_conv2d(*inputs, pattern, bias, *geometry)
            torch.testing.assert_close(out.double(), expected, **near)
            for found, wanted in zip(torch.autograd.grad(out, inputs, grad), expected_gradients, strict=True):
                torch.testing.assert_close(found.double(), wanted, **near)
