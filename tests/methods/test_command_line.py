"""`sparse-adv train --method`: flags, records, and what reads the run afterwards."""

import json

import pytest

from sparse_adv import masks, runs
from sparse_adv.__main__ import main

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

FLAGS = (
    "--arch digits_cnn --width 8 --limit 120 --batch-size 30 --epochs 3 --objective fgsm-rs --eps 0.1 "
    "--evaluation-steps 1 --no-overfitting-monitor --device cpu --json"
)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "rigl"


def train(out, *more):
    return main(["train", *FLAGS.split(), "--out", str(out), *more])


def test_a_method_trains_and_its_run_is_read_by_the_other_commands(out, tmp_path, capsys):
    method = ["--method", "rigl", "--density", "0.25", "--block", "2,2", "--interval", "2"]
    assert train(out, *method) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["density"]["weights"] for line in lines[:3]] == pytest.approx([0.25] * 3, abs=0.01)
    run = runs.read(out)
    assert run.info.method.block == (2, 2) and run.info.density.weights == pytest.approx(0.25, abs=0.01)
    weights = str(out / runs.LAST)
    assert masks.density(masks.load_pruned(weights).masks) == lines[2]["density"]["weights"]
    assert main(["explain", weights, "--arch", "digits_cnn", "--width", "8", "--json"]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert main(["evaluate", str(out), "--images", "10", "--steps", "1", "--restarts", "1", "--json"]) == 0
    assert train(tmp_path / "again", "--ticket", weights) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--density", "0.3"], "--density is a setting of a method: name one with --method"),
        (["--density=0.1"], "--density is a setting of a method: name one with --method"),
        (["--interval", "100"], "--interval is a setting of a method: name one with --method"),
        (["--no-linear"], "--linear is a setting of a method: name one with --method"),
        (["--method", "gmp", "--permute-channels"], "--permute-channels has no effect with blocks of one weight"),
        (
            ["--method", "rigle"],
            "method must be one of none, static, flying-bird, flying-bird-plus, rigl, set, gmp, got 'rigle'",
        ),
        (["--method", "gmp", "--density", "2"], "density must be in (0, 1], got 2.0"),
        (["--method", "set", "--block", "0,4"], "block must be 2 or 4 positive integers"),
        (["--method", "rigl", "--adapt-from", "0.5"], "--adapt-from is a setting of method 'flying-bird-plus'"),
        (["--method", "static", "--dense-epochs", "3"], "--dense-epochs must be less than the 3 epochs of the run"),
        (["--method", "set", "--ticket", "x"], "--method set makes its own masks: leave out --ticket"),
    ],
)
def test_wrong_flags_are_refused_and_no_folder_is_made(tmp_path, capsys, more, message):
    assert train(tmp_path / "run", *more) != 0
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_flying_bird_plus_needs_an_attack(tmp_path, capsys):
    method = ["--method", "flying-bird-plus", "--density", "0.4", "--interval", "1", "--adapt-from", "0.1"]
    assert train(tmp_path / "run", *method) == 0
    run = runs.read(tmp_path / "run")
    assert run.info.method.adapt_from == 0.1 and all(each.robust_loss > 0 for each in run.records)
    capsys.readouterr()
    assert train(tmp_path / "natural", *method, "--objective", "natural") != 0
    assert "objective must have an attack for method 'flying-bird-plus'" in capsys.readouterr().err
    assert not (tmp_path / "natural").exists()
