"""The tables of GPU results in the documents are those that benchmarks/gpu_table.py makes of the committed rows."""

import gpu_table
from harness import label_of

from sparse_adv import ops


def test_the_documents_hold_what_the_script_makes():
    texts = [path.read_text() for path in gpu_table.documents()]
    assert all(sum(f"<!-- {name}: begin -->" in text for text in texts) == 1 for name in gpu_table.blocks())
    assert [gpu_table.filled(text) for text in texts] == texts


def test_a_number_lands_in_its_cell():
    def row(pass_: str, layer: str, batch: int, block: tuple[int, int], density: float, ratio: float) -> dict:
        labels = {"op": "masked_conv2d", "pass": pass_, "layer": layer, "batch": batch}
        return labels | {"block": label_of(block), "density": density, "ours_ms": 2.0, "dense_ms": 2.0 * ratio}

    rows = [
        row(pass_, layer, batch, block, density, 0.5 if layer == "128@16" else 2.0)
        for pass_ in ops.PASSES
        for layers in gpu_table.NETWORKS.values()
        for layer in layers
        for batch in (128, 512)
        for block, density in gpu_table.MASKS
    ]
    rows.append(row("forward", "64@32", 512, (32, 32), 0.1, 7.77))  # in place of an earlier row
    lines = gpu_table.kernels(rows)
    assert len(lines) == 2 + 4 * 2 * 2
    assert "| (32, 32), 0.1 | ResNet-18 | 512 | 7.8 0.50 2.0 2.0 | 2.0 0.50 2.0 2.0 | 2.0 0.50 2.0 2.0 |" in lines


def test_every_update_and_attack_has_a_line_losses_included():
    labels = {"network": "resnet18", "batch": 128, "mask": "dense", "dtype": "bfloat16"}
    rows = [
        {"op": "PGD-10 update", **labels, "ours_ms": 30.0, "ours_dense_ms": 29.1},
        {"op": "PGD-10 attack", **labels, "ours_ms": 25.9, "compile_ms": 13.5},
        {"op": "PGD-10 update, shrunk", "network": "resnet18", "removed": "half", "ours_ms": 17.3, "dense_ms": 28.9},
    ]
    assert gpu_table.updates(rows)[2:] == [
        "| PGD-10 update: resnet18, batch 128, dense | 30.0 | ours, dense 0.97 |",
        "| PGD-10 attack: resnet18, batch 128, dense | 25.9 | torch.compile in a CUDA graph 0.52 |",
        "| PGD-10 update, shrunk: resnet18, half | 17.3 | ours, dense 1.67 |",
    ]


def test_runs_of_one_kind_share_a_line_and_what_was_not_measured_stays_empty():
    run = {"run": "ticket", "objective": "pgd", "epochs": 2, "pgd_epochs": 2.04, "test_pgd_20": 41.5}
    runs = [run | {"robust": {"1": 30.04, "2": 35.0}}, run | {"robust": {"1": 31.0, "2": 36.0}, "test_clean": 60.0}]
    assert gpu_table.tickets(runs)[2:] == [
        "| ticket | pgd | 2 | 2.0 | 30.0, 31.0 | 35.0, 36.0 |  |  | 35.0, 36.0 | 60.0 | 41.5, 41.5 |"
    ]
