"""`benchmark`: the row it writes, going on from where it was stopped, and checkpoints less sparse than said."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.digit_runs import pruned_state
from helpers.refusal import refused
from torch import nn

from sparse_adv import attacks
from sparse_adv.__main__ import main
from sparse_adv.attacks.autoattack_run import Evaluation
from sparse_adv.commands import benchmark
from sparse_adv.commands.benchmark import Sparsity, measured_sparsity
from sparse_adv.commands.output import Output
from sparse_adv.nn import sparsify

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture
def checkpoint(tmp_path):
    """A network with 90 % of its weights at zero in every layer, so that its images fall soon."""
    torch.save({"net": pruned_state(width=8)}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


@pytest.fixture
def small_budgets(monkeypatch):
    """Attacks of a few steps: an image that never falls would take AutoAttack minutes."""
    members = importlib.import_module("sparse_adv.attacks.autoattack").MEMBERS
    for name, member in list(members.items()):
        few = {"queries": 20} if name == "square" else {"steps": 3}

        def attack(*args, member=member, few=few, **options):
            return member.attack(*args, **options | few)

        monkeypatch.setitem(members, name, replace(member, attack=attack))


def command(checkpoint, *more: str) -> list[str]:
    network = ["--arch", "digits_cnn", "--width", "8", "--data", "digits"]
    return ["benchmark", str(checkpoint), "--out", str(checkpoint.parent / "row"), *network, *more]


US = ("--structure", "weights", "--sparsity", "90")


def test_a_row_says_what_was_measured_how_and_with_what(checkpoint, small_budgets, capsys):
    arguments = command(checkpoint, *US, "--images", "30", "--eps", "0.1,0.3", "--batch", "16")
    assert main(arguments) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((checkpoint.parent / "row" / "row.json").read_text()) == row
    assert row["measured_sparsity"]["weights"] == pytest.approx(90, abs=0.1) and row["images"] == 30
    weak, strong = row["autoattack"]
    assert (weak["eps"], strong["eps"]) == (0.1, 0.3) and weak["name"] == "AutoAttack"
    assert list(weak["accuracy"]) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert row["clean"] >= weak["robust"] >= strong["robust"]
    assert weak["seconds"] > 0 and weak["images_per_second"] == pytest.approx(30 / weak["seconds"])
    fmn = row["fmn"]
    assert len(fmn["distances"]) == fmn["images"] == 30 and not fmn["tuned"]
    assert fmn["robust"] == sum(d is None or d > 8 / 255 for d in fmn["distances"]) / 30
    assert row["peak_memory_bytes"] > 2**20 and row["software"]["sparse_adv"]
    text = (checkpoint.parent / "row" / "row.md").read_text()
    assert "| AA 0.1 " in text and "not tuned" in text and "square (5000 queries)" in text and "30 test images" in text


def test_robust_is_what_all_attacks_leave(tmp_path, monkeypatch):
    accuracy = {"clean": 0.9, "apgd-ce": 0.6, "square": 0.4}
    found = SimpleNamespace(name="AutoAttack", budgets="few", accuracy=accuracy, unconfirmed={}, seconds=2.0, signs=[])
    made = SimpleNamespace(run_standard_evaluation=lambda *_, **__: None, result=found)
    monkeypatch.setattr(attacks, "AutoAttack", lambda *_, **__: made)
    options = SimpleNamespace(out=tmp_path, seed=0, batch=5)
    score = benchmark._autoattack(options, 0.1, None, torch.zeros(5), torch.zeros(5), verbose=False)
    assert (score.robust, score.accuracy, score.images_per_second) == (0.4, accuracy, 2.5)


def test_the_same_command_goes_on_from_its_states(checkpoint, small_budgets, capsys, monkeypatch):
    arguments = command(checkpoint, *US, "--images", "20", "--eps", "0.9")
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(Evaluation, "_attack", None)  # nothing is attacked again
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["autoattack"] == first["autoattack"]


def test_radii_that_differ_little_have_states_of_their_own(checkpoint, small_budgets, capsys):
    assert main(command(checkpoint, *US, "--images", "20", "--eps", f"0.031,{8 / 255}")) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [entry["eps"] for entry in row["autoattack"]] == [0.031, 8 / 255]
    assert len(list((checkpoint.parent / "row").glob("autoattack_*.safetensors"))) == 2


def test_the_radius_and_images_of_the_benchmark_are_the_default():
    from sparse_adv.commands.benchmark import FMN_FIRST, FMN_IMAGES, Options

    assert Options.eps[0] == 0.031 and Options.eps[1] == 8 / 255
    assert (FMN_FIRST, FMN_FIRST + FMN_IMAGES - 1) == (2048, 2175)


def test_another_sparsity_than_said_is_refused_before_any_attack(checkpoint, capsys):
    assert "% of its weights" in refused(capsys, *command(checkpoint, "--structure", "weights", "--sparsity", "95"))
    assert "of its filters" in refused(capsys, *command(checkpoint, "--structure", "filters", "--sparsity", "50"))
    assert "50, 75, 90 for filters" in refused(
        capsys, *command(checkpoint, "--structure", "filters", "--sparsity", "95")
    )
    assert "--eps must be" in refused(capsys, *command(checkpoint, *US, "--eps", "0"))
    assert "--images must be at least 1" in refused(capsys, *command(checkpoint, *US, "--images", "0"))
    assert "--seed must be an integer of at least 0, got -1" in refused(
        capsys, *command(checkpoint, *US, "--seed", "-1")
    )
    assert not (checkpoint.parent / "row").exists()


def test_a_folder_with_the_states_of_another_run_is_not_taken(checkpoint, small_budgets, capsys):
    assert main(command(checkpoint, *US, "--images", "8", "--eps", "0.9")) == 0
    said = refused(capsys, *command(checkpoint, *US, "--images", "9", "--eps", "0.9"))
    row = checkpoint.parent / "row"
    assert f"--out {row} has the state of another model, other images or other options: name another folder" in said


def test_a_row_that_cannot_be_printed_is_written_and_the_other_way_round(
    checkpoint, small_budgets, capsys, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device", "somewhere")

    arguments = command(checkpoint, *US, "--images", "8", "--eps", "0.9")
    with monkeypatch.context() as patch:
        patch.setattr(benchmark.json_files, "write", fail)
        assert main(arguments) == 2
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    monkeypatch.setattr(Output, "print", fail)
    assert main(arguments) == 2
    written = json.loads((checkpoint.parent / "row" / "row.json").read_text())
    assert written["autoattack"] == printed["autoattack"] and (checkpoint.parent / "row" / "row.md").exists()


@pytest.mark.parametrize(
    ("images", "first", "count"), [(2500, 2048, 128), (2100, 1972, 128), (300, 172, 128), (50, 0, 50)]
)
def test_distances_are_those_of_images_that_the_attack_was_not_tuned_on_or_the_last(monkeypatch, images, first, count):
    seen = []
    monkeypatch.setattr(attacks, "fmn", lambda model, x, y, **_: seen.append(y) or x)
    monkeypatch.setattr(attacks, "distances", lambda model, adv, x, y: torch.zeros(len(y)))
    score = benchmark._fmn(None, torch.zeros(images, 1), torch.arange(images), 100)
    assert torch.cat(seen).tolist() == list(range(first, first + count))
    assert (score.first, score.images) == (first, count)


def test_sparsity_counts_masks_zeros_and_whole_filters():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 1))
    assert measured_sparsity(model) == Sparsity(0, 0)
    model[3].weight.data.zero_()
    kept = torch.tensor([[1, 0], [1, 1], [1, 1], [0, 0]], dtype=torch.bool)  # half a filter, and a whole one
    sparsify(model, {"0": kept.view(4, 2, 1, 1)})
    assert measured_sparsity(model) == Sparsity(100 * 7 / 12, 25)
    model[0].weight.data[2] = 0.0  # kept by the mask, and zero
    assert measured_sparsity(model) == Sparsity(100 * 9 / 12, 50)
