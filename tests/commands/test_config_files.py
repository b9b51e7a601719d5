"""Config files: every key is a flag, flags win, and what is wrong is told in one sentence."""

import pytest
import yaml
from helpers.refusal import refused

from sparse_adv.__main__ import main
from sparse_adv.config import OBJECTIVES


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
        ("epochs: .inf\n", "whole number, got inf"),
        ("lr: 1" + "0" * 400 + "\n", "a fraction such as 8/255, got 1000"),
        ("lr: on\n", "a fraction such as 8/255, got True"),
        ("1: 2\n", "run.yaml: there is no option '1'"),
        ("train:\n  lr: 0.1\n", "run.yaml: there is no option 'train'"),
        ("? [lr]\n: 2\n", "run.yaml: there is no option 'a list'"),
        ("config: other.yaml\n", "run.yaml has the key 'config', which is for the command line only"),
        ("augment: maybe\n", "run.yaml: augment must be true or false, got 'maybe'"),
        ("milestones: {a: 1}\n", "milestones must be numbers separated by commas, got {'a': 1}"),
        ("objective: fgms\n", f"objective must be one of {', '.join(OBJECTIVES)}, got 'fgms'"),
        ("- epochs\n", "run.yaml must be a YAML mapping from options to values"),
        ("", "run.yaml must be a YAML mapping from options to values"),
        ("limit: \n", "run.yaml: limit has no value: write null for none"),
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
@pytest.mark.parametrize("null", ["null", "~"])
def test_null_stands_for_the_default_of_an_optional_setting(tmp_path, capsys, key, null):
    (tmp_path / "run.yaml").write_text(f"{key}: {null}\n")
    with pytest.raises(SystemExit) as end:
        main(["search", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert end.value.code == 0
    told = yaml.safe_load(capsys.readouterr().out)
    assert key in told and told[key] is None
