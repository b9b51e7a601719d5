"""The tables of GPU results in the documents are those that benchmarks/gpu_table.py makes of the committed rows."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu_table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu_table")


def test_the_documents_hold_what_the_script_makes(gpu_table):
    texts = [path.read_text() for path in gpu_table.documents()]
    assert all(sum(f"<!-- {name}: begin -->" in text for text in texts) == 1 for name in gpu_table.blocks())
    assert [gpu_table.filled(text) for text in texts] == texts


def test_a_number_lands_in_its_cell(gpu_table):
    def row(pass_: str, layer: str, batch: str, block: tuple[int, int], density: float, ratio: float) -> dict:
        case = f"{layer}, batch {batch}, block {block}, density {density:.2f}"
        return {"op": f"masked_conv2d {pass_}", "case": case, "ratios": {"dense": ratio}}

    rows = [
        row(pass_, layer, batch, block, density + 0.02, 0.5 if layer == "128@16" else 2.0)
        for pass_ in gpu_table.PASSES
        for layers in gpu_table.NETWORKS.values()
        for layer in layers
        for batch in ("128", "512")
        for block, density in gpu_table.MASKS
    ]
    rows.append(row("forward", "64@32", "512", (32, 32), 0.09, 7.77))  # in place of an earlier row
    lines = gpu_table.kernels(rows)
    assert len(lines) == 2 + 4 * 2 * 2
    assert "| (32, 32), 0.1 | ResNet-18 | 512 | 7.8 0.50 2.0 2.0 | 2.0 0.50 2.0 2.0 | 2.0 0.50 2.0 2.0 |" in lines


def test_every_update_and_attack_has_a_line_losses_included(gpu_table):
    rows = [
        {"op": "PGD-10 update", "case": "a", "seconds": {"ours": {"median": 0.03}}, "ratios": {"our dense": 0.97}},
        {"op": "PGD-10 attack", "case": "b", "seconds": {"ours": {"median": 0.0259}}, "ratios": {"compile": 0.52}},
    ]
    assert gpu_table.updates(rows)[2:] == [
        "| PGD-10 update: a | 30.0 | ours, dense 0.97 |",
        "| PGD-10 attack: b | 25.9 | torch.compile in a CUDA graph 0.52 |",
    ]


def test_runs_of_one_kind_share_a_line_and_what_was_not_measured_stays_empty(gpu_table):
    run = {"run": "ticket", "objective": "pgd", "epochs": 2, "pgd_epochs": 2.04, "test_pgd_20": 41.5}
    runs = [run | {"robust": {"1": 30.04, "2": 35.0}}, run | {"robust": {"1": 31.0, "2": 36.0}, "test_clean": 60.0}]
    assert gpu_table.tickets(runs)[2:] == [
        "| ticket | pgd | 2 | 2.0 | 30.0, 31.0 | 35.0, 36.0 |  |  | 35.0, 36.0 | 60.0 | 41.5, 41.5 |"
    ]
