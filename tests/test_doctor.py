"""`doctor` runs every op that it lists, on every device that has it, and tells what it could not run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import doctor, ops
from sparse_adv.ops.masked_conv2d_cuda import precision

REGISTERED = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_adv::")}
UNDISPATCHED = {"pgd_step_normalized"}  # no op that a mode sees on a CPU


class Recorder(TorchDispatchMode):
    """Collects the names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func._schema.name.removeprefix("sparse_adv::"))
        return func(*args, **(kwargs or {}))


def test_every_op_is_checked():
    with Recorder() as recorder:
        for name, device, check in doctor.checks():
            assert check() <= doctor.TOLERANCE[device], name
    about_patterns = {"masked_conv2d_plan", "header_of_mask"}  # they compute no tensors of a network
    assert set(doctor.OPS) == {name.removeprefix("sparse_adv::") for name in REGISTERED} - about_patterns
    assert set(doctor.OPS) - UNDISPATCHED <= recorder.called
    assert set(doctor.CHECKS) >= UNDISPATCHED


def test_every_op_of_cuda_is_checked_there():
    on_cuda = {name for name in REGISTERED if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert on_cuda  # the Triton kernels are registered without a GPU, too
    with Recorder() as recorder:
        for check in doctor.CHECKS.values():
            check(doctor.CPU)
    assert {name.removeprefix("sparse_adv::") for name in on_cuda} - UNDISPATCHED <= recorder.called


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the checks pass on it")
def test_ops_that_cannot_run_on_a_gpu_are_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU that PyTorch cannot use")
    assert doctor.run() == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line.partition(" on cuda ")[0] for line in lines if "FAILED: " in line]
    assert failed == list(doctor.CHECKS) and lines[-1].count(" on cuda") == len(failed)


def test_a_kernel_that_is_not_taken_is_told(monkeypatch):
    dense = ops.PassPlan("dense", "no sparse kernel without Triton", 0)
    monkeypatch.setattr(doctor.ops, "plan", lambda *_, **__: ops.Plan(dense, dense, dense))
    with pytest.raises(RuntimeError, match="forward takes the dense kernel: no sparse kernel without Triton"):
        doctor.CHECKS["masked_conv2d (32, 32) sparse"](doctor.CPU)


def test_convolutions_are_compared_without_tf32_and_the_setting_comes_back(monkeypatch):
    taken, masked_conv2d, before = [], ops.masked_conv2d, precision()

    def watched(*args, **kwargs):
        taken.append(precision())
        return masked_conv2d(*args, **kwargs)

    monkeypatch.setattr(doctor.ops, "masked_conv2d", watched)
    doctor.CHECKS["masked_conv2d (1, 1) dense"](doctor.CPU)
    assert taken == ["tf32x3"] * 2 and precision() == before
