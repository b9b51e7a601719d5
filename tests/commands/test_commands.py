"""`search`, `train`, `evaluate`, `report` and `convert`, as somebody uses them; wrong flags."""

import json
import resource
import shutil

import pytest
import torch
import yaml
from helpers.refusal import refused

from sparse_adv import experiment, masks, models, runs, training
from sparse_adv.__main__ import main
from sparse_adv.commands import evaluate
from sparse_adv.commands.output import Output
from sparse_adv.config import NetworkConfig
from sparse_adv.training import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

NETWORK = ("--arch", "digits_cnn", "--width", "8", "--limit", "200")
QUICK = ("--epochs", "2", "--eps", "0.1", "--objective", "fgsm-rs", "--evaluation-steps", "2")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "search"
    assert main(["search", *NETWORK, *QUICK, "--density", "0.3", "--block", "2,1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(searched):
    """On the CPU, where an evaluation repeats to the last image."""
    out = searched.parent / "train"
    ticket = ("--ticket", str(searched / runs.TICKET), "--device", "cpu")
    assert main(["train", *ticket, "--limit", "200", *QUICK, "--name", "a ticket", "--out", str(out)]) == 0
    return out


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


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


def test_the_same_command_again_says_the_same_at_once(trained, searched, capsys):
    ticket = ("--ticket", str(searched / runs.TICKET))
    before = (trained / runs.STATE).stat().st_mtime_ns
    main(["train", *ticket, "--limit", "200", *QUICK, "--name", "another name", "--out", str(trained)])
    assert lines(capsys)[-1]["test"] == runs.read(trained).result.test
    assert (trained / runs.STATE).stat().st_mtime_ns == before


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


def test_evaluate_measures_a_run_as_the_run_did(trained, capsys, tmp_path):
    arguments = ["evaluate", str(trained), "--device", "cpu", "--out", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    (found,) = lines(capsys)
    test = runs.read(trained).result.test
    assert {name: found[name] for name in test} == test and found["eps"] == 0.1
    assert found["robust"] <= min(test.values()) and "robust accuracy is at most" in found["meaning"]
    assert found["warnings"] == []
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert main([*arguments, "--steps", "5", "--restarts", "3", "--split", "validation", "--images", "15"]) == 0
    (found,) = lines(capsys)
    assert found["images"] == 15 and found["pgd-5 x 3"] <= found["clean"]


def test_the_bound_of_evaluate_is_what_withstood_every_attack(trained, capsys, monkeypatch):
    """Each attack alone breaks another of six images."""
    seen = {}

    def measured(broken=None):
        def accuracy(model, images, among=None, **settings):
            robust = torch.arange(6) != broken if broken else torch.ones(6, dtype=torch.bool)
            if among is not None:
                seen["among"], robust = among, robust & among
            return training.Accuracy(float(robust.float().mean()), 6, 6, 6, robust=robust)

        return accuracy

    monkeypatch.setattr(evaluate, "clean_accuracy", measured())
    monkeypatch.setattr(evaluate, "fgsm_accuracy", measured(1))
    in_turn = iter((measured(2), measured(3)))
    monkeypatch.setattr(evaluate, "robust_accuracy", lambda *args, **settings: next(in_turn)(*args, **settings))
    assert main(["evaluate", str(trained), "--images", "6"]) == 0
    assert seen["among"].tolist() == [True, False, False, True, True, True]
    assert lines(capsys)[0]["robust"] == 0.5


def test_evaluate_names_the_ticket_of_a_search_and_the_weights_that_a_run_lacks(searched, trained, tmp_path, capsys):
    assert f"{searched} is a search: evaluate its ticket.safetensors" in refused(capsys, "evaluate", str(searched))
    run = shutil.copytree(trained, tmp_path / "run")
    (run / runs.BEST).unlink()
    said = refused(capsys, "evaluate", str(run))
    assert str(run / runs.BEST) in said and "search" not in said


@pytest.mark.parametrize("weights", ["best", "last"])
def test_every_flag_of_evaluate_reaches_its_use(trained, tmp_path, capsys, monkeypatch, weights):
    folder = shutil.copytree(trained, tmp_path / "run")
    state, metadata = checkpoint.read_weights(folder / runs.BEST)
    checkpoint.write_weights(
        folder / runs.BEST, {key: 0 * value if "bias" in key else value for key, value in state.items()}, metadata
    )
    expected = checkpoint.read_weights(folder / (runs.LAST if weights == "last" else runs.BEST))[0]
    seen = []

    def measure(model, images, **settings):
        assert all(value.equal(expected[key]) for key, value in model.state_dict().items())
        seen.append((len(images.labels), settings))
        return training.Accuracy(0.5, 7, 7, 7, robust=torch.ones(7, dtype=torch.bool))

    for name in ("clean_accuracy", "fgsm_accuracy", "robust_accuracy"):
        monkeypatch.setattr(evaluate, name, measure)
    ball, step = {"eps": 0.07, "norm": "l2"}, {"alpha": 0.03, "seed": 5}
    given = {"weights": weights, "split": "validation", "images": 7, "restarts": 2, "steps": 3, **ball, **step}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["evaluate", str(folder), "--device", "cpu", *flags]) == 0
    (found,) = lines(capsys)
    strongest = {"steps": 50, "restarts": 5, "loss": "margin", "early_stop": True}
    wanted = [{}, ball, {**ball, **step, "steps": 3, "restarts": 2}, {**ball, **step, **strongest}]
    assert [count for count, _ in seen] == [7] * 4
    for (_, settings), needed in zip(seen, wanted, strict=True):
        assert {name: settings.get(name) for name in needed} == needed
    assert found["eps"] == 0.07 and found["norm"] == "l2" and found["split"] == "validation" and "pgd-3 x 2" in found


def test_evaluate_takes_from_the_run_what_it_is_not_told(trained, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(trained, tmp_path / "run")
    info = json.loads((folder / runs.INFO).read_text())
    info["train"] |= {"norm": "l2", "eps": 0.3, "seed": 7}
    info["data"] |= {"limit": 150, "validation": 40.0}
    (folder / runs.INFO).write_text(json.dumps(info))
    load, seen = experiment.load_data, []

    def load_data(config, seed, device):
        seen.append((config, seed))
        return load(config, seed, device)

    def measure(model, images, **settings):
        seen.append(settings)
        return training.Accuracy(0.5, 7, 7, 7, robust=torch.ones(7, dtype=torch.bool))

    monkeypatch.setattr(experiment, "load_data", load_data)
    for name in ("clean_accuracy", "fgsm_accuracy", "robust_accuracy"):
        monkeypatch.setattr(evaluate, name, measure)
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 0
    (loaded, seed), clean, fgsm, *pgd = seen
    assert loaded == runs.read(folder).info.data and (loaded.limit, loaded.validation, seed) == (150, 40.0, 7)
    ball = {"eps": 0.3, "norm": "l2"}
    assert clean == {} and fgsm == ball and lines(capsys)[0].items() >= ball.items()
    assert all(settings.items() >= {**ball, "seed": 7, "alpha": None}.items() for settings in pgd) and len(pgd) == 2
    seen.clear()
    flags = {"norm": "linf", "eps": 0.0, "seed": 0, "limit": 120, "validation": 30.0, "data": "digits"}
    flags |= {"split": "train"}
    assert (
        main(["evaluate", str(folder), *[text for name, value in flags.items() for text in (f"--{name}", f"{value}")]])
        == 0
    )
    (loaded, seed), _, fgsm, *_ = seen
    assert (loaded.limit, loaded.validation, seed, fgsm) == (120, 30.0, 0, {"eps": 0.0, "norm": "linf"})


def test_evaluate_refuses_a_radius_beyond_all_images(trained, capsys):
    for flags in (["--eps", "8"], ["--eps", "8", "--attack", "autoattack"]):
        assert "eps must be at most 1 for norm 'linf', as 8/255" in refused(capsys, "evaluate", str(trained), *flags)


OF_A_RUN = (
    *(runs.RESULT, runs.INFO, runs.EPOCHS, runs.STATE, runs.LAST, runs.BEST, runs.LOCK, runs.IDENTITY),
    *("initial.safetensors", "rewind.safetensors", runs.TICKET, "config.yaml", "result_2.json"),
)


def test_convert_replaces_neither_what_it_reads_nor_a_file_of_a_run(searched, tmp_path, capsys):
    ticket = str(searched / runs.TICKET)
    before = {file: file.read_bytes() for file in searched.iterdir() if file.is_file()}
    assert set(before) <= {searched / name for name in OF_A_RUN}
    for target in (searched / name for name in OF_A_RUN):
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


def test_evaluate_never_writes_its_result_over_what_it_reads(trained, tmp_path, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    for name in OF_A_RUN:
        said = refused(capsys, "evaluate", str(trained), "--out", str(trained / name))
        assert f"--out must not replace a file that is read, or one of a run, got {trained / name}" in said
    own = str(tmp_path / "weights.safetensors")
    assert "--out must not replace" in refused(capsys, "evaluate", own, "--out", own)
    same = str(tmp_path / "same.json")
    said = refused(capsys, "evaluate", str(trained), "--attack", "autoattack", "--state", same, "--out", same)
    assert f"--out must not replace a file that is read, or one of a run, got {same}" in said
    assert before == {file: file.read_bytes() for file in trained.iterdir()} and not list(tmp_path.iterdir())


def test_evaluate_takes_anyones_dense_checkpoint(tmp_path, capsys):
    model = models.build("digits_cnn", width=8)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "a.pt")
    assert main(["evaluate", str(tmp_path / "a.pt"), "--arch", "digits_cnn", "--width", "8", "--images", "20"]) == 0
    assert lines(capsys)[0]["images"] == 20
    assert "does not fit" in refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--arch", "digits_cnn")
    assert "--arch" in refused(capsys, "evaluate", str(tmp_path / "a.pt"))
    assert "--state is for --attack autoattack" in refused(capsys, "evaluate", str(tmp_path), "--state", "a")
    assert "--weights is for the folder of a run" in refused(
        capsys, "evaluate", str(tmp_path / "a.pt"), "--weights", "last"
    )
    for flag in ("--alpha", "--steps", "--restarts"):
        message = refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--attack", "autoattack", flag, "1")
        assert f"{flag} is for --attack bound, got --attack autoattack" in message
    for flag in ("--limit", "--validation"):
        assert f"{flag} divides the training images" in refused(capsys, "evaluate", str(tmp_path / "a.pt"), flag, "50")


@pytest.mark.parametrize(("flag", "mean"), [("mnist", 0.1307), ("none", 0.0)])
def test_a_checkpoint_without_mean_and_deviation_gets_those_that_are_named(tmp_path, capsys, monkeypatch, flag, mean):
    state = models.build("digits_cnn", width=8).state_dict()
    torch.save({name: value for name, value in state.items() if not name.startswith("normalize")}, tmp_path / "a.pt")
    means = []

    def measure(model, images, **settings):
        means.append(model.normalize.mean.item())
        return training.Accuracy(0.5, 5, 5, 5, robust=torch.ones(5, dtype=torch.bool))

    for name in ("clean_accuracy", "fgsm_accuracy", "robust_accuracy"):
        monkeypatch.setattr(evaluate, name, measure)
    network = ("--arch", "digits_cnn", "--width", "8", "--images", "5")
    assert main(["evaluate", str(tmp_path / "a.pt"), *network, "--normalize", flag]) == 0
    assert means == 4 * [pytest.approx(mean)]


def test_evaluate_runs_autoattack_and_goes_on_from_its_state(tmp_path, capsys):
    torch.save(models.build("digits_cnn", width=8).state_dict(), tmp_path / "a.pt")
    arguments = ["evaluate", str(tmp_path / "a.pt"), "--arch", "digits_cnn", "--width", "8", "--images", "20"]
    arguments += ["--attack", "autoattack", "--eps", "0.3", "--state", str(tmp_path / "state.safetensors")]
    found = []
    for _ in range(2):
        assert main(arguments) == 0
        found += lines(capsys)
    assert found[0] == found[1] and (tmp_path / "state.safetensors").exists()
    assert set(found[0]["unconfirmed"]) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert list(found[0])[5:10] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert "under AutoAttack: apgd-ce (100 steps, 1 restart); apgd-t (100 steps, 9 targets)" in found[0]["meaning"]


@pytest.mark.parametrize("flags", [["--out"], ["--attack", "autoattack", "--state"]])
def test_evaluate_knows_before_the_attacks_that_a_file_cannot_be_written(trained, capsys, monkeypatch, flags):
    monkeypatch.setattr(evaluate.experiment, "load_data", None)  # not even the images are read
    assert str(trained) in refused(capsys, "evaluate", str(trained), *flags, str(trained))


def test_evaluate_prints_what_it_cannot_write(trained, tmp_path, capsys, monkeypatch):
    def fail(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(evaluate, "write_text", fail)
    assert main(["evaluate", str(trained), "--images", "5", "--out", str(tmp_path / "found.json")]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 5 and "No space left on device" in printed.err


def test_evaluate_writes_what_it_cannot_print(trained, tmp_path, capsys, monkeypatch):
    def fail(self, text, content):
        raise OSError(28, "No space left on device", "the standard output")

    monkeypatch.setattr(Output, "print", fail)
    assert "the standard output" in refused(
        capsys, "evaluate", str(trained), "--images", "5", "--out", str(tmp_path / "found.json")
    )
    assert json.loads((tmp_path / "found.json").read_text())["images"] == 5


@pytest.mark.parametrize("attack", ["bound", "autoattack"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--alpha", "-1"], "--alpha must be positive, got -1.0"),
        (["--alpha", "0"], "--alpha must be positive, got 0.0"),
        (["--alpha", "nan"], "--alpha must be positive, got nan"),
        (["--seed", "-1"], "--seed must be an integer of at least 0, got -1"),
        (["--seed", "99999999999999999999"], "--seed must be less than 2^63, got 99999999999999999999"),
    ],
)
def test_evaluate_refuses_impossible_settings_of_its_attacks(trained, capsys, attack, flags, said):
    assert said in refused(capsys, "evaluate", str(trained), "--attack", attack, *flags)


def test_report_speaks_to_people_and_to_programs(trained, searched, tmp_path, capsys):
    assert main(["report", str(searched), str(trained), "--out", str(tmp_path), "--no-json"]) == 0
    assert "| a ticket" in capsys.readouterr().out
    assert main(["report", str(searched), str(trained), "--out", str(tmp_path)]) == 0
    told = lines(capsys)
    assert [line.get("name") for line in told] == ["search", "a ticket", None]
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
    assert f"is a folder: name a file, such as {ticket}" in refused(capsys, "explain", str(searched))


@pytest.mark.parametrize("density", [None, 0.25])
def test_the_density_of_an_evaluated_checkpoint_reaches_its_reader(tmp_path, monkeypatch, capsys, density):
    def load_pruned(source, *, dense, density):
        raise ValueError(f"asked for {source.name}, {dense}, {density}")

    monkeypatch.setattr(masks, "load_pruned", load_pruned)
    (tmp_path / "a.pt").write_bytes(b"scores")
    flags = [] if density is None else ["--density", str(density)]
    said = refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--data", "digits", "--arch", "digits_cnn", *flags)
    assert f"asked for a.pt, True, {density}" in said


def test_every_flag_of_convert_reaches_its_use(searched, tmp_path, monkeypatch, capsys):
    ticket, seen = masks.load_ticket(searched / runs.TICKET), []

    def load_pruned(source, masks_file, *, model, **given):
        seen.append((str(source), str(masks_file), model.conv1.out_channels, given))
        return ticket

    monkeypatch.setattr(masks, "load_pruned", load_pruned)
    given = {"masks": "m.npy", "density": 0.3, "format": "hydra", "arch": "digits_cnn", "width": 6}
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert main(["convert", "a.pt", str(tmp_path / "b.safetensors"), *flags]) == 0
    assert seen == [("a.pt", "m.npy", 6, {"density": 0.3, "format": "hydra"})]
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epoch", "3"], "there is no option '--epoch'; did you mean '--epochs'?"),
        (["--max_grad_norm=1"], "there is no option '--max_grad_norm'; did you mean '--max-grad-norm'?"),
        (["--epochs", "many"], "error: epochs must be a whole number, got 'many'"),
        (["--epochs"], "error: --epochs: expected one argument"),
        (["--augment=maybe"], "error: --augment: ignored explicit argument 'maybe'"),
        (["stray"], "nrecognized arguments: stray"),
        (["--data", "nowhere"], "no data set at nowhere"),
        (["--arch", "resnet"], "resnet18"),
        (["--arch", "digits_cnn", "--eps", "1/0"], "1/0"),
        (["--arch", "digits_cnn", "--reinit"], "--ticket"),
        (["--arch", "digits_cnn", "--device", "tpu"], "auto, cpu, cuda or a GPU such as cuda:0, got 'tpu'"),
        (["--ticket", "nowhere"], "nowhere"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        ([], "name one with --arch"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(tmp_path, capsys, arguments, said):
    assert said in refused(capsys, "train", *arguments, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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
