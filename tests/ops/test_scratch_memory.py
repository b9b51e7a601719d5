"""The memory in which CPU kernels keep intermediate results: none to be had is an error, and no end of the process."""

import subprocess
import sys

import pytest
import torch

from sparse_adv import ops

OUT_OF_MEMORY = """
import resource, torch
from sparse_adv import ops
torch.set_num_threads(1)
def in_use():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
weight = torch.randn(64, 64, 3, 3)
pattern = ops.set_kernels(ops.compile_pattern(torch.rand(64, 64, 3, 3) < 0.1), forward="sparse")
small, large = torch.randn(1, 64, 8, 8), torch.randn(1, 64, 8, 20000)
expected = ops.masked_conv2d(small, weight, pattern, padding=1)
resource.setrlimit(resource.RLIMIT_AS, (in_use() + (45 << 20),) * 2)
try:
    ops.masked_conv2d(large, weight, pattern, padding=1)
except RuntimeError as error:
    print(error)
assert torch.equal(ops.masked_conv2d(small, weight, pattern, padding=1), expected)
"""


def test_after_a_lack_of_memory_a_smaller_batch_is_computed():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bytes of memory for a thread's intermediate results" in done.stdout


MANY_CHANNELS = """
import resource, torch
from sparse_adv import ops
torch.set_num_threads(1)
def in_use():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1])
x, weight = torch.randn(1, 1024, 4, 4), torch.randn(1024, 1024, 3, 3)  # 38 MB, transformed 151 MB
ops.winograd_conv2d(x[:, :32], weight[:32, :32])
resource.setrlimit(resource.RLIMIT_AS, (in_use() + (100 << 20),) * 2)
torch.ops.sparse_adv.winograd_conv2d_grad_weight(x, x, [1, 1], 4)
ops.winograd_conv2d(x, weight)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ops.winograd_conv2d(x, weight)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_winograds_filtering_transforms_parts_of_many_channels_in_memory_that_the_next_call_finds():
    done = subprocess.run([sys.executable, "-c", MANY_CHANNELS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000  # pages of 4 KB; a part takes 14 MB


EXTREME = """
import torch
from sparse_adv import ops
torch.set_num_threads(1)
def in_use():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) >> 10
weight = torch.randn(64, 64, 3, 3)
kernels = dict.fromkeys(("forward", "grad_input", "grad_weight"), "sparse")
sparse = ops.set_kernels(ops.compile_pattern(weight > 1), **kernels)
filters = ops.compile_pattern((torch.rand(64, 64, 1, 1) < 0.1).expand(64, 64, 3, 3), (1, 1, 3, 3))
live = ops.masked_winograd_conv2d_weight(weight, filters)
def call(width):
    x = torch.randn(1, 64, 4, width)
    {call}
call(8)
before = in_use()
call(100_000)
print(in_use() - before)
"""
OPS = {
    "masked_conv2d": "ops.masked_conv2d(x, weight, sparse, padding=1)",
    "its gradient": "torch.ops.sparse_adv.masked_conv2d_grad_weight(x, x, sparse.flatten(), [1, 1], [1, 1], [1, 1], 1)",
    "masked_winograd_conv2d_out": "ops.masked_winograd_conv2d_out(x, live, out=torch.empty_like(x))",
}


@pytest.mark.parametrize("op", OPS)
def test_memory_that_an_extreme_size_took_is_given_back(op):
    done = subprocess.run([sys.executable, "-c", EXTREME.replace("{call}", OPS[op])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60  # MB; an input takes 100, a row of its tiles 300 to 700


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="torch does not tell a library why a call failed")
@pytest.mark.parametrize("kernel", ["sparse", "dense"])
def test_a_lack_of_memory_for_tensors_is_told_as_torch_tells_it(kernel):
    mask = torch.rand(8, 4, 3, 3) < 0.3
    pattern = ops.set_kernels(ops.compile_pattern(mask), forward=kernel)
    images = torch.zeros(1).expand(1 << 30, 4, 1 << 10, 1 << 10)  # 2^54 bytes, more than addresses
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate 18014398509481984 bytes"):
        ops.masked_conv2d(images, torch.randn(mask.shape), pattern)


@pytest.mark.parametrize(
    ("groups", "pixels", "taps", "options"),
    [(1, 64, 1, {"stride": 512}), (2**18, 1, 3, {"padding": 2**20 - 1, "dilation": 2**20 - 1})],
    ids=["many output phases", "an input tile beyond int64"],
)
def test_what_would_take_memory_without_end_is_left_to_the_dense_kernel(groups, pixels, taps, options):
    mask = torch.ones(max(groups, 16), 1 if groups > 1 else 16, taps, taps, dtype=torch.bool)
    pattern = ops.set_kernels(ops.compile_pattern(mask, groups=groups), grad_input="sparse")
    images = torch.empty(1, max(groups, 16), pixels, pixels)
    assert ops.plan(pattern, images, **options).grad_input.kernel == "dense"
