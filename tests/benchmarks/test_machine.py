"""The rates of a machine, and the bound that follows from them."""

import machine
import pytest
import torch
from machine import Peak
from timing import Times


def test_the_bound_is_the_slower_of_multiplying_and_moving():
    peak = Peak(flops=8.0, bandwidth=2.0)
    assert peak.seconds(macs=16, moved=1) == 4.0
    assert peak.seconds(macs=16, moved=10) == 5.0


@pytest.mark.parametrize("faster", ["mm", "conv2d"])
def test_the_peak_is_the_faster_of_a_product_in_the_l2_and_a_convolution(monkeypatch, faster):
    """With seconds given instead of measured."""

    def seconds_given(sides, rounds, device):
        assert device == "cpu" and all(isinstance(side(), torch.Tensor) for side in sides.values())
        return {name: Times(2.0, 0.5 if name in (faster, "copy") else 1e9, 3.0) for name in sides}

    monkeypatch.setattr(machine, "interleaved", seconds_given)
    monkeypatch.setattr(machine, "_l2_bytes", lambda: 2**21)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    macs = {"mm": 384**3, "conv2d": 64 * 32**2 * 64**2 * 9}[faster]  # 3 x 384 x 384 x 4 bytes < 2 MiB
    assert machine.measured_peak() == Peak(flops=4.0 * macs, bandwidth=4.0 * 2**24)


def test_what_a_number_depends_on_is_printed(capsys):
    machine.print_machine(Peak(flops=118e9, bandwidth=30e9), "cpu")
    printed = capsys.readouterr().out
    assert "118 GFLOP/s" in printed and "30.0 GB/s" in printed
    assert all(
        name in printed for name in ("device", "cores", "l2_bytes", "instruction_set", "threads", "torch", "commit")
    )
