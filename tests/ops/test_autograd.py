"""Gradients of ops that are registered here, where PyTorch computes what they saved again."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_adv import ops

WEIGHT = torch.randn(16, 16, 3, 3)
PATTERN = ops.compile_pattern((torch.rand(16, 16, 1, 1) < 0.5).expand(16, 16, 3, 3).contiguous())
OPS = {
    "masked_conv2d": lambda x: ops.masked_conv2d(x, WEIGHT, PATTERN, padding=1),
    "winograd_conv2d": lambda x: ops.winograd_conv2d(x, WEIGHT, padding=1),
    "batch_norm_act": lambda x: ops.batch_norm_act(x, torch.ones(16), torch.zeros(16), residual=x, relu=True),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_an_op_may_end_what_is_checkpointed(name, reentrant):
    """Its backward pass asks for the saved tensors first, and has PyTorch compute them again, with autograd."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)

    def region(x):
        return OPS[name](torch.tanh(x * 2))

    inputs = [x] if name == "batch_norm_act" else [x, WEIGHT.requires_grad_()]
    gradients = []
    for run in (region, partial(checkpoint, region, use_reentrant=reentrant)):
        run(x).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
        for tensor in inputs:
            tensor.grad = None
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)
