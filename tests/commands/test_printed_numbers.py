"""What a command prints and writes is what was computed: every number differs from every other one, and is found."""

import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from helpers.run_folders import epoch_record

from sparse_adv import attacks, facts, json_files, masks, models, runs, training
from sparse_adv.__main__ import main
from sparse_adv.commands import benchmark, evaluate, output, search, train
from sparse_adv.commands.benchmark import AutoAttackScore, BenchmarkRow, FMNScore, Sparsity
from sparse_adv.runs import Cost, Density, SearchResult, TicketChecks, TrainResult

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

NETWORK = ("--arch", "digits_cnn", "--width", "4", "--device", "cpu", "--data", "digits")
FOUND = SimpleNamespace(
    name="AutoAttack",
    budgets="made up",
    accuracy={"clean": 0.9, "apgd-ce": 0.7, "apgd-t": 0.6, "fab-t": 0.5, "square": 0.4},
    unconfirmed={"apgd-ce": 1, "apgd-t": 2, "fab-t": 3, "square": 4},
    seconds=40.0,
    signs=["looks masked"],
)


class Evaluator:
    """Finds `FOUND`, and notes what it was asked."""

    asked: ClassVar[dict] = {}

    def __init__(self, model, norm, eps, *, seed, verbose):
        self.asked.update(norm=norm, eps=eps, seed=seed, verbose=verbose, training=model.training)

    def run_standard_evaluation(self, x, y, bs=250, state_path=None):
        self.asked.update(images=len(x), bs=bs, state=state_path)
        self.result = FOUND


@pytest.fixture
def checkpoint(tmp_path) -> str:
    torch.save(models.build("digits_cnn", width=4).state_dict(), tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


def said(capsys, *command: object) -> tuple[list[dict], str]:
    """What the command prints for programs, and for people."""
    words = list(map(str, command))
    capsys.readouterr()
    assert main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main([*words, "--no-json"]) == 0
    return lines, capsys.readouterr().out


def test_an_evaluation_says_what_autoattack_found(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        attacks, "AutoAttack", lambda model, norm, eps, **options: Evaluator(model, norm, eps, **options)
    )
    strong = ("--attack", "autoattack", "--eps", "0.25", "--norm", "l2", "--seed", "7", "--images", "30")
    state, file = tmp_path / "state", tmp_path / "found.json"
    (line,), text = said(capsys, "evaluate", checkpoint, *NETWORK, *strong, "--state", state, "--out", file)
    meaning = "robust accuracy 40.0% under AutoAttack: made up"
    about = {"what": checkpoint, "weights": None, "epoch": None, "data": "digits", "split": "test", "images": 30}
    about |= {"eps": 0.25, "norm": "l2", "seed": 7}
    found = {"robust": 0.4, "meaning": meaning, "warnings": ["looks masked"], "unconfirmed": FOUND.unconfirmed}
    assert line == about | FOUND.accuracy | found == json.loads(file.read_text())
    listed = "clean 90.0%, apgd-ce 70.0%, apgd-t 60.0%, fab-t 50.0%, square 40.0% of 30 test images of digits, eps 0.25"
    assert text == f"{checkpoint}: {listed}\n{meaning}\nwarning: looks masked\n"
    asked = {"norm": "l2", "eps": 0.25, "seed": 7, "verbose": True, "images": 30, "state": state, "training": False}
    assert Evaluator.asked.items() >= asked.items()


def test_an_evaluation_says_what_its_own_attacks_found(checkpoint, capsys, monkeypatch):
    rest: Iterable[float] = iter(())
    signs: list[tuple[int, dict]] = []

    def measure(model, images, **settings):
        nonlocal rest
        robust = torch.ones(len(images.labels), dtype=torch.bool)
        return training.Accuracy(next(rest), len(robust), 0, 0, robust=robust)

    def signs_of_masking(model, x, y, **ball):
        signs.append((len(x), ball))
        return ["looks masked"]

    for name in ("clean_accuracy", "fgsm_accuracy", "robust_accuracy"):
        monkeypatch.setattr(evaluate, name, measure)
    monkeypatch.setattr(attacks, "signs_of_masking", signs_of_masking)
    rest = iter([0.9, 0.7, 0.6, 0.5] * 2)
    ball = ("--eps", "0.25", "--norm", "l2", "--steps", "3", "--restarts", "2", "--images", "70")
    (line,), text = said(capsys, "evaluate", checkpoint, *NETWORK, *ball, "--split", "train")
    found = {"clean": 0.9, "fgsm": 0.7, "pgd-3 x 2": 0.6, "robust": 0.5, "warnings": ["looks masked"]}
    about = {"split": "train", "limit": None, "validation": None, "images": 70}
    assert line.items() >= (about | {"alpha": 0.0625, "eps": 0.25, "norm": "l2"} | found).items()
    assert "clean 90.0%, fgsm 70.0%, pgd-3 x 2 60.0% of 70 train images of digits, eps 0.25\n" in text
    assert "robust accuracy is at most 50.0%: the images that withstood fgsm and pgd-3 x 2, and then" in text
    assert "pgd-50 on the margin with 5 restarts" in text and text.endswith("\nwarning: looks masked\n")
    assert signs == [(64, {"eps": 0.25, "norm": "l2"})] * 2


def row() -> BenchmarkRow:
    scores = [
        AutoAttackScore(0.031, "AutoAttack", "made up", {"clean": 0.8}, 0.411, {}, 100.0, 7.25, ["looks masked"]),
        AutoAttackScore(8 / 255, "AutoAttack", "also", {"clean": 0.8}, 0.402, {}, 20.0, 5.5, []),
    ]
    fmn = FMNScore(8 / 255, 0.4375, [0.1], 2048, 128, 200, "dlr", False, 3.0)
    return BenchmarkRow(
        **{"what": "a.pt", "protocol": "APB", "data": "cifar", "images": 10_000, "structure": "filters"},
        **{"sparsity": 75, "measured_sparsity": Sparsity(61.5, 75.25), "clean": 0.8123, "autoattack": scores},
        **{"fmn": fmn, "peak_memory_bytes": 3 << 30, "seed": 0, "software": facts.software()},
        machine=facts.machine(),
    )


def test_a_row_of_the_benchmark_has_each_number_in_its_column():
    heads, _, cells = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in benchmark.markdown(row()).split("\n")[:3]
    )
    assert dict(zip(heads, cells, strict=True)) == {
        **{"network": "a.pt", "pruned": "75 % filters (75.25 measured)", "clean": "81.23%", "AA 0.031": "41.10%"},
        **{"AA 0.031373": "40.20%", "FMN 0.031373": "43.75%", "seconds": "123", "images/s": "7.25 / 5.5"},
        **{"peak memory": "3.00 GiB", "evaluator": f"sparse_adv {facts.software().sparse_adv}"},
    }
    text = benchmark.markdown(row()).splitlines()[-1]
    assert text.startswith(
        "10000 test images of cifar. AutoAttack at eps 0.031: made up. AutoAttack at eps 0.0313725: a"
    )
    assert "Warning at eps 0.031: looks masked. FMN: 200 steps, loss dlr, images 2048 to 2175, not tuned" in text


def test_a_score_of_the_benchmark_is_what_autoattack_found(tmp_path, monkeypatch):
    monkeypatch.setattr(
        attacks, "AutoAttack", lambda model, norm, eps, **options: Evaluator(model, norm, eps, **options)
    )
    options = benchmark.Options(tmp_path / "a.pt", tmp_path, "weights", 90, "digits", batch=30, seed=7)
    model = models.build("digits_cnn", width=4).eval()
    score = benchmark._autoattack(options, 0.1, model, torch.rand(80, 1, 8, 8), torch.zeros(80).long(), verbose=False)
    assert score == AutoAttackScore(
        0.1, "AutoAttack", "made up", FOUND.accuracy, 0.4, FOUND.unconfirmed, 40.0, 2.0, ["looks masked"]
    )
    assert Evaluator.asked["state"] == tmp_path / "autoattack_0.1.safetensors" and Evaluator.asked["bs"] == 30
    assert (Evaluator.asked["seed"], Evaluator.asked["norm"], Evaluator.asked["verbose"]) == (7, "linf", False)


def test_an_accuracy_of_zero_is_printed_and_one_that_was_not_measured_is_not(capsys):
    printed = output.Output(as_json=False)
    printed.epoch(epoch_record(1, clean_accuracy=0.25, robust_accuracy=0.0))
    printed.epoch(epoch_record(2, clean_accuracy=None, robust_accuracy=None))
    first, second = capsys.readouterr().out.splitlines()
    assert ", clean 25.0%, robust 0.0%, " in first and "clean" not in second and "robust" not in second


TRAINED = TrainResult(
    Cost(90.0, 4_000),
    TicketChecks(pruned_weights_zero=True),
    "best",
    2,
    0.3,
    {"clean": 0.9, "fgsm": 0.7, "pgd-20": 0.6},
)
SEARCHED = SearchResult(Cost(80.0, 3_000), TicketChecks(reset=True), Density(0.2, 0.35))
EPOCHS = [
    epoch_record(1, clean_accuracy=0.81, robust_accuracy=0.42, undone_accuracy=0.03, train_accuracy=0.55),
    epoch_record(2, clean_accuracy=0.84, robust_accuracy=0.31, loss=1.25),
]


def test_a_training_prints_its_epochs_and_its_result(tmp_path, capsys, monkeypatch):
    class Run:
        updates = 6

        def __init__(self, folder, *_, **__):
            (folder / runs.INFO).touch()

        def epochs(self, on_step):
            return iter(EPOCHS)

        def finish(self):
            return TRAINED

    monkeypatch.setattr(train, "TrainRun", Run)
    lines, text = said(capsys, "train", *NETWORK, "--out", tmp_path)
    assert lines[:2] == [json_files.to_json(record, with_none=False) for record in EPOCHS]
    assert lines[2:] == [{"run": str(tmp_path)} | json_files.to_json(TRAINED)]
    assert text.splitlines() == [
        "epoch 1: loss 1.500, clean 81.0%, robust 42.0%, 10.0 s (repeated after catastrophic overfitting)",
        "epoch 2: loss 1.250, clean 84.0%, robust 31.0%, 20.0 s",
        f"{tmp_path}: test accuracy clean 90.0%, fgsm 70.0%, pgd-20 60.0%; 90.0 s of training and search",
    ]


def test_a_search_prints_its_epochs_and_its_result(tmp_path, capsys, monkeypatch):
    class Run:
        updates = 6

        def __init__(self, folder, *_, **__):
            (folder / runs.INFO).touch()

        def run(self, on_epoch, on_step):
            for record in EPOCHS:
                on_epoch(record)
            return SEARCHED

    monkeypatch.setattr(search, "SearchRun", Run)
    lines, text = said(capsys, "search", *NETWORK, "--out", tmp_path)
    assert lines == [
        *(json_files.to_json(record, with_none=False) for record in EPOCHS),
        {"ticket": str(tmp_path / runs.TICKET)} | json_files.to_json(SEARCHED),
    ]
    kept = "keeps 20.0% of the weights and 35.0% of the multiply-adds; found in 80.0 s"
    assert text.splitlines()[-1] == f"{tmp_path / runs.TICKET}: {kept}"


def test_an_epoch_without_evaluation_has_no_accuracy(capsys):
    output.Output(False).epoch(epoch_record(3))
    assert capsys.readouterr().out == "epoch 3: loss 1.500, 30.0 s\n"


def test_a_report_prints_the_last_epoch_and_the_result_of_each_run(tmp_path, capsys):
    folder = tmp_path / "a run"
    runs.begin(folder, runs.RunInfo("train", training.TrainConfig(epochs=2), name="mine"))
    json_files.write_lines(folder / runs.EPOCHS, EPOCHS)
    results = [None, json_files.to_json(TRAINED)]
    for result in results:
        lines, text = said(capsys, "report", folder, "--out", tmp_path / "report")
        last = json_files.to_json(EPOCHS[-1], with_none=False)
        about = {"run": str(folder), "name": "mine", **last, "result": result}
        assert lines == [about, {"report": str(tmp_path / "report")}]
        assert text.strip() == (tmp_path / "report" / "report.md").read_text().strip()
        json_files.write(folder / runs.RESULT, TRAINED)


def test_a_conversion_and_an_explanation_count_masks_and_weights(tmp_path, capsys):
    model = models.build("digits_cnn", width=4)
    kept = {name: mask for name, mask in masks.prune(model, 0.3).items() if name != "conv3"}
    masks.save_pruned(tmp_path / "a.pt", kept, model.state_dict())
    share = masks.density(kept)
    target = tmp_path / "b.safetensors"
    (line,), text = said(capsys, "convert", tmp_path / "a.pt", target, "--arch", "digits_cnn", "--width", 4)
    assert line == {"written": str(target), "to": "ticket", "masks": 2, "density": share}
    assert text == f"{target}: 2 masks that keep {share:.1%} of their weights, from zeros\n"
    (*rows, total), text = said(capsys, "explain", target)
    layers = {name: model.get_submodule(name) for name in ("conv1", "conv2", "conv3", "fc")}
    assert [row["layer"] for row in rows] == list(layers)
    numbers = {name: layer.weight.numel() for name, layer in layers.items()}
    live = numbers | {name: int(mask.count_nonzero()) for name, mask in kept.items()}
    assert [row["kept_weights"] for row in rows] == [live[name] for name in layers]
    assert total["density"] == pytest.approx(sum(live.values()) / sum(numbers.values()))
    pixels = dict.fromkeys(layers, 64) | {"fc": 1}
    macs = [[128 * count[name] * pixels[name] for count in (live, numbers)] for name in layers]
    assert [row["macs"] for row in rows] == macs
    kept, dense = map(sum, zip(*macs, strict=True))
    assert total["mac_density"] == pytest.approx(kept / dense) != pytest.approx(total["density"])


def test_an_explanation_is_of_the_classes_of_the_ticket(tmp_path, capsys):
    model = models.build("vgg16", width=2, classes=7)
    about = {"arch": "vgg16", "width": 2}
    masks.save_ticket(tmp_path / "a.safetensors", masks.Ticket(masks.prune(model, 0.5), model.state_dict(), about))
    (*rows, _), _ = said(capsys, "explain", tmp_path / "a.safetensors", "--batch", 1)
    assert [row["weight_shape"] for row in rows[-2:]] == [[16, 16], [7, 16]]


def test_the_row_of_a_network_has_what_its_attacks_found(tmp_path, capsys, monkeypatch):
    model = models.build("digits_cnn", width=4)
    for name, mask in masks.prune(model, 0.1, scope="uniform", linear=True).items():
        model.get_submodule(name).weight.data.mul_(mask)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    monkeypatch.setattr(
        attacks, "AutoAttack", lambda model, norm, eps, **options: Evaluator(model, norm, eps, **options)
    )
    monkeypatch.setattr(attacks, "fmn", lambda model, images, labels, **options: images)
    monkeypatch.setattr(attacks, "distances", lambda *_: torch.tensor([0.0, 0.01, 0.02, float("inf")] * 10))
    about = {"structure": "weights", "sparsity": 90, "data": "digits", "images": 40, "seed": 7}
    command = [text for name, value in about.items() for text in (f"--{name}", value)]
    (row,), text = said(
        capsys, "benchmark", tmp_path / "a.pt", "--out", tmp_path, *NETWORK, *command, "--eps", "0.1,0.2"
    )
    assert row.items() >= (about | {"what": str(tmp_path / "a.pt"), "clean": 0.9}).items()
    assert [(score["eps"], score["robust"], score["accuracy"]) for score in row["autoattack"]] == [
        (0.1, 0.4, FOUND.accuracy),
        (0.2, 0.4, FOUND.accuracy),
    ]
    fmn = row["fmn"]
    assert (fmn["images"], fmn["robust"], fmn["first"], fmn["steps"]) == (40, 0.25, 0, 200)
    assert fmn["distances"] == [pytest.approx(0.0), pytest.approx(0.01), pytest.approx(0.02), None] * 10
    assert row["measured_sparsity"]["weights"] == pytest.approx(90, abs=0.5)
    written = json.loads((tmp_path / benchmark.ROW).read_text())
    assert written["autoattack"] == row["autoattack"] and written["clean"] == 0.9
    assert text.strip() == (tmp_path / benchmark.MARKDOWN).read_text().strip() and "| 90.00%" in text
