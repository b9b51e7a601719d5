"""`doctor` runs every op that it lists."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import doctor


def test_every_op_is_checked():
    called = set()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func._schema.name.removeprefix("sparse_adv::"))
            return func(*args, **(kwargs or {}))

    with Recorder():
        errors = {name: check() for name, check in doctor.CHECKS.items()}
    assert max(errors.values()) <= doctor.TOLERANCE
    registered = {name.removeprefix("sparse_adv::") for name in torch._C._dispatch_get_all_op_names()}
    about_patterns = {"masked_conv2d_plan", "header_of_mask"}  # they compute no tensors of a network
    assert set(doctor.OPS) == {name for name in registered if "::" not in name} - about_patterns
    assert set(doctor.OPS) - {"pgd_step_normalized"} <= called  # that one is no dispatched op on a CPU
    assert any(name.startswith("pgd_step_normalized") for name in errors)
