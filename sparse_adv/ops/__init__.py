"""The ops. Importing this package loads the native libraries and registers fake kernels, gradients and autocast."""

from sparse_adv.ops import (  # noqa: F401
    batch_norm_act_cuda,
    masked_conv2d_cuda,
    masked_conv2d_flops,
    masked_conv2d_gradients,
    max_pool2d_cuda,
)
from sparse_adv.ops._library import build_facts, cpu_capability, cuda_ops
from sparse_adv.ops.batch_norm_act import batch_norm_act
from sparse_adv.ops.gate import empty_gate, gate_to_bool
from sparse_adv.ops.masked_conv2d import masked_conv2d
from sparse_adv.ops.masked_conv2d_out import masked_conv2d_grad_input_out, masked_conv2d_out
from sparse_adv.ops.masked_conv2d_pattern import (
    PASSES,
    Pattern,
    compile_pattern,
    pack_pattern,
    set_kernels,
)
from sparse_adv.ops.masked_conv2d_plan import PassPlan, Plan, plan
from sparse_adv.ops.masked_winograd_conv2d import (
    LiveWeight,
    masked_winograd_conv2d_out,
    masked_winograd_conv2d_weight,
)
from sparse_adv.ops.max_pool2d import max_pool2d_grad_input_out, max_pool2d_out
from sparse_adv.ops.pgd_step import pgd_step, pgd_step_
from sparse_adv.ops.pgd_step_normalized import pgd_step_normalized
from sparse_adv.ops.pointwise import pointwise_out
from sparse_adv.ops.random_start import random_start
from sparse_adv.ops.winograd_conv2d import winograd_conv2d, winograd_conv2d_out, winograd_conv2d_weight

__all__ = [
    "PASSES",
    "LiveWeight",
    "PassPlan",
    "Pattern",
    "Plan",
    "batch_norm_act",
    "build_facts",
    "compile_pattern",
    "cpu_capability",
    "cuda_ops",
    "empty_gate",
    "gate_to_bool",
    "masked_conv2d",
    "masked_conv2d_grad_input_out",
    "masked_conv2d_out",
    "masked_winograd_conv2d_out",
    "masked_winograd_conv2d_weight",
    "max_pool2d_grad_input_out",
    "max_pool2d_out",
    "pack_pattern",
    "pgd_step",
    "pgd_step_",
    "pgd_step_normalized",
    "plan",
    "pointwise_out",
    "random_start",
    "set_kernels",
    "winograd_conv2d",
    "winograd_conv2d_out",
    "winograd_conv2d_weight",
]
