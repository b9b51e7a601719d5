"""The tables of the benchmark of `masked_conv2d`."""

import bench_masked_conv2d as bench
import pytest
from convolutions import least_work, random_mask


def record(layer: str, dense: float, ours: float, bound: float | None = None, **more) -> dict:
    labels = {"op": "masked_conv2d", "pass": "forward", "block": "4x4", "density": 0.1, "layer": layer, "batch": 64}
    times = {"ours_ms": ours, "dense_ms": dense, "dense_channels_last_ms": 2 * dense, "ratio": dense / ours}
    return labels | times | ({} if bound is None else {"bound_ms": bound}) | more


def test_the_ratio_table_has_what_is_reached_and_what_is_possible():
    records = [record("64@32", 8.0, 4.0, 1.0), record("64@32", 8.0, 2.0, 1.0), record("128@16", 27.0, 27.0 / 8, 1.0)]
    assert "| (4, 4) | forward | 4.0 of 12.0 (2.0-8.0) |" in bench.ratio_table(records)
    without = [{name: value for name, value in r.items() if name != "bound_ms"} for r in records]
    assert "| (4, 4) | forward | 4.0 (2.0-8.0) |" in bench.ratio_table(without)


def test_the_rate_of_the_dense_convolution_counts_no_taps_on_padding():
    macs, _ = least_work(random_mask((64, 64, 3, 3), (1, 1), 1.1), (64, 64, 32, 32))
    assert bench.dense_gflops(record("64@32", 50.0, 1.0)) == pytest.approx(2e-9 * macs / 50e-3)


def test_sparseprop_is_compared_with_our_forward_and_with_both_of_our_gradients():
    records = [
        record("64@32", 8.0, 4.0, sparseprop_ms=20.0),
        record("64@32", 8.0, 2.0) | {"pass": "grad_input"},
        record("64@32", 8.0, 3.0, sparseprop_both_gradients_ms=20.0) | {"pass": "grad_weight"},
    ]
    assert bench.sparseprop_table(records).splitlines()[2:] == [
        "| (4, 4) | forward | 5.0 (5.0-5.0) |",
        "| (4, 4) | grad_weight | 4.0 (4.0-4.0) |",
    ]
