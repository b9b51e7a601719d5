"""Config files: every key is a flag, flags win, and what is wrong is told in one sentence."""

import os

import pytest
import torch
import yaml
from helpers.refusal import refused
from safetensors.torch import save_file

from sparse_adv import models, runs
from sparse_adv.__main__ import main
from sparse_adv.commands import evaluate, options, out_folder, train
from sparse_adv.config import OBJECTIVES, TrainConfig


def parsed(command, *words: object):
    """The options that a command makes of its arguments."""
    parser = options.parser_of(command.__name__.rpartition(".")[2], command.Options, True)
    return options.parse(parser, command.Options, list(map(str, words)))


def test_every_key_of_a_config_is_a_flag_and_flags_win(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "arch: digits_cnn\nwidth: 8\neps: 8/255\nmilestones: [0.25, 0.5]\n"
        "overfitting_monitor: false\nlimit: 200\nepochs: 7\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["train", "--config", str(config), "--epochs", "1", "--out", str(tmp_path / "run"), "--print_config"])
    assert end.value.code == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert told["width"] == 8 and told["eps"] == pytest.approx(8 / 255) and told["milestones"] == [0.25, 0.5]
    assert told["overfitting_monitor"] is False and told["epochs"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epoch: 3\n", "run.yaml: there is no option 'epoch'; did you mean 'epochs'?"),
        ("epochs: many\n", "whole number, got 'many'"),
        ("epochs: yes\n", "whole number, got True"),
        ("epochs: 2.5\n", "epochs must be a whole number, got 2.5"),
        ("epochs: .inf\n", "whole number, got '.inf'"),
        ("lr: 1" + "0" * 400 + "\n", "lr must be finite and at least 0, got inf"),
        ("lr: on\n", "a fraction such as 8/255, got True"),
        ("1: 2\n", "run.yaml: there is no option '1'"),
        ("train:\n  lr: 0.1\n", "run.yaml: there is no option 'train'"),
        ("? [lr]\n: 2\n", "run.yaml: there is no option 'a list'"),
        ("config: other.yaml\n", "run.yaml has the key 'config', which is for the command line only"),
        ("augment: maybe\n", "run.yaml: augment must be true or false, got 'maybe'"),
        ("milestones: {a: 1}\n", "milestones must be numbers separated by commas, got {'a': '1'}"),
        ("objective: fgms\n", f"objective must be one of {', '.join(OBJECTIVES)}, got 'fgms'"),
        ("- epochs\n", "run.yaml must be a YAML mapping from options to values"),
        ("", "run.yaml must be a YAML mapping from options to values"),
        ("\n".join(f"k{i}: 1" for i in range(600)), "must have at most 500 values"),
        ("epochs: [1\n", "run.yaml is not YAML"),
    ],
)
def test_wrong_configs_are_told_in_a_sentence(tmp_path, capsys, content, said):
    (tmp_path / "run.yaml").write_text(content)
    assert said in refused(capsys, "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path))


@pytest.mark.parametrize("content", ["lr: 0.1\nlr: 0.2\n", "- epochs\n"])
def test_a_config_is_checked_in_both_spellings_of_its_flag(tmp_path, capsys, content):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    out = ("--out", str(tmp_path / "run"))
    said = refused(capsys, "train", "--config", str(config), *out)
    assert said == refused(capsys, "train", f"--config={config}", *out) and str(config) in said


@pytest.mark.parametrize("key", ["augment", "width", "limit", "validation"])
@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_stands_for_the_default_of_an_optional_setting(tmp_path, capsys, key, null):
    (tmp_path / "run.yaml").write_text(f"{key}: {null}\n")
    with pytest.raises(SystemExit) as end:
        main(["search", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert end.value.code == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert key in told and told[key] is None


@pytest.mark.parametrize("joined", [False, True])
def test_flags_and_positions_win_wherever_the_file_is_named(tmp_path, joined):
    base, more = tmp_path / "base.yaml", tmp_path / "more.yaml"
    base.write_text("epochs: 3\neps: 0.2\narch: digits_cnn\n")
    more.write_text("eps: 0.3\nlr: 0.5\n")
    files = [f"--config={base}", f"--config={more}"] if joined else ["--config", base, "--config", more]
    for words in (["--epochs", 1, "--out", "a", *files], [*files, "--epochs", 1, "--out", "a"]):
        run = parsed(train, *words)
        assert (run.train.epochs, run.train.eps, run.train.lr, run.arch) == (1, 0.3, 0.5, "digits_cnn")
    (tmp_path / "what.yaml").write_text("what: a\nsplit: train\n")
    for words in (["k", "--config", tmp_path / "what.yaml"], ["--config", tmp_path / "what.yaml", "k"]):
        assert (str(parsed(evaluate, *words).what), parsed(evaluate, *words).split) == ("k", "train")
    assert str(parsed(evaluate, "--config", tmp_path / "what.yaml").what) == "a"


@pytest.mark.parametrize(
    "name", ["1e3", "2024_01", "007", "1_0", "0x1f", "1:30", "2024-01-02", ".inf", "=", "null", "yes"]
)
def test_names_of_folders_and_files_stay_as_they_are(tmp_path, name):
    (tmp_path / "run.yaml").write_text("".join(f"{key}: '{name}'\n" for key in ("out", "data", "name", "ticket")))
    run = parsed(train, "--config", tmp_path / "run.yaml")
    assert (str(run.out), run.data.data, run.name, str(run.ticket)) == (name,) * 4
    out_folder.write_config(tmp_path, run)
    assert parsed(train, "--config", tmp_path / runs.CONFIG) == run
    if name not in ("null", "yes"):  # which are no text in YAML
        (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("'", ""))
        assert parsed(train, "--config", tmp_path / "run.yaml") == run


@pytest.mark.parametrize("key", ["limit", "validation", "width", "alpha", "beta", "scope", "drop_fraction"])
def test_the_word_null_undoes_the_value_of_a_file(tmp_path, key):
    (tmp_path / "run.yaml").write_text(f"{key}: {'erk' if key == 'scope' else 1}\nmethod: rigl\nobjective: trades\n")
    words = "--out", "a", "--config", tmp_path / "run.yaml"
    file, undone = (
        out_folder.flat(parsed(train, *words, *more)) for more in ((), (f"--{key.replace('_', '-')}", "null"))
    )
    assert file[key] is not None and undone == file | {key: None}


def test_a_recipe_serves_another_objective_when_its_settings_are_undone(capsys):
    words = "--config", "recipe:fastat-nu-at", "--objective", "pgd", "--out", "a"
    said = refused(capsys, "train", *words)
    assert "--beta 4.0 has no effect with objective 'pgd': leave it out, or at its default null" in said
    run = parsed(train, *words, "--beta", "null", "--validation", "null")
    assert (run.train.beta, run.data.validation, run.train.ema_decay) == (None, None, 0.9995)


@pytest.mark.parametrize(("given", "known"), [("L2", "l2"), ("Linf", "linf")])
def test_a_norm_may_be_written_as_torchattacks_writes_it(tmp_path, given, known):
    (tmp_path / "run.yaml").write_text(f"norm: {given}\n")
    for words in (("--norm", given), ("--config", tmp_path / "run.yaml")):
        assert parsed(train, "--out", "a", *words, "--eps", "0.5").train.norm == known
        assert parsed(evaluate, "a", *words).norm == known


def test_one_milestone_needs_no_list(tmp_path):
    for content in ("milestones: 0.5", "milestones: [0.5]", "milestones: '0.5'"):
        (tmp_path / "run.yaml").write_text(content)
        assert parsed(train, "--out", "a", "--config", tmp_path / "run.yaml").train == TrainConfig(milestones=(0.5,))


@pytest.mark.parametrize("given", ["5e1", "50.0", "+50", "5_0"])
def test_a_whole_number_may_be_written_in_other_ways(tmp_path, given):
    (tmp_path / "run.yaml").write_text(f"epochs: {given}\n")
    for words in (("--epochs", given), ("--config", tmp_path / "run.yaml")):
        assert parsed(train, "--out", "a", *words).train.epochs == 50


@pytest.mark.parametrize("command", ["search", "train"])
def test_a_config_file_of_ones_own_is_not_replaced(tmp_path, capsys, command):
    own = tmp_path / runs.CONFIG
    own.write_text("# my notes\narch: digits_cnn\nlimit: 60\nepochs: 1\n")
    said = refused(capsys, command, "--config", str(own), "--out", str(tmp_path))
    assert f"{own} would be replaced by the one that the run writes" in said
    assert own.read_text().startswith("# my notes") and list(tmp_path.iterdir()) == [own]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("no-augment: true", "has the key 'no_augment': write 'augment: false'"),
        ("no_engine: false", "has the key 'no_engine': write 'engine: false'"),
        ("keep_freed_memory: null", "keep_freed_memory must be true or false, got 'null'"),
    ],
)
def test_a_switch_is_named_without_no_and_has_a_value(tmp_path, capsys, content, said):
    (tmp_path / "c.yaml").write_text(content)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err


def test_what_was_typed_is_named(tmp_path, capsys):
    """The flag, and not the argument in Python that it is given to; where a list has spaces, what to write instead."""
    (tmp_path / "file").touch()
    train = ("train", "--arch", "digits_cnn", "--out")
    out, file = str(tmp_path / "run"), str(tmp_path / "file")
    assert "error: --limit must be from 2 to the" in refused(capsys, *train, out, "--limit", "1")
    assert "error: --interval must be" in refused(capsys, *train, out, "--method", "rigl", "--interval", "0")
    assert "error: --epochs must be a whole number" in refused(capsys, *train, out, "--epochs", "many")
    said = refused(capsys, *train, out, "--milestones", "0.5", "0.75")
    assert "error: --milestones must be numbers separated by commas: write --milestones 0.5,0.75" in said
    assert f"error: --config {out}/a: there is no such file" in refused(capsys, *train, out, "--config", f"{out}/a")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        said = refused(capsys, *train, out, "--config", str(tmp_path / name))
        assert f"error: --config {tmp_path / name} is not a regular file: save its content to one first" in said
    for command in (train, ("search", "--arch", "digits_cnn", "--out"), ("demo", "--out"), ("report", out, "--out")):
        said = refused(capsys, *command, f"{file}/a")
        assert f"error: --out must be a folder, got {file}/a, where {file} is a file" in said
    torch.save(models.build("digits_cnn", width=4).state_dict(), tmp_path / "a.pt")
    save_file({"a": torch.zeros(1)}, file)
    network = ("--arch", "digits_cnn", "--width", "4", "--data", "digits", "--images", "4")
    said = refused(capsys, "evaluate", str(tmp_path / "a.pt"), *network, "--attack", "autoattack", "--state", file)
    assert f"error: --state {file} is no state of AutoAttack: it lacks the key 'sparse_adv_autoattack'" in said


def test_a_config_file_of_another_command_is_recognised(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("reinit: true\n")
    said = refused(capsys, "search", "--config", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"))
    assert "'reinit' is an option of `train`, not of this command" in said and "did you mean" not in said
