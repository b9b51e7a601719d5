"""Run folders: written, read again, and never mixed up."""

import json

import pytest

from sparse_adv import runs


def test_records_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "epochs.jsonl"
    records = [{"epoch": 1, "robust_accuracy": 0.25}, {"epoch": 2, "robust_accuracy": 0.1 + 0.2}]
    for record in records:
        runs.append_record(path, record)
    assert runs.read_records(path) == records
    runs.write_records(path, records[:1])
    assert runs.read_records(path) == records[:1]


@pytest.mark.parametrize("broken", ['{"epoch": ', "[1, 2]"])
def test_a_broken_run_file_is_named_with_its_line(tmp_path, broken):
    path = tmp_path / "epochs.jsonl"
    path.write_text(json.dumps({"epoch": 1}) + "\n" + broken + "\n")
    with pytest.raises(ValueError, match=r"epochs\.jsonl, line 2"):
        runs.read_records(path)


def test_a_run_is_read_back_with_its_facts(tmp_path):
    runs.begin(tmp_path / "a", {"eps": 0.5}, densities={"weights": 0.1})
    run = runs.read(tmp_path / "a")
    assert run.name == "a" and run.result is None and run.records == []
    assert run.facts["settings"] == {"eps": 0.5} and run.facts["densities"] == {"weights": 0.1}
    assert run.facts["versions"]["torch"] and run.facts["machine"]["cores"] >= 1
    runs.write_json(tmp_path / "a" / runs.RESULT, {"test": 0.5})
    assert runs.read(tmp_path / "a").result == {"test": 0.5}


def test_a_folder_takes_no_second_run_with_other_settings(tmp_path):
    runs.begin(tmp_path, {"eps": 0.5, "block": (1, 1)})
    written = (tmp_path / runs.FACTS).read_text()
    runs.begin(tmp_path, {"eps": 0.5, "block": (1, 1)})
    with pytest.raises(ValueError, match=r"other settings \(eps 0\.5, now 0\.25\)"):
        runs.begin(tmp_path, {"eps": 0.25, "block": (1, 1)})
    assert (tmp_path / runs.FACTS).read_text() == written


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder: it has no run\.json"):
        runs.read(tmp_path)
