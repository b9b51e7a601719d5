"""What `doctor` checks on CUDA, with the implementations for CUDA on the CPU: Triton interpreted."""

import pytest
import torch

from sparse_adv import doctor, ops
from sparse_adv.kernels import pgd_step, random_start
from sparse_adv.ops import batch_norm_act_cuda, masked_conv2d_cuda, max_pool2d_cuda
from sparse_adv.ops.masked_conv2d_pattern import block_pattern
from sparse_adv.ops.masked_conv2d_plan import plan_on_cuda

OPS = {
    masked_conv2d_cuda: ("masked_conv2d", "masked_conv2d_grad_input", "masked_conv2d_grad_weight", "pack_values"),
    batch_norm_act_cuda: ("batch_norm_act", "batch_norm_act_grad"),
    max_pool2d_cuda: ("max_pool2d_out", "max_pool2d_grad_input_out"),
    pgd_step: ("pgd_step", "pgd_step_"),
    random_start: ("random_start",),
}


@pytest.fixture
def cuda_on_cpu(monkeypatch):
    """Runs ops on the CPU as on CUDA."""
    compile_pattern = ops.compile_pattern

    def compile(mask, block):
        pattern = compile_pattern(mask, block)
        return block_pattern(pattern) if block == (32, 32) else pattern

    def plan(pattern, input, padding):
        geometry = ((1, 1), (padding, padding), (1, 1))
        return ops.Plan(*(plan_on_cuda(pattern, name, input.shape, input.dtype, *geometry) for name in ops.PASSES))

    monkeypatch.setattr(doctor.ops, "compile_pattern", compile)
    monkeypatch.setattr(doctor.ops, "plan", plan)
    library = torch.library.Library("sparse_adv", "IMPL")
    for module, names in OPS.items():
        for name in names:
            library.impl(name, getattr(module, name), "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")  # that a kernel is overridden
@pytest.mark.parametrize("name", doctor.CHECKS)
def test_the_checks_pass(cuda_on_cpu, name):
    assert doctor.CHECKS[name](doctor.CPU) <= doctor.TOLERANCE[doctor.CPU]
