"""`search`, `train`, `evaluate`, `report` and `convert`, as somebody uses them; wrong flags."""

import resource
import shutil

import pytest
import torch
import yaml
from helpers.digit_runs import NETWORK, QUICK, lines
from helpers.refusal import refused
from helpers.run_folders import FILES
from PIL import Image

from sparse_adv import masks, models, runs
from sparse_adv.__main__ import main
from sparse_adv.config import NetworkConfig
from sparse_adv.training import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A ticket with the weights that its search trained."""
    out = tmp_path_factory.mktemp("kept")
    assert main(["search", *NETWORK, *QUICK, "--epochs", "1", "--keep-weights", "--out", str(out)]) == 0
    return out / runs.TICKET


def test_a_search_leaves_a_ticket_and_how_it_came_about(searched):
    run, ticket = runs.read(searched), masks.load_ticket(searched / runs.TICKET)
    assert masks.density(ticket.masks) == pytest.approx(0.3, abs=0.01)
    assert masks.largest_block(ticket.masks["conv2"])[:2] == (2, 1)
    assert ticket.provenance["arch"] == "digits_cnn" and ticket.provenance["width"] == 8
    assert run.result.checks.reset and run.result.density.macs < 1
    assert run.info.kind == "search" and len(run.records) == 2


def test_a_ticket_names_network_and_cost_of_the_run_that_trains_it(trained, searched):
    run, search = runs.read(trained), runs.read(searched)
    assert run.name == "a ticket" and run.info.network == NetworkConfig("digits_cnn", 8)
    assert run.info.before == search.result.total and run.result.total.macs > search.result.total.macs
    assert run.result.checks.pruned_weights_zero and run.result.test["clean"] > 0.1
    assert {runs.LAST, runs.BEST, runs.STATE, "config.yaml"} <= {file.name for file in trained.iterdir()}


def test_the_same_command_again_says_the_same_at_once_and_may_rename_the_run(trained, searched, tmp_path, capsys):
    ticket, folder = ("--ticket", str(searched / runs.TICKET)), shutil.copytree(trained, tmp_path / "run")
    before = (folder / runs.STATE).stat().st_mtime_ns
    for naming in (("--name", "another name"), ()):
        main(["train", *ticket, "--limit", "200", *QUICK, *naming, "--out", str(folder)])
        assert lines(capsys)[-1]["test"] == runs.read(trained).result.test
        assert (folder / runs.STATE).stat().st_mtime_ns == before and runs.read(folder).name == "another name"


def test_a_folder_holds_one_run(trained, searched, capsys):
    ticket = ("--ticket", str(searched / runs.TICKET))
    said = refused(capsys, "train", *ticket, "--limit", "200", *QUICK, "--lr", "0.5", "--out", str(trained))
    assert "take another folder" in said and "train.lr 0.1, now 0.5" in said


@pytest.mark.parametrize("control", ["--reinit", "--shuffle"])
def test_controls_change_one_thing(searched, tmp_path, control):
    ticket = masks.load_ticket(searched / runs.TICKET)
    arguments = ["train", "--ticket", str(searched / runs.TICKET), "--limit", "200", *QUICK, "--lr", "0", "--out"]
    main([*arguments, str(tmp_path / "plain")])
    main([*arguments, str(tmp_path / "control"), control])
    plain, changed = (checkpoint.read_weights(tmp_path / run / runs.LAST)[0] for run in ("plain", "control"))
    same_mask = changed["conv2.weight_mask"].equal(ticket.masks["conv2"])
    both = plain["conv2.weight_mask"] & changed["conv2.weight_mask"]
    same_weights = changed["conv2.weight"][both].equal(plain["conv2.weight"][both])
    assert (same_mask, same_weights) == ((True, False) if control == "--reinit" else (False, True))
    assert changed["conv2.weight_mask"].sum() == plain["conv2.weight_mask"].sum()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ((), None),
        (("--seed", "1"), "seed 0, now 1"),
        (("--validation", "0.2"), "validation None, now 0.2"),
        (("--seed", "1", "--reinit"), None),
    ],
)
def test_validation_images_that_kept_weights_were_trained_on_are_told(kept, tmp_path, caplog, changed, told):
    arguments = ("--limit", "200", *QUICK, "--epochs", "1", *changed, "--out", str(tmp_path))
    assert main(["train", "--ticket", str(kept), *arguments]) == 0
    warnings = [message for message in caplog.messages if "were trained with other settings" in message]
    assert all(f"{kept} has weights" in each and f"({told})" in each for each in warnings)
    assert len(warnings) == (told is not None)


def test_rewound_weights_may_be_trained_with_any_seed(searched, tmp_path, caplog):
    arguments = ("--limit", "200", *QUICK, "--seed", "1", "--out", str(tmp_path))
    assert main(["train", "--ticket", str(searched / runs.TICKET), *arguments]) == 0
    assert "were trained with other settings" not in caplog.text


def test_convert_replaces_neither_what_it_reads_nor_a_file_of_a_run(searched, tmp_path, capsys):
    ticket = str(searched / runs.TICKET)
    before = {file: file.read_bytes() for file in searched.iterdir() if file.is_file()}
    assert set(before) <= {searched / name for name in FILES}
    for target in (searched / name for name in FILES):
        said = refused(capsys, "convert", ticket, str(target), "--to", "dense")
        assert f"target must not replace a file that is read, or one of a run, got {target}" in said
    own = shutil.copy(ticket, tmp_path / "own.safetensors")
    (tmp_path / "link.safetensors").symlink_to(own)
    for source, target, *more in ((own, own), (own, tmp_path / "link.safetensors"), (ticket, own, "--masks", own)):
        assert "target must not replace a file that is read" in refused(
            capsys, "convert", *map(str, (source, target, *more))
        )
    assert before == {file: file.read_bytes() for file in searched.iterdir() if file.is_file()}
    assert main(["convert", ticket, str(searched / "mine.pt"), "--to", "dense"]) == 0
    (searched / "mine.pt").unlink()


def test_report_speaks_to_people_and_to_programs(trained, searched, tmp_path, capsys):
    assert main(["report", str(searched), str(trained), "--out", str(tmp_path), "--no-json"]) == 0
    assert "| a ticket" in capsys.readouterr().out
    assert main(["report", str(searched), str(trained), "--out", str(tmp_path)]) == 0
    told = lines(capsys)
    assert [line.get("name") for line in told] == ["search", "a ticket", None]
    assert main(["report", str(searched), str(tmp_path), str(searched.parent), "--out", str(tmp_path)]) == 0
    assert [line.get("name") for line in lines(capsys)] == ["search", None]
    assert [line["epoch"] for line in told[:2]] == [2, 2] and told[1]["result"]["test"]  # of each the last epoch
    assert (tmp_path / "report.md").exists() and (tmp_path / "accuracy.png").exists()


def test_convert_goes_there_and_back(searched, tmp_path, capsys):
    ticket, prune = str(searched / runs.TICKET), str(tmp_path / "prune.pt")
    assert main(["convert", ticket, prune, "--to", "prune"]) == 0
    assert "conv1.weight_orig" in torch.load(prune, weights_only=True)
    assert main(["convert", prune, str(tmp_path / "back.safetensors"), "--arch", "digits_cnn", "--width", "8"]) == 0
    back = masks.load_ticket(tmp_path / "back.safetensors")
    assert all(mask.equal(back.masks[name]) for name, mask in masks.load_ticket(ticket).masks.items())
    assert main(["explain", str(tmp_path / "back.safetensors")]) == 0


def test_the_converted_weights_of_a_run_are_read_as_the_run_is(trained, tmp_path, capsys):
    target = str(tmp_path / "a.safetensors")
    assert main(["convert", str(trained / runs.BEST), target]) == 0
    capsys.readouterr()
    told = []
    for what in (str(trained), target):
        assert main(["explain", what]) == 0
        told.append(capsys.readouterr().out)
        assert main(["evaluate", what, "--steps", "2", "--split", "validation", "--device", "cpu"]) == 0
        measured = lines(capsys)[0]
        told.append({name: measured[name] for name in measured if name not in ("what", "weights", "epoch")})
    assert told[:2] == told[2:] and told[1]["eps"] == 0.1
    assert main(["train", "--ticket", target, "--limit", "200", *QUICK, "--out", str(tmp_path / "more")]) == 0
    begun, more = runs.read(trained), runs.read(tmp_path / "more").info
    best = runs.best(begun.records, begun.info.train)
    assert (more.network, more.before) == (begun.info.network, best.total)
    assert tuple(more.block) == tuple(begun.info.block) == (2, 1, 1, 1)


def test_every_flag_of_convert_reaches_its_use(searched, tmp_path, monkeypatch, capsys):
    ticket, seen = masks.load_ticket(searched / runs.TICKET), []

    def load_pruned(source, masks_file, *, model, **given):
        seen.append((str(source), str(masks_file), model.conv1.out_channels, given))
        return ticket

    monkeypatch.setattr(masks, "load_pruned", load_pruned)
    given = {"masks": "m.npy", "density": 0.3, "format": "hydra", "arch": "digits_cnn", "width": 6}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["convert", "a.pt", str(tmp_path / "b.safetensors"), *flags]) == 0
    assert seen == [("a.pt", "m.npy", 6, {"density": 0.3, "format": "hydra", "dense": False})]
    assert (
        masks.load_ticket(tmp_path / "b.safetensors").provenance.items() >= {"arch": "digits_cnn", "width": 6}.items()
    )
    assert lines(capsys)[0]["density"] == masks.density(ticket.masks)


@pytest.mark.parametrize(
    ("command", "said"), [("train", "test accuracy clean"), ("search", "keeps 20.0% of the weights")]
)
def test_epochs_are_told_to_people_in_words(tmp_path, capsys, command, said):
    main([command, *NETWORK, *QUICK, "--out", str(tmp_path / "run"), "--no-json"])
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("epoch 1: loss ") and "robust" in first
    assert second.startswith("epoch 2: loss ") and said in last


def test_a_runs_own_config_continues_it(trained, capsys):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["out"] == str(trained)
    assert main(["train", "--config", str(trained / "config.yaml")]) == 0
    assert lines(capsys)[-1]["run"] == str(trained)


def test_a_search_that_refuses_other_images_leaves_its_config_as_it_was(tmp_path, capsys):
    for name, shade in (("first", 0), ("second", 100)):
        for number in range(24):
            file = tmp_path / name / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + number).save(file)
    out = tmp_path / "run"
    arguments = ("search", "--arch", "digits_cnn", *QUICK, "--out", str(out), "--data")
    assert main([*arguments, str(tmp_path / "first")]) == 0
    config = (out / runs.CONFIG).read_text()
    assert "other training images" in refused(capsys, *arguments, str(tmp_path / "second"))
    assert (out / runs.CONFIG).read_text() == config
    assert main(["search", "--config", str(out / runs.CONFIG)]) == 0


def test_a_round_of_a_search_is_evaluated_with_its_network_and_images(searched, capsys):
    assert main(["evaluate", str(searched / "round_1"), "--steps", "1"]) == 0
    (line,) = lines(capsys)
    assert line["data"] == "digits" and line["clean"] > 0.1


def test_a_folder_that_weights_cannot_be_read_from_is_refused_before_training(tmp_path, capsys):
    out = tmp_path / b"run\xff".decode(errors="surrogateescape")
    said = refused(capsys, "train", *NETWORK, *QUICK, "--out", str(out))
    assert "folder must have a name in UTF-8, got " in said and not out.exists()


def test_missing_flags_and_arguments_are_named_as_they_are_given(capsys):
    assert refused(capsys, "train", "--arch", "digits_cnn").endswith("error: missing: --out\n")
    said = refused(capsys, "benchmark", "masks.safetensors")
    assert said.endswith("error: missing: --out, --structure, --sparsity, --data\n")
    assert refused(capsys, "convert", "a.pt").endswith("error: missing: target\n")


@pytest.mark.parametrize(
    ("to", "name", "suffixes"),
    [
        ("ticket", "a.pt", "*.safetensors"),
        ("ticket", "a.foo", "*.safetensors"),
        ("dense", "a.foo", "*.safetensors or *.pt or *.pth"),
        ("prune", "a", "*.safetensors or *.pt or *.pth"),
    ],
)
def test_the_name_of_what_is_converted_is_checked_before_the_source_is_read(tmp_path, capsys, to, name, suffixes):
    target = tmp_path / name
    said = refused(capsys, "convert", "nowhere.pt", str(target), "--to", to)
    assert f"target must be {suffixes} for --to {to}, got {target}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epoch", "3"], "there is no option '--epoch'; did you mean '--epochs'?"),
        (["--max_grad_norm=1"], "there is no option '--max_grad_norm'; did you mean '--max-grad-norm'?"),
        (["--epochs", "many"], "error: --epochs must be a whole number, got 'many'"),
        (["--epochs"], "error: --epochs: expected one argument"),
        (["--augment=maybe"], "error: --augment: ignored explicit argument 'maybe'"),
        (["stray"], "nrecognized arguments: stray"),
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--arch", "resnet"], "resnet18"),
        (["--arch", "digits_cnn", "--eps", "1/0"], "1/0"),
        (["--arch", "digits_cnn", "--reinit"], "--ticket"),
        (["--arch", "digits_cnn", "--norm", "l2"], "--norm l2 needs its own --eps: the default 0.0313725 is for linf"),
        (["--arch", "digits_cnn", "--device", "tpu"], "auto, cpu, cuda or a GPU such as cuda:0, got 'tpu'"),
        (["--ticket", "nowhere"], "nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([], "name one with --arch"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(tmp_path, capsys, arguments, said):
    assert said in refused(capsys, "train", *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_explain_takes_the_folder_of_a_run(searched, trained, tmp_path, capsys):
    """Of a search its ticket, of a training run its best weights, which have no network in the file."""
    told = []
    for what in (searched, searched / runs.TICKET, trained, trained / runs.BEST, trained / runs.LAST):
        assert main(["explain", str(what)]) == 0
        told.append([(row.get("layer"), row.get("macs"), row.get("density")) for row in lines(capsys)])
    assert all(each == told[0] for each in told) and len(told[0]) == 5
    assert f"{tmp_path} has neither a ticket nor weights" in refused(capsys, "explain", str(tmp_path))
    dense = tmp_path / "dense"
    assert main(["train", *NETWORK, *QUICK, "--out", str(dense)]) == 0
    capsys.readouterr()
    assert (
        main(["explain", str(dense)]) == 0 and lines(capsys)[-1].items() >= {"density": 1.0, "mac_density": 1.0}.items()
    )


@pytest.mark.parametrize("name", [runs.BEST, runs.LAST])
def test_pruned_weights_of_a_run_are_trained_on_under_their_masks(trained, tmp_path, capsys, name):
    out = tmp_path / "more"
    words = ("--ticket", str(trained / name), "--limit", "200", *QUICK, "--lr", "0", "--out", str(out))
    assert main(["train", *words]) == 0
    first, second = (checkpoint.read_weights(path)[0] for path in (trained / name, out / runs.LAST))
    assert all(second[key].equal(value) for key, value in first.items() if "weight" in key)
    begun, more = runs.read(trained), runs.read(out)
    record = begun.records[-1] if name == runs.LAST else runs.best(begun.records, begun.info.train)
    assert more.info.network == begun.info.network and more.info.before == record.total


def test_a_ticket_for_other_images_is_refused_with_their_name(searched, tmp_path, capsys):
    run = ["train", "--out", str(tmp_path / "run"), "--ticket", str(tmp_path / "a.safetensors")]
    ticket = masks.load_ticket(searched / runs.TICKET)
    larger = ticket.provenance | {"data": "mine", "input_shape": [1, 28, 28]}
    masks.save_ticket(tmp_path / "a.safetensors", masks.Ticket(ticket.masks, ticket.state_dict, larger))
    said = refused(capsys, *run)
    assert "a.safetensors is for images of shape [1, 28, 28] of mine, those of digits have shape [1, 8, 8]" in said
    model = models.build("digits_cnn", width=8, input_shape=(3, 8, 8))
    colour = masks.Ticket(masks.prune(model, 0.5), model.state_dict(), {"arch": "digits_cnn", "width": 8})
    masks.save_ticket(tmp_path / "a.safetensors", colour)
    said = refused(capsys, *run)
    assert "is for images of 3 channels, those of digits have shape [1, 8, 8]: name its images with --data" in said


def test_a_ticket_for_another_network_is_refused(searched, tmp_path, capsys):
    ticket = ("--ticket", str(searched / runs.TICKET), "--out", str(tmp_path / "run"))
    assert "--width 4 does not fit" in refused(capsys, "train", *ticket, "--width", "4")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((searched / runs.TICKET).read_bytes()[:-100])
    assert "damaged.safetensors" in refused(capsys, "train", "--ticket", str(damaged), "--out", str(tmp_path / "run"))


def test_a_full_disk_and_a_diverged_loss_lose_nothing(tmp_path, capsys):
    run = ["train", *NETWORK, *QUICK, "--out", str(tmp_path / "run")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a larger file is refused, as on a full disk
    try:
        assert "File too large" in refused(capsys, *run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]
    assert main(run) == 0
    assert runs.read(tmp_path / "run").result
    said = refused(capsys, "train", *NETWORK, *QUICK, "--lr", "1e30", "--out", str(tmp_path / "diverged"))
    assert "training diverged in epoch 1" in said
