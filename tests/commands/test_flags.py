"""Every flag of a command reaches its use: the functions that do the work are called with what was asked for."""

import importlib
import inspect
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import yaml
from helpers.digit_runs import pruned_state
from helpers.run_folders import make

from sparse_adv import attacks, data, demo, experiment, masks, models, runs, training
from sparse_adv.__main__ import main
from sparse_adv.commands import (
    benchmark,
    evaluate,
    explain,
    networks,
    options,
    out_folder,
    output,
    report,
    search,
    train,
)
from sparse_adv.config import OBJECTIVES, DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.runs import TicketSource

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


class Reached(BaseException):
    """Ends a command where it calls a function. No Exception, which the command line would turn into a sentence."""


@pytest.fixture
def reach(monkeypatch) -> Callable[..., dict[str, Any]]:
    """Runs a command up to a function; returns the arguments that this one is called with, by name."""

    def until(owner: Any, name: str, *command: str) -> dict[str, Any]:
        signature = inspect.signature(getattr(owner, name))

        def stop(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            raise Reached(bound.arguments | {"is_deterministic": torch.are_deterministic_algorithms_enabled()})

        with monkeypatch.context() as patch, pytest.raises(Reached) as reached:
            patch.setattr(owner, name, stop)
            main(command)
        return reached.value.args[0]

    return until


def flags(settings: dict[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def changed(default: Any, *settings: dict[str, Any]) -> list[Any]:
    """Configurations with these settings, of which every field has another value than by default in one of them."""
    configs = [replace(default, **values) for values in settings]
    names = [field.name for field in fields(default)]
    same = [name for name in names if all(getattr(each, name) == getattr(default, name) for each in configs)]
    assert not same, "a field of the configuration is not tested"
    return configs


TRAIN = {
    **{"objective": "trades", "epochs": 7, "lr": 0.25, "momentum": 0.5, "schedule": "cosine"},
    **{"weight_decay": 0.125, "warmup_epochs": 2.0, "warmup_start_lr": 0.03, "eps": 0.1, "alpha": 0.05, "steps": 3},
    **{"norm": "l2", "beta": 2.0, "label_smoothing": 0.2, "ema_decay": 0.75, "awp_gamma": 0.01},
    **{"awp_warmup_epochs": 1.5},
    **{"max_grad_norm": 1.5, "precision": "bfloat16", "engine": False, "evaluate_every": 2, "evaluation_steps": 4},
    **{"overfitting_monitor": False, "graphs": False, "seed": 11},
}
FREE = {"objective": "free", "replays": 3, "schedule": "piecewise", "milestones": (0.3, 0.6)}
DATA = {"data": "digits", "limit": 90, "validation": 30.0, "share": 0.5, "batch_size": 20, "augment": True}
PRUNE = {
    **{"density": 0.3, "block": (2, 1), "scope": "uniform", "score": "magnitude", "linear": False, "rounds": 2},
    **{"rewind_step": 3, "permute_channels": True, "early_stop_distance": 0.25, "half_resolution": True},
}
METHOD = {
    **{"method": "flying-bird-plus", "density": 0.3, "block": (2, 1), "scope": "uniform", "linear": False},
    **{"interval": 7, "drop_fraction": 0.25, "change_until": 0.5, "adapt_from": 0.25, "growth": "random"},
    **{"dense_epochs": 1.0, "permute_channels": True},
}
RESCALED = {"method": "set", "rescale_init": True}


def test_a_search_is_given_every_setting(reach, tmp_path):
    wanted, free = changed(search.Options.train, TRAIN, FREE)
    (images,) = changed(DataConfig(), DATA | {"data": "elsewhere"})
    settings = TRAIN | DATA | {"data": "elsewhere"} | PRUNE | {"arch": "digits_cnn", "width": 4, "out": tmp_path}
    command = "search", *flags(settings), "--device", "cpu", "--deterministic"
    loaded = reach(experiment, "load_data", *command)
    assert (loaded["config"], loaded["seed"]) == (images, 11) and loaded["is_deterministic"]
    made = reach(search, "SearchRun", "search", *flags(settings | {"data": "digits"}), "--device", "cpu")
    assert made["train"] == wanted and made["prune"] == PruneConfig(**PRUNE) and made["folder"] == tmp_path
    assert made["images"] == replace(images, data="digits") and made["network"] == NetworkConfig("digits_cnn", 4)
    assert made["device"] == torch.device("cpu") and not made["is_deterministic"]
    kept = reach(search, "SearchRun", "search", *flags(FREE | {"out": tmp_path}), "--keep-weights")
    assert kept["prune"] == PruneConfig(keep_weights=True) and kept["train"] == free


@pytest.fixture
def checkpoint(tmp_path):
    """A dense network of the digits with 90 % of its weights at zero, in the form of other code."""
    torch.save(pruned_state(width=4), tmp_path / "a.pt")
    return str(tmp_path / "a.pt")


NETWORK = {"arch": "digits_cnn", "width": 4}


def test_training_is_given_every_setting(reach, tmp_path, checkpoint):
    wanted, free = changed(TrainConfig(), TRAIN, FREE)
    (images,) = changed(DataConfig(), DATA | {"data": "elsewhere"})
    settings = TRAIN | DATA | {"data": "elsewhere"} | NETWORK | {"out": tmp_path, "device": "cpu"}
    loaded = reach(experiment, "load_data", "train", *flags(settings), "--deterministic")
    assert (loaded["config"], loaded["seed"]) == (images, 11) and loaded["is_deterministic"]
    settings |= {"data": "digits"}
    method, rescaled = changed(MethodConfig(), METHOD, RESCALED)
    made = reach(train, "TrainRun", "train", *flags(FREE | RESCALED | NETWORK | {"out": tmp_path}))
    assert made["train"] == free and made["method"] == rescaled
    made = reach(train, "TrainRun", "train", *flags(settings | METHOD | {"name": "mine"}))
    assert made["train"] == wanted and made["method"] == method and made["name"] == "mine" and made["ticket"] is None
    assert made["images"] == replace(images, data="digits") and made["network"] == NetworkConfig("digits_cnn", 4)
    assert made["folder"] == tmp_path and not made["is_deterministic"]
    for controls in ({"reinit": True}, {"shuffle": True}, {}):
        made = reach(train, "TrainRun", "train", *flags(settings | {"ticket": checkpoint} | controls))
        source = made["ticket"][1]
        assert source == TicketSource(source.sha256, **controls) and made["method"] is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alpha", {"objective": "natural", "alpha": 0.1}),
        ("steps", {"objective": "natural", "steps": 3}),
        ("steps", {"objective": "n-fgsm", "overfitting_monitor": False, "steps": 3}),
        ("beta", {"objective": "pgd", "beta": 2.0}),
        ("replays", {"objective": "pgd", "replays": 3}),
        ("milestones", {"schedule": "cosine", "milestones": (0.3,)}),
        ("warmup_start_lr", {"warmup_start_lr": 0.1}),
        ("awp_warmup_epochs", {"awp_warmup_epochs": 5.0}),
        ("interval", {"method": "static", "interval": 3}),
        ("growth", {"method": "gmp", "growth": "random"}),
        ("rescale_init", {"method": "rigl", "dense_epochs": 1.0, "rescale_init": True}),
        ("permute_channels", {"method": "gmp", "permute_channels": True}),
    ],
)
def test_a_flag_without_effect_is_refused_and_so_is_a_key_of_a_config_file(name, settings, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    for command in ("train",) if "method" in settings else ("train", "search"):
        for given in (flags(settings), ["--config", str(file)]):
            assert main([command, "--arch", "digits_cnn", "--out", str(tmp_path / "run"), *given]) == 2
            told = capsys.readouterr().err
            assert f"--{name.replace('_', '-')} " in told and told.count("\n") == 1, told
    assert not (tmp_path / "run").exists()


def test_an_empty_path_is_not_the_present_folder(capsys):
    assert main(["train", "--arch", "digits_cnn", "--out", ""]) == 2
    assert "out must be a path, got ''" in capsys.readouterr().err


NOTHING = {
    **{"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "piecewise", "milestones": (), "eps": 0.0},
    "keep_freed_memory": False,
}


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        *[("train", each) for each in (TRAIN | METHOD, FREE | RESCALED, NOTHING | {"deterministic": True})],
        *[("search", each) for each in (TRAIN | PRUNE, {"keep_weights": True}, NOTHING | {"rewind_step": 0})],
    ],
)
def test_a_run_repeats_with_every_setting_in_its_own_config_file(command, settings, tmp_path):
    module = importlib.import_module(f"sparse_adv.commands.{command}")
    parser = options.parser_of(command, module.Options, True)
    words = flags(settings | DATA | NETWORK | {"out": tmp_path, "device": "cpu"})
    asked = options.parse(parser, module.Options, words)
    out_folder.write_config(tmp_path, asked)
    assert options.parse(parser, module.Options, ["--config", str(tmp_path / runs.CONFIG)]) == asked
    written = out_folder.flat(asked)
    assert all(
        written[name] == (list(value) if isinstance(value, tuple) else value) for name, value in settings.items()
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_repeats_with_its_own_config_file(objective, reach, tmp_path):
    command = ["train", "--objective", objective, "--arch", "digits_cnn", "--out", str(tmp_path)]
    asked = reach(train, "write_config", *command)
    out_folder.write_config(tmp_path, asked["options"])
    assert reach(train, "write_config", "train", "--config", str(tmp_path / runs.CONFIG))["options"] == asked["options"]


@pytest.mark.parametrize("command", ["search", "train"])
def test_freed_memory_is_kept_unless_it_is_refused(reach, command, tmp_path, monkeypatch):
    module = importlib.import_module(f"sparse_adv.commands.{command}")
    arguments = command, "--arch", "digits_cnn", "--out", str(tmp_path)
    reach(module, "keep_freed_memory", *arguments)
    monkeypatch.setattr(module, "keep_freed_memory", lambda: pytest.fail("kept"))
    reach(experiment, "load_data", *arguments, "--no-keep-freed-memory")


def test_an_evaluation_is_given_every_setting(reach, checkpoint):
    images = {"data": "elsewhere", "limit": 90, "validation": 30.0, "seed": 11, "split": "validation"}
    loaded = reach(experiment, "load_data", "evaluate", checkpoint, *flags(images), "--deterministic")
    assert loaded["config"] == DataConfig("elsewhere", 90, 30.0) and loaded["seed"] == 11 and loaded["is_deterministic"]
    network = NETWORK | {"normalize": "digits"}
    asked = reach(networks, "trained", "evaluate", checkpoint, *flags(network | {"data": "digits"}))
    assert {name: asked[name] for name in network} == network
    read = reach(masks, "load_pruned", "evaluate", checkpoint, *flags(network | {"density": 0.5}))
    assert read["density"] == 0.5 and read["dense"]
    network = NETWORK | {"data": "digits", "device": "cpu"}
    command = "evaluate", checkpoint, *flags(network), "--images", "20", "--split", "train"
    measured = reach(evaluate, "clean_accuracy", *command, "--limit", "90", "--validation", "30", "--seed", "11")
    whole = data.load("digits", limit=90, validation=30, seed=11).train
    assert torch.equal(measured["images"].images, whole.images[:20]) and len(measured["images"].labels) == 20
    strong = {"norm": "l2", "eps": 0.25, "seed": 11}
    made = reach(attacks, "AutoAttack", *command, "--attack", "autoattack", *flags(strong))
    assert {name: made[name] for name in strong} == strong and not made["verbose"]


def test_an_evaluation_bounds_robust_accuracy_by_what_withstands_all_attacks(checkpoint, monkeypatch, capsys):
    """FGSM and PGD-20 break different images; the strongest attack gets those that withstood both.

    The first images are looked at for signs of masked gradients.
    """
    among, looked_at = [], []

    def signs_of_masking(model, images, labels, **ball):
        looked_at.append((images, labels, ball))
        return ["a sign"]

    def measure(model, images, **settings):
        among.append(settings.get("among"))
        return next(rest)

    robust = [torch.tensor([True, *row]) for row in ((True,) * 3, (True, True, False), (False, True, True))]
    found = [
        training.Accuracy(value, 4, 8, 8, robust=rows) for value, rows in zip((0.9, 0.6, 0.5), robust, strict=True)
    ]
    rest = iter([*found, training.Accuracy(0.25, 4, 8, 8)])
    for name in ("clean_accuracy", "fgsm_accuracy", "robust_accuracy"):
        monkeypatch.setattr(evaluate, name, measure)
    monkeypatch.setattr(attacks, "signs_of_masking", signs_of_masking)
    assert main(["evaluate", checkpoint, *flags(NETWORK), "--data", "digits", "--device", "cpu", "--no-json"]) == 0
    told, test = capsys.readouterr().out, data.load("digits").test
    ((images, labels, ball),) = looked_at
    assert torch.equal(images, data.to_unit(test.images[:64])) and torch.equal(labels, test.labels[:64])
    assert ball == {"eps": TrainConfig().eps, "norm": "linf"} and "warning: a sign" in told
    assert "clean 90.0%, fgsm 60.0%, pgd-20 50.0% of " in told and "at most 25.0%: the images that withstood" in told
    assert among[:3] == [None] * 3 and among[3].tolist() == [True, False, True, False]


def test_a_benchmark_is_given_every_setting(reach, checkpoint, tmp_path, monkeypatch):
    needed = {"out": tmp_path / "row", "structure": "weights", "sparsity": 90, "data": "digits", "device": "cpu"}
    network = NETWORK | {"normalize": "digits"}
    asked = reach(networks, "trained", "benchmark", checkpoint, *flags(needed | network))
    assert {name: asked[name] for name in network} == network
    read = reach(masks, "load_pruned", "benchmark", checkpoint, *flags(needed | network | {"density": 0.5}))
    assert read["density"] == 0.5 and read["dense"]
    command = "benchmark", checkpoint, *flags(needed | NETWORK | {"seed": 11, "eps": (0.1, 0.2), "images": 140})
    loaded = reach(experiment, "load_data", *command)
    assert loaded["config"] == DataConfig("digits") and loaded["seed"] == 11
    made = reach(attacks, "AutoAttack", *command)
    assert (made["norm"], made["eps"], made["seed"]) == ("linf", 0.1, 11)
    ran = reach(attacks.AutoAttack, "run_standard_evaluation", *command, "--batch", "30")
    test = data.load("digits").test
    assert torch.equal(ran["x_orig"], data.to_unit(test.images[:140])) and ran["bs"] == 30
    assert ran["state_path"] == tmp_path / "row" / "autoattack_0.1.safetensors"

    score = benchmark.AutoAttackScore(0.1, "AutoAttack", "few", {"clean": 1.0}, 1.0, {}, 1.0, 140.0, [])
    monkeypatch.setattr(benchmark, "_autoattack", lambda *_, **__: score)
    attacked = reach(attacks, "fmn", *command, "--batch", "128")
    assert torch.equal(attacked["images"], data.to_unit(test.images[12:140]))  # the last 128
    assert (attacked["norm"], attacked["steps"], attacked["loss"]) == ("linf", 200, "dlr")


def test_the_benchmarks_minimum_distances_are_linf(monkeypatch):
    x, y = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    moved = x + torch.tensor([0.01, 0.02, 0.2]).view(3, 1, 1, 1)
    moved[0] = 0.9  # misclassified as it is: at distance 0
    monkeypatch.setattr(attacks, "fmn", lambda *_, **__: moved)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([0.015 - x.flatten(1).amax(1), torch.zeros(len(x))], 1)

    measured = benchmark._fmn(model, x, y, 8)
    assert measured.distances == pytest.approx([0.9, 0.02, 0.2])
    assert measured.robust == pytest.approx(2 / 3) and measured.first == 0


def test_a_demo_is_given_every_setting(reach, tmp_path):
    settings = {"out": tmp_path, "epochs": 3, "search_epochs": 2, "density": 0.25, "block": (2, 1), "seed": 11}
    asked = reach(demo, "run", "demo", *flags(settings))
    assert {name: asked[name] for name in settings} == settings


def test_a_report_is_given_every_setting(reach, tmp_path):
    folders = [make(tmp_path / name) for name in ("a", "b")]
    asked = reach(report, "write_report", "report", *map(str, folders), "--out", str(tmp_path), "--level", "0.25")
    assert [run.folder for run in asked["runs"]] == folders and (asked["out"], asked["level"]) == (tmp_path, 0.25)


def test_a_conversion_is_given_every_setting(reach, checkpoint, tmp_path):
    settings = {"masks": tmp_path / "m", "format": "hydra", "density": 0.25, "arch": "digits_cnn", "width": 4}
    asked = reach(masks, "load_pruned", "convert", checkpoint, "x.safetensors", *flags(settings))
    given = [value for name, value in asked.items() if name != "model"]
    assert all(settings[name] in given for name in ("masks", "format", "density"))
    assert asked["model"].conv1.out_channels == models.build("digits_cnn", width=4).conv1.out_channels
    written = reach(masks, "save_ticket", "convert", checkpoint, "x.safetensors", *flags(NETWORK))
    assert written["ticket"].provenance.items() >= NETWORK.items()
    model = models.build("digits_cnn", width=4)
    named = masks.Ticket(masks.prune(model, 0.5), model.state_dict(), {"arch": "another name", "seed": 7})
    masks.save_ticket(tmp_path / "named.safetensors", named)
    written = reach(
        masks, "save_ticket", "convert", str(tmp_path / "named.safetensors"), "x.safetensors", *flags(NETWORK)
    )
    assert written["ticket"].provenance.items() >= (NETWORK | {"seed": 7}).items()
    for form in ("dense", "prune"):
        written = reach(masks, "save_pruned", "convert", checkpoint, str(tmp_path / "x.pt"), "--to", form)
        assert form in written.values() and tmp_path / "x.pt" in written.values()


def test_an_explanation_is_given_every_setting(reach, checkpoint):
    asked = reach(explain, "explain", "explain", checkpoint, *flags(NETWORK), "--batch", "7")
    assert asked["example_input"] == (7, 1, 8, 8)
    asked = reach(explain, "explain", "explain", checkpoint, *flags(NETWORK), "--input-shape", "1,4,6")
    assert asked["example_input"] == (128, 1, 4, 6)
    asked = reach(networks, "agreed", "explain", checkpoint, *flags(NETWORK))
    assert (asked["arch"], asked["width"]) == ("digits_cnn", 4)


def test_defaults_are_those_that_were_published_or_announced():
    paper = {"objective": "fgsm-rs", "epochs": 20, "lr": 0.05, "schedule": "constant", "weight_decay": 1e-4}
    assert search.Options.train == TrainConfig(**paper) and search.Options.prune == PruneConfig()
    assert search.Options.network == NetworkConfig("resnet18") and search.Options.data == DataConfig()
    assert (train.Options.train, train.Options.method) == (TrainConfig(), MethodConfig())
    measured = evaluate.Options
    assert (evaluate.STEPS, evaluate.RESTARTS, measured.split) == (20, 1, "test")
    assert (evaluate.BOUND_STEPS, evaluate.BOUND_RESTARTS, evaluate.CHECKED_IMAGES) == (50, 5, 64)
    assert explain.Options.batch == 128
    own = {field.name: field.default for field in fields(importlib.import_module("sparse_adv.commands.demo").Options)}
    given = {name: each.default for name, each in inspect.signature(demo.run).parameters.items() if name != "out"}
    assert {name: own[name] for name in given} == given
    assert given == {"epochs": 12, "search_epochs": 6, "density": 0.1, "block": (1, 1), "seed": 0}
    digits = {"epochs": 12, "lr": 0.2, "warmup_epochs": 3, "eps": 0.2}
    cheap = {"objective": "fgsm-rs", "epochs": 6, "lr": 0.05, "warmup_epochs": 0, "schedule": "constant"}
    assert TrainConfig(**digits) == demo.TRAINING and TrainConfig(**digits | cheap) == demo.SEARCH
    assert DataConfig("digits", validation=300, batch_size=64) == demo.IMAGES


def test_the_form_of_the_output_is_no_setting_of_a_run(tmp_path):
    written = out_folder.flat(train.Options(tmp_path, json=True, train=TrainConfig(milestones=(0.25,))))
    assert "json" not in written and "config" not in written
    assert written["milestones"] == [0.25] and written["out"] == str(tmp_path) and written["ticket"] is None


def test_only_the_first_process_prints(monkeypatch, capsys):
    for rank, told in ((0, "a\n"), (1, "")):
        monkeypatch.setattr(output.distributed, "rank", lambda rank=rank: rank)
        output.Output(False).print("a", {})
        assert capsys.readouterr().out == told


def test_a_progress_bar_counts_the_updates_of_all_rounds_and_of_an_earlier_call(monkeypatch):
    class Bar(nullcontext):
        def __init__(self, total, **_):
            super().__init__(self)
            self.total, self.n = total, 0

        def update(self, count):
            self.n += count

    tqdm = pytest.importorskip("tqdm", reason="tqdm draws the bar")
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    shown = output.Output(False)
    with shown.progress(20) as step:
        for count in (6, 7, 8):  # five updates were made in an earlier call
            step(count)
        assert (shown._bar.n, shown._bar.total) == (8, 20)
        step(1)  # of the next round
        assert shown._bar.n == 9


def test_a_search_of_single_weights_permutes_no_channels(tmp_path, capsys):
    assert main(["search", "--arch", "digits_cnn", "--permute-channels", "--out", str(tmp_path / "run")]) == 2
    assert "--permute-channels has no effect with blocks of one weight" in capsys.readouterr().err
