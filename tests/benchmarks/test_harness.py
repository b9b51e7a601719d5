"""The bound that the CPU benchmarks print beside each ratio, and their table."""

import itertools
import json
import sys

import bench_masked_conv2d as bench
import harness
import pytest
import torch
from harness import Peak, convolution_work, mask_of


def test_the_bound_is_the_slower_of_multiplying_and_moving():
    peak = Peak(flops=8.0, bandwidth=2.0)
    assert peak.seconds(multiply_adds=16, moved=1) == 4.0
    assert peak.seconds(multiply_adds=16, moved=10) == 5.0


@pytest.mark.parametrize(("size", "stride", "padding"), [((5, 4), 1, 1), ((6, 7), 2, 1), ((4, 4), 2, 0)])
def test_the_least_work_is_counted_tap_by_tap(size, stride, padding):
    mask = mask_of((4, 3, 3, 3), (2, 1), 0.4)
    height, width = ((length + 2 * padding - 3) // stride + 1 for length in size)
    multiply_adds = sum(
        0 <= y * stride - padding + r < size[0] and 0 <= x * stride - padding + s < size[1]
        for _, _, r, s in mask.nonzero().tolist()
        for y, x in itertools.product(range(height), range(width))
    )
    elements = 2 * 3 * size[0] * size[1] + 2 * 4 * height * width + int(mask.sum())
    assert convolution_work(mask, (2, 3, *size), stride, padding) == (2 * multiply_adds, 4 * elements)


def test_the_least_work_of_a_large_layer_is_exact():
    """Counts beyond what float32 holds: of 512@4 with padding, a row of taps meets 3 + 4 + 3 of 3 x 4 pixels."""
    multiply_adds, _ = convolution_work(torch.ones(512, 512, 3, 3, dtype=torch.bool), (64, 512, 4, 4))
    assert multiply_adds == 64 * 512**2 * 10**2


@pytest.mark.parametrize("faster", ["mm", "conv2d"])
def test_the_peak_is_the_faster_of_a_product_in_the_l2_and_a_convolution(monkeypatch, faster):
    """With seconds given instead of measured."""

    def seconds_given(sides, rounds, device):
        assert device == "cpu" and all(isinstance(side(), torch.Tensor) for side in sides.values())
        return {name: {"q20": 0.5 if name in (faster, "copy") else 1e9} for name in sides}

    monkeypatch.setattr(harness, "interleaved", seconds_given)
    monkeypatch.setattr(harness, "_l2_bytes", lambda: 2**21)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    multiply_adds = {"mm": 384**3, "conv2d": 64 * 32**2 * 64**2 * 9}[faster]  # 3 x 384 x 384 x 4 bytes < 2 MiB
    assert harness.measured_peak() == Peak(flops=4.0 * multiply_adds, bandwidth=4.0 * 2**24)


def row(layer: str, ratio: float, bound: float, gflops: float) -> dict:
    place = {"block": [4, 4], "pass": "forward", "density": 0.1, "layer": layer}
    return place | {"ratio_to_dense": ratio, "bound_ratio": bound, "dense_gflops": gflops}


def test_the_tables_say_what_is_reached_and_what_is_possible(monkeypatch):
    monkeypatch.setattr(bench, "LAYERS", [(64, 32), (128, 16)])
    monkeypatch.setattr(bench, "PASSES", ["forward"])
    rows = [row("64@32", 2.0, 8.0, 100), row("64@32", 4.0, 8.0, 102), row("128@16", 8.0, 27.0, 121)]
    assert "| (4, 4) | forward | 4.0 of 12.0 (2.0-8.0) |" in bench.table(rows)
    assert "| (4, 4) | forward | 4.0 (2.0-8.0) |" in bench.table(rows, bound=None)
    assert bench.dense_table(rows).splitlines()[::2] == [
        "| dense, GFLOP/s | 64@32 | 128@16 | mean |",
        "| forward | 101 | 121 | 111 |",
    ]


def test_the_benchmark_of_a_small_layer_leaves_rows_with_their_bound(monkeypatch, capsys, tmp_path):
    for name, value in {"LAYERS": [(16, 6)], "BLOCKS": [(4, 4)], "DENSITIES": [0.2], "SPARSEPROP": False}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: None)  # it would hold for all later tests
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(
        sys, "argv", ["bench", "--threads", threads, "--batch", "2", "--out", str(tmp_path / "rows.jsonl")]
    )
    bench.main()
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["pass"] for row in rows] == list(bench.PASSES)
    for row in rows:
        dense = min(row["seconds"][side]["median"] for side in ("dense", "dense, channels_last"))
        work = convolution_work(mask_of((16, 16, 3, 3), (4, 4), 0.2), (2, 16, 6, 6))
        assert row["bound_ratio"] == pytest.approx(dense / Peak(**row["peak"]).seconds(*work))
        assert f"{row['ratio_to_dense']:.2f} of at most {row['bound_ratio']:.2f}" in printed
        assert {"device", "cores", "l2_bytes", "instruction_set", "threads", "torch"} <= row.keys()
    assert "GFLOP/s, torch.mm in the L2" in printed and "| dense, GFLOP/s | 16@6 | mean |" in printed
