"""Run folders: what is written is read back; a folder of other settings or of another version is refused."""

import json
from dataclasses import replace

import pytest
from helpers.run_folders import epoch_record

from sparse_adv import json_files, runs
from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.runs import DENSE, Cost, Density, RunInfo, SearchResult, TicketChecks, TicketSource, TrainResult

INFO = RunInfo(
    "train",
    TrainConfig("trades", milestones=(0.25,)),
    data=DataConfig("cifar", limit=100),
    network=NetworkConfig("vgg16", width=8),
    ticket=TicketSource("0123", shuffle=True),
    world_size=2,
    name="a name",
    density=Density(0.1, 0.2),
    before=Cost(10.0, 1000),
)
TRAIN_RESULT = TrainResult(Cost(20.0, 2000), TicketChecks(pruned_weights_zero=True), "best", 3, 0.5, {"clean": 0.75})
SEARCH_RESULT = SearchResult(Cost(20.0, 2000), TicketChecks(reset=True, retained=(0.1, 0.2)), Density(0.1, 0.2))


@pytest.mark.parametrize(
    ("info", "result"),
    [
        (INFO, TRAIN_RESULT),
        (RunInfo("train", TrainConfig()), None),
        (RunInfo("search", TrainConfig(), PruneConfig(block=(4, 1))), SEARCH_RESULT),
    ],
)
def test_a_run_is_read_back_as_it_was_written(tmp_path, info, result):
    folder = tmp_path / "run"
    records = [epoch_record(1), epoch_record(2, robust_accuracy=0.1 + 0.2, density=DENSE, undone_accuracy=0.0)]
    runs.begin(folder, info)
    json_files.write_lines(folder / runs.EPOCHS, records)
    if result is not None:
        json_files.write(folder / runs.RESULT, result)
    run = runs.read(folder)
    assert (run.info, run.records, run.result) == (info, records, result)
    assert run.name == (info.name or "run")


def test_a_run_notes_software_and_machine(tmp_path):
    runs.begin(tmp_path, RunInfo("train", TrainConfig()))
    info = json.loads((tmp_path / runs.INFO).read_text())
    assert info["software"]["torch"] and info["machine"]["cores"] >= 1


@pytest.mark.parametrize("name", [runs.STATE, runs.EPOCHS, runs.TICKET])
def test_files_of_a_run_without_its_settings_are_given_no_others(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"has {name}, but not the run.json of its run: put that file back"):
        runs.begin(tmp_path, INFO)
    assert not (tmp_path / runs.INFO).exists()


def test_a_folder_accepts_a_run_with_the_same_settings_only(tmp_path):
    runs.begin(tmp_path, INFO)
    (tmp_path / runs.STATE).touch()
    written = (tmp_path / runs.INFO).read_text()
    runs.begin(tmp_path, replace(INFO, name="another name", before=Cost()))
    for other, difference in (
        (replace(INFO, train=replace(INFO.train, eps=0.25)), r"train\.eps 0\.0313\d*, now 0\.25"),
        (replace(INFO, ticket=None), r"ticket\.sha256 '0123', now None"),
        (replace(INFO, world_size=1), "world_size 2, now 1"),
    ):
        with pytest.raises(ValueError, match=rf"holds a run with other settings \({difference}"):
            runs.begin(tmp_path, other)
    assert (tmp_path / runs.INFO).read_text() == written


@pytest.mark.parametrize("file", [runs.EPOCHS, runs.RESULT, runs.INFO])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"epoch": ', "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"surprise": 1}', "has the unknown key 'surprise': another version of sparse_adv wrote it"),
        ("{}", "lacks the key"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, file, content, reason):
    runs.begin(tmp_path, INFO)
    json_files.write_lines(tmp_path / runs.EPOCHS, [epoch_record(1)])
    json_files.write(tmp_path / runs.RESULT, TRAIN_RESULT)
    line = ", line 2" if file == runs.EPOCHS else ""
    first = (tmp_path / file).read_text() if line else ""
    (tmp_path / file).write_text(f"{first}{content}\n")
    with pytest.raises(ValueError) as refusal:
        runs.read(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / file}{line} {reason}")


@pytest.mark.parametrize("value", ["fast", 1.5, [1], None])
def test_a_value_of_another_type_is_refused_with_its_key(tmp_path, value):
    runs.begin(tmp_path, INFO)
    info = json.loads((tmp_path / runs.INFO).read_text())
    info["train"]["epochs"] = value
    (tmp_path / runs.INFO).write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"run\.json: .*epochs"):
        runs.read(tmp_path)


OLD_SHAPE = {
    "settings": {"command": "train", "objective": "pgd", "eps": 0.1, "drops": [0.5, 0.75]},
    "densities": {"weights": 0.1, "multiply_adds": 0.2},
    "before": {"seconds": 1.0, "multiply_adds": 10},
    "versions": {"sparse_adv": "0.1.0"},
}
"""A `run.json` as it was before its fields were fixed."""


def test_a_folder_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / runs.INFO).write_text(json.dumps(OLD_SHAPE))
    for use in (lambda: runs.read(tmp_path), lambda: runs.begin(tmp_path, INFO)):
        with pytest.raises(ValueError, match=r"run\.json has the unknown key '.*': another version of sparse_adv"):
            use()


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no run\.json"):
        runs.read(tmp_path)


def test_settings_that_led_to_nothing_are_replaced(tmp_path):
    runs.begin(tmp_path, INFO)
    other = replace(INFO, ticket=None, train=replace(INFO.train, epochs=1))
    runs.begin(tmp_path, other)
    assert runs.read(tmp_path).info == other
    without_data = RunInfo("train", replace(INFO.train, eps=0.25))
    runs.begin(tmp_path, without_data)
    assert runs.read(tmp_path).info == without_data


def test_what_a_training_run_begins_with_is_read_back(tmp_path):
    method, before = MethodConfig("rigl", density=0.5), Cost(1.5, 7)
    begun = RunInfo("train", TrainConfig(epochs=2), world_size=3, before=before, method=method)
    runs.begin(tmp_path, begun)
    assert runs.read(tmp_path).info == begun


def test_a_call_that_does_not_know_the_images_continues_with_those_of_the_folder(tmp_path):
    runs.begin(tmp_path, INFO)
    (tmp_path / runs.STATE).touch()
    for use in (runs.begin, runs.resume):
        use(tmp_path, RunInfo("train", INFO.train, world_size=INFO.world_size))
        assert runs.read(tmp_path).info == INFO


def test_an_extended_run_keeps_all_that_describes_its_beginning(tmp_path):
    begun = RunInfo("train", TrainConfig(epochs=2), name="ticket", density=Density(0.1, 0.2), before=Cost(1.5, 7))
    begun = replace(begun, software=replace(begun.software, torch="2.10.0"))
    for info in (
        begun,
        RunInfo("train", TrainConfig(epochs=5)),
        RunInfo("train", TrainConfig(epochs=7), name="another"),
    ):
        runs.begin(tmp_path, info)
        runs.resume(tmp_path, info)
    extended = replace(begun, train=TrainConfig(epochs=7), extended=(2, 5), name="another")
    assert runs.read(tmp_path).info == extended


def test_nothing_changes_before_the_run_of_a_folder_is_known_to_be_the_same(tmp_path):
    runs.begin(tmp_path, INFO)
    json_files.write_lines(tmp_path / runs.EPOCHS, [epoch_record(1)])
    json_files.write(tmp_path / runs.RESULT, TRAIN_RESULT)
    (tmp_path / runs.STATE).touch()
    files = {file: file.read_bytes() for file in tmp_path.iterdir()}
    longer = replace(INFO, train=replace(INFO.train, epochs=40), data=replace(INFO.data, data="elsewhere"), name="b")
    runs.begin(tmp_path, longer)
    assert files == {file: file.read_bytes() for file in tmp_path.iterdir()}
    runs.resume(tmp_path, longer)
    run = runs.read(tmp_path)
    assert run.info == replace(longer, extended=(INFO.train.epochs,)) and run.result is None
    assert json_files.read(TrainResult, tmp_path / f"result_{INFO.train.epochs}.json") == TRAIN_RESULT


def test_a_run_is_of_one_process_unless_said_otherwise():
    info = RunInfo("train", TrainConfig())
    assert (info.world_size, info.density, info.before, info.extended) == (1, DENSE, Cost(), ())
