"""No op keeps memory of a call: a step of an attack is called millions of times in a training run."""

import ctypes
import gc
from collections.abc import Callable, Iterator

import pytest
import torch

from sparse_adv import ops

CALLS = 4000
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")

IMAGES, GRAD, CLEAN = torch.rand(3, 2, 4, 8, 8)
WEIGHT, VECTOR, SEED = torch.randn(4, 4, 3, 3), torch.rand(4), torch.tensor([1, 2])
OUT, GATE = torch.empty_like(IMAGES), ops.empty_gate(IMAGES)
POOLED, INDEX = torch.empty(2, 4, 4, 4), torch.empty(2, 4, 4, 4, dtype=torch.uint8)
FILTERS = ops.compile_pattern(torch.eye(4).bool()[..., None, None].expand(4, 4, 3, 3), (1, 1, 3, 3))
LIVE = ops.masked_winograd_conv2d_weight(WEIGHT, FILTERS)


def pattern(kernel: str) -> ops.Pattern:
    kernels = dict.fromkeys(("forward", "grad_input", "grad_weight"), kernel)
    return ops.set_kernels(ops.compile_pattern(WEIGHT > 0), **kernels)


def both_passes(kernel: str) -> Callable[[], object]:
    masked, images, weight = pattern(kernel), IMAGES.clone().requires_grad_(), WEIGHT.clone().requires_grad_()

    def run() -> object:
        output = ops.masked_conv2d(images, weight, masked, padding=1, bias=VECTOR, scale=VECTOR, relu=True)
        return torch.autograd.grad(output, (images, weight), GRAD)

    return run


SPARSE = pattern("sparse")
OPS: dict[str, Callable[[], object]] = {
    **{
        f"pgd_step {norm}": lambda n=norm: ops.pgd_step(IMAGES, GRAD, CLEAN, alpha=0.1, eps=0.1, norm=n)
        for norm in ("linf", "l2")
    },
    "pgd_step_": lambda: ops.pgd_step_(OUT, GRAD, CLEAN, alpha=0.1, eps=0.1),
    "pgd_step_normalized": lambda: ops.pgd_step_normalized(IMAGES, GRAD, CLEAN, VECTOR, VECTOR, alpha=0.1, eps=0.1),
    **{
        f"random_start {norm}": lambda n=norm: ops.random_start(CLEAN, 0.1, norm=n, seed=SEED)
        for norm in ("linf", "l2")
    },
    "masked_conv2d sparse": both_passes("sparse"),
    "masked_conv2d dense": both_passes("dense"),
    "masked_conv2d_out": lambda: ops.masked_conv2d_out(
        IMAGES, WEIGHT, SPARSE, padding=1, relu=True, out=OUT, gate_out=GATE
    ),
    "masked_conv2d_grad_input_out": lambda: ops.masked_conv2d_grad_input_out(
        GRAD, WEIGHT, SPARSE, padding=1, gate=GATE, out=OUT
    ),
    "winograd_conv2d": lambda: ops.winograd_conv2d(IMAGES, WEIGHT),
    "winograd_conv2d_weight": lambda: ops.winograd_conv2d_weight(WEIGHT),
    "masked_winograd_conv2d_out": lambda: ops.masked_winograd_conv2d_out(IMAGES, LIVE, out=OUT),
    "pointwise_out": lambda: ops.pointwise_out(IMAGES, VECTOR, VECTOR, relu=True, out=OUT, gate_out=GATE),
    "max_pool2d_out": lambda: ops.max_pool2d_out(IMAGES, 2, out=POOLED, index=INDEX),
    "max_pool2d_grad_input_out": lambda: ops.max_pool2d_grad_input_out(POOLED, INDEX, 2, out=OUT),
    "batch_norm_act": lambda: ops.batch_norm_act(IMAGES, VECTOR, VECTOR, relu=True),
    "pack_pattern": lambda: ops.pack_pattern(SPARSE, WEIGHT.relu()),
    "plan": lambda: ops.plan(SPARSE, IMAGES, padding=1),
}


class MallocInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@pytest.fixture
def bytes_in_use() -> Iterator[Callable[[], int]]:
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("this C library does not tell what is allocated: glibc does from 2.33 on")
    library.mallinfo2.restype = MallocInfo
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def in_use() -> int:
        gc.collect()
        info = library.mallinfo2()
        return info.uordblks + info.hblkhd

    yield in_use
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", OPS)
def test_a_call_keeps_no_memory(name, bytes_in_use):
    op = OPS[name]
    calls = CALLS // 8 if "masked_conv2d " in name else CALLS  # these call autograd
    for _ in range(calls // 4):
        op()
    before = bytes_in_use()
    for _ in range(calls):
        op()
    assert bytes_in_use() - before < 8 * calls


def test_no_op_takes_a_string():
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("sparse_adv::")]
    assert len(schemas) > 10
    for schema in schemas:
        assert not any("str" in str(argument.type) for argument in schema.arguments), schema
