"""The tolerances of all tests."""

import torch
from torch import Tensor

# The largest error that a result may have, relative to the largest expected number.
TOLERANCES = {
    # Sums of many products, in any order.
    "reduction": {
        torch.float64: 1e-10,  # 1e-16 per operation, up to thousands of them, and room for BLAS
        torch.float32: 1e-4,  # 6e-8 per operation, up to thousands of them, and cancellation within a sum
        torch.float16: 4e-3,  # 2**-11 for each rounding: of the operands, of the output, of what an epilogue adds
        torch.bfloat16: 3e-2,  # the same with 2**-8
    },
    # A handful of operations per element.
    "elementwise": {
        torch.float64: 1e-14,
        torch.float32: 1e-6,  # a few roundings of 6e-8
        torch.float16: 1e-3,  # one rounding
        torch.bfloat16: 8e-3,  # one rounding
    },
}


def assert_close(actual: Tensor, expected: Tensor, kind: str = "reduction") -> None:
    """Equal up to the tolerance of the coarser dtype of the two; infinities and NaN must agree."""
    tolerance = max(TOLERANCES[kind][tensor.dtype] for tensor in (actual, expected))
    smallest = max(torch.finfo(tensor.dtype).smallest_normal for tensor in (actual, expected))  # below it bits are lost
    actual, expected = actual.double(), expected.double()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * (scale or 1.0) + smallest, equal_nan=True)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    """The same numbers, whatever the dtype."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_dtype=False)
