"""`evaluate`: what it measures, of which weights and images, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers.digit_runs import QUICK, lines
from helpers.refusal import refused
from helpers.run_folders import FILES

from sparse_adv import data, experiment, json_files, masks, models, runs, training
from sparse_adv.__main__ import main
from sparse_adv.attacks import square
from sparse_adv.attacks.autoattack_versions import MEMBERS
from sparse_adv.commands import evaluate
from sparse_adv.commands.output import Output
from sparse_adv.config import DataConfig, TrainConfig
from sparse_adv.training import checkpoint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_evaluate_measures_a_run_as_the_run_did(trained, capsys, tmp_path):
    arguments = ["evaluate", str(trained), "--device", "cpu", "--out", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    (found,) = lines(capsys)
    test = runs.read(trained).result.test
    assert {name: found[name] for name in test} == test and found["eps"] == 0.1
    assert found["robust"] <= min(test.values()) and "robust accuracy is at most" in found["meaning"]
    assert found["warnings"] == [] and (found["alpha"], found["seed"], found["weights"]) == (0.025, 0, "best")
    assert "limit" not in found and found["epoch"] == runs.read(trained).result.tested_epoch
    assert json.loads((tmp_path / "found.json").read_text()) == found
    assert main([*arguments, "--steps", "5", "--restarts", "3", "--split", "validation", "--images", "15"]) == 0
    (found,) = lines(capsys)
    assert found["images"] == 15 and found["pgd-5 x 3"] <= found["clean"]


def test_a_test_that_may_take_minutes_says_what_it_does(trained, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    assert main(["evaluate", str(trained), "--images", "20", "--steps", "2"]) == 0
    assert "testing on 20 images: clean, fgsm, pgd-2, pgd-50 x 5 on the margin" in caplog.messages
    run = shutil.copytree(trained, tmp_path / "run")
    (run / runs.RESULT).unlink()
    assert main(["train", "--config", str(run / "config.yaml"), "--out", str(run), "--device", "cpu"]) == 0
    assert f"{run}: testing on 300 images: clean, fgsm, pgd-20" in caplog.messages
    assert all(line.startswith("{") for line in capsys.readouterr().out.splitlines())


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


def test_the_weights_that_a_run_has_tested_are_evaluated_even_without_its_epochs(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    assert runs.read(run).result.tested == "best"
    (run / runs.EPOCHS).unlink()
    assert main(["evaluate", str(run), "--images", "20", "--steps", "1"]) == 0
    assert lines(capsys)[0]["weights"] == "best"


def test_a_run_none_of_whose_epochs_counts_is_that_of_its_last_weights(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in (runs.BEST, runs.RESULT):
        (run / name).unlink()
    records = [replace(record, may_be_result=False) for record in runs.read(trained).records]
    json_files.write_lines(run / runs.EPOCHS, records)
    assert main(["evaluate", str(run), "--images", "6", "--steps", "1"]) == 0
    (found,) = lines(capsys)
    assert (found["weights"], found["epoch"]) == ("last", records[-1].epoch)
    assert main(["explain", str(run)]) == 0
    assert str(run / runs.BEST) in refused(capsys, "evaluate", str(run), "--weights", "best")


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
    run = runs.read(folder)
    record = run.records[-1] if weights == "last" else runs.best(run.records, run.info.train)
    about = {"weights": weights, "epoch": record.epoch, "data": "digits", "limit": 200, "validation": None, **step}
    assert found.items() >= about.items()
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
    assert main(["evaluate", str(folder), "--device", "cpu", "--split", "validation"]) == 0
    (loaded, seed), clean, fgsm, *pgd = seen
    assert loaded == runs.read(folder).info.data and (loaded.limit, loaded.validation, seed) == (150, 40.0, 7)
    ball = {"eps": 0.3, "norm": "l2"}
    assert clean == {} and fgsm == ball and lines(capsys)[0].items() >= ball.items()
    assert all(settings.items() >= {**ball, "seed": 7, "alpha": 0.075}.items() for settings in pgd) and len(pgd) == 2
    seen.clear()
    flags = {"norm": "linf", "eps": 0.0, "seed": 0, "limit": 120, "validation": 30.0, "data": "digits"}
    flags |= {"split": "train"}
    assert (
        main(["evaluate", str(folder), *[text for name, value in flags.items() for text in (f"--{name}", f"{value}")]])
        == 0
    )
    (loaded, seed), _, fgsm, *_ = seen
    assert (loaded.limit, loaded.validation, seed, fgsm) == (120, 30.0, 7, {"eps": 0.0, "norm": "linf"})


def test_test_images_are_evaluated_however_few_training_images_there_are(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    info = json.loads((folder / runs.INFO).read_text())
    info["data"] |= {"limit": 5000, "validation": 4000.0}
    (folder / runs.INFO).write_text(json.dumps(info))
    assert main(["evaluate", str(folder), "--device", "cpu"]) == 0
    assert lines(capsys)[0]["images"] == 300
    assert "limit must be from 2 to the 1497 training images" in refused(
        capsys, "evaluate", str(folder), "--split", "train"
    )


def test_evaluate_refuses_a_radius_beyond_all_images(trained, capsys):
    for flags in (["--eps", "8"], ["--eps", "8", "--attack", "autoattack"]):
        assert "eps must be at most 1 for norm 'linf', as 8/255" in refused(capsys, "evaluate", str(trained), *flags)


def test_evaluate_never_writes_its_result_over_what_it_reads(trained, tmp_path, capsys):
    before = {file: file.read_bytes() for file in trained.iterdir()}
    for name in FILES:
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
    evaluate = ["evaluate", str(tmp_path / "a.pt"), "--data", "digits"]
    assert main([*evaluate, "--arch", "digits_cnn", "--width", "8", "--images", "20"]) == 0
    found = lines(capsys)[0]
    assert found["images"] == 20 and (found["weights"], found["epoch"], found["data"]) == (None, None, "digits")
    assert "does not fit" in refused(capsys, *evaluate, "--arch", "digits_cnn")
    assert "name one with --arch" in refused(capsys, *evaluate)
    said = refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--arch", "digits_cnn", "--width", "8")
    assert "a.pt does not say which images it is for: name them with --data" in said
    assert "--state is for --attack autoattack" in refused(capsys, "evaluate", str(tmp_path), "--state", "a")
    assert "--weights is for the folder of a run" in refused(
        capsys, "evaluate", str(tmp_path / "a.pt"), "--weights", "last"
    )
    for flag in ("--alpha", "--steps", "--restarts"):
        message = refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--attack", "autoattack", flag, "1")
        assert f"{flag} is for --attack bound, got --attack autoattack" in message
    for flag in ("--limit", "--validation"):
        said = refused(capsys, "evaluate", str(tmp_path / "a.pt"), flag, "50")
        assert f"{flag} applies to --split train or validation, got --split test" in said


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
    network = ("--arch", "digits_cnn", "--width", "8", "--images", "5", "--data", "digits")
    assert main(["evaluate", str(tmp_path / "a.pt"), *network, "--normalize", flag]) == 0
    assert means == 4 * [pytest.approx(mean)]


def test_evaluate_runs_autoattack_and_goes_on_from_its_state(tmp_path, capsys, monkeypatch):
    brief = replace(MEMBERS["square"], attack=lambda *given, **more: square(*given, **more | {"queries": 20}))
    monkeypatch.setitem(MEMBERS, "square", brief)
    torch.save(models.build("digits_cnn", width=8).state_dict(), tmp_path / "a.pt")
    arguments = ["evaluate", str(tmp_path / "a.pt"), "--arch", "digits_cnn", "--width", "8", "--images", "20"]
    arguments += ["--data", "digits", "--attack", "autoattack", "--eps", "0.3"]
    arguments += ["--state", str(tmp_path / "state.safetensors")]
    found = []
    for _ in range(2):
        assert main(arguments) == 0
        found += lines(capsys)
    assert found[0] == found[1] and (tmp_path / "state.safetensors").exists()
    assert set(found[0]["unconfirmed"]) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert list(found[0])[9:14] == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"] and "alpha" not in found[0]
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


@pytest.mark.parametrize("density", [None, 0.25])
def test_the_density_of_an_evaluated_checkpoint_reaches_its_reader(tmp_path, monkeypatch, capsys, density):
    def load_pruned(source, *masks_of_other_files, dense, density, **others):
        assert not any(masks_of_other_files) and not any(others.values())
        raise ValueError(f"asked for {source.name}, {dense}, {density}")

    monkeypatch.setattr(masks, "load_pruned", load_pruned)
    (tmp_path / "a.pt").write_bytes(b"scores")
    flags = [] if density is None else ["--density", str(density)]
    said = refused(capsys, "evaluate", str(tmp_path / "a.pt"), "--data", "digits", "--arch", "digits_cnn", *flags)
    assert f"asked for a.pt, True, {density}" in said


@pytest.mark.parametrize("name", [runs.BEST, runs.LAST])
def test_weights_of_a_run_are_evaluated_as_the_run_is(trained, capsys, name):
    which = ["--weights", name.partition(".")[0]]
    for what, more in ((trained, which), (trained / name, [])):
        assert main(["evaluate", str(what), *more, "--images", "30", "--device", "cpu"]) == 0
    run, file = lines(capsys)
    assert run == file | {"what": str(trained)} and run["weights"] == which[1]


def test_a_ticket_is_evaluated_on_its_own_images(searched, tmp_path, capsys, monkeypatch):
    """Unless others are named."""
    ticket, load, asked = masks.load_ticket(searched / runs.TICKET), experiment.load_data, []
    elsewhere = ticket.provenance | {"data": "elsewhere"}
    masks.save_ticket(tmp_path / "a.safetensors", masks.Ticket(ticket.masks, ticket.state_dict, elsewhere))
    assert "no data set at elsewhere" in refused(capsys, "evaluate", str(tmp_path / "a.safetensors"))

    def load_data(config, seed, device):
        asked.append(config.data)
        return load(DataConfig(), seed, device)

    monkeypatch.setattr(experiment, "load_data", load_data)
    for more in ([], ["--data", "digits"]):
        assert main(["evaluate", str(tmp_path / "a.safetensors"), "--images", "5", *more]) == 0
    measured = lines(capsys)
    assert asked == ["elsewhere", "digits"] == [found["data"] for found in measured]
    search = runs.read(searched).info.train
    for found in measured:
        assert (found["eps"], found["norm"], found["seed"]) == (search.eps, search.norm, search.seed)


def test_a_ticket_is_evaluated_on_the_images_that_its_search_held_out(searched, trained, tmp_path, capsys):
    """As a run is, though the ticket is all that there is of the search."""
    path = tmp_path / "elsewhere.safetensors"
    path.write_bytes((searched / runs.TICKET).read_bytes())
    info = runs.read(searched).info
    dataset = experiment.load_data(info.data, info.train.seed, torch.device("cpu"))
    assert info.data.limit is not None
    for split in ("validation", "train"):
        assert main(["evaluate", str(path), "--split", split]) == 0
        (found,) = lines(capsys)
        assert (found["limit"], found["validation"]) == (info.data.limit, info.data.validation)
        assert found["images"] == len(getattr(dataset, split).labels)


def test_images_must_have_the_classes_that_a_network_was_trained_for(tmp_path, capsys):
    """Classes of other names, which would have the same numbers, make every accuracy meaningless."""
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the images")
    for root, names in (("pets", "cats dogs"), ("moved", "cats dogs"), ("wild", "cats wolves")):
        for label, name in enumerate(names.split()):
            folder = tmp_path / root / name
            folder.mkdir(parents=True)
            for i in range(20):
                image.new("L", (8, 8), 100 * label + i).save(folder / f"{i:02}.png")
    run, search = tmp_path / "run", tmp_path / "search"
    shared = ("--arch", "digits_cnn", "--width", "4", *QUICK, "--validation", "8", "--data")
    assert main(["train", *shared, str(tmp_path / "pets"), "--out", str(run)]) == 0
    assert main(["search", *shared, str(tmp_path / "pets"), "--density", "0.3", "--out", str(search)]) == 0
    ticket = str(search / runs.TICKET)
    for what in (str(run), ticket):
        assert main(["evaluate", what, "--data", str(tmp_path / "moved"), "--steps", "1"]) == 0
        said = refused(capsys, "evaluate", what, "--data", str(tmp_path / "wild"))
        assert f"{what} and its images must have the same classes, only one has 'dogs'" in said
    said = refused(capsys, "train", *shared, str(tmp_path / "wild"), "--ticket", ticket, "--out", str(tmp_path / "t"))
    assert "only one has 'dogs'" in said


@pytest.mark.parametrize("kind", ["run", "ticket"])
def test_the_other_norm_needs_a_radius_of_its_own(searched, trained, capsys, kind):
    what = str({"run": trained, "ticket": searched / runs.TICKET}[kind])
    assert "--norm l2 needs its own --eps: " in refused(capsys, "evaluate", what, "--norm", "l2")
    assert main(["evaluate", what, "--norm", "l2", "--eps", "0.5", "--images", "5"]) == 0
    (found,) = lines(capsys)
    assert (found["norm"], found["eps"]) == ("l2", 0.5)


def test_a_run_of_ones_own_model_is_told_as_such(tmp_path, capsys):
    dataset, config = data.load("digits", limit=60, validation=20), TrainConfig("fgsm", epochs=1, eps=0.1)
    model = models.build("digits_cnn", width=4)
    training.train(model, data.Batches(dataset.train, 20), config, validation=dataset.validation, folder=tmp_path)
    assert "is the run of a model of your own: evaluate it in Python" in refused(capsys, "evaluate", str(tmp_path))
    network = ("--arch", "digits_cnn", "--width", "4", "--data", "digits")
    assert main(["evaluate", str(tmp_path), *network, "--images", "5"]) == 0
