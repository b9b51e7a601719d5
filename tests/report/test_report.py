"""Reports: the numbers in the tables are those of the run folders, and no folder's content breaks one."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.run_folders import epoch_record, make, read

from sparse_adv import json_files, report, runs
from sparse_adv.config import DataConfig, MethodConfig, TrainConfig
from sparse_adv.report.measures import labels
from sparse_adv.report.tables import count
from sparse_adv.runs import Cost, Density, Run, RunInfo, SearchResult, TicketChecks


def cells(markdown):
    """The rows of the first Markdown table in a text, as dicts by heading."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    grid = [[cell.strip() for cell in line.replace(r"\|", "\0").split("|")[1:-1]] for line in lines]
    assert {len(line) for line in grid} == {len(grid[0])}
    return [dict(zip(grid[0], line, strict=True)) for line in grid[2:]]


def test_a_table_aligns_its_columns():
    lines = report.table(["run", "s"], [["ticket", "12.3"], ["dense, long name", ""]]).splitlines()
    assert lines[0].split() == ["|", "run", "|", "s", "|"] and "12.3" in lines[2]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("name", ["a | b", "a\nb", "<b>", "{name}", "$x$"])
def test_no_name_breaks_a_table(name):
    line = report.table(["run", "s"], [[name, "1"]]).splitlines()[2]
    assert line.replace(r"\|", "").count("|") == 3 and not line.replace(r"\<", "").count("<")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999.7, "1.00 k"),
        (1234, "1.23 k"),
        (45.67e6, "45.7 M"),
        (1.234e12, "1.23 T"),
        (2e21, "2000 E"),
    ],
)
def test_counts_have_three_digits_and_a_prefix(number, text):
    assert count(number) == text


def test_the_density_is_that_of_the_last_epoch(tmp_path):
    runs.begin(tmp_path, RunInfo("train", TrainConfig(epochs=2), density=Density(0.4, 0.3)))
    (row,) = cells(report.summary(read(tmp_path)))
    assert (row["density"], row["MAC density"]) == ("0.400", "0.300")
    json_files.write_lines(tmp_path / runs.EPOCHS, [epoch_record(1), epoch_record(2, density=Density(0.2, 0.1))])
    (row,) = cells(report.summary(read(tmp_path)))
    assert (row["density"], row["MAC density"]) == ("0.200", "0.100")


def test_epochs_before_a_pruning_are_neither_the_best_nor_reach_a_level(tmp_path):
    robust, densities = (0.6, 0.3, 0.4, 0.35), (1.0, 0.1, 0.1, 0.2)
    for name, epochs in (("begun", 1), ("pruned", 4)):
        make(tmp_path / name)
        records = [
            epoch_record(n, robust_accuracy=robust[n - 1], may_be_result=n > 1, density=Density(densities[n - 1], 0.5))
            for n in range(1, epochs + 1)
        ]
        json_files.write_lines(tmp_path / name / runs.EPOCHS, records)
    info = runs.read(tmp_path / "begun").info
    json_files.write(tmp_path / "begun" / runs.INFO, replace(info, method=MethodConfig("gmp")))
    dense = make(tmp_path / "dense", (0.2, 0.4, 0.5))
    shown = read(tmp_path / "begun", tmp_path / "pruned", dense)
    begun, pruned, _ = cells(report.summary(shown))
    assert (pruned["density"], pruned["its epoch"], pruned["best robust"]) == ("0.100", "3", "40.0%")
    assert (begun["its epoch"], begun["best robust"], begun["last robust"]) == ("", "", "60.0%")
    text = report.time_to(shown)
    assert "at least 40.0%" in text and "Ratios are to dense." in text  # and not to one that is not yet pruned
    assert [row["epochs"] for row in cells(text)] == ["", "3", "2"]


def test_a_sparse_run_that_does_not_say_so_is_not_the_dense_reference(tmp_path):
    ticket, dense = make(tmp_path / "ticket"), make(tmp_path / "dense")
    records = [replace(record, density=Density(0.1, 0.2)) for record in runs.read(ticket).records]
    json_files.write_lines(ticket / runs.EPOCHS, records)
    assert "Ratios are to dense." in report.time_to(read(ticket, dense))


def test_the_density_of_a_finished_search_is_that_of_its_ticket(tmp_path):
    make(tmp_path, kind="search")
    (row,) = cells(report.summary(read(tmp_path)))
    assert (row["density"], row["MAC density"]) == ("1.000", "1.000")
    json_files.write(tmp_path / runs.RESULT, SearchResult(Cost(), TicketChecks(), Density(0.2, 0.3)))
    (row,) = cells(report.summary(read(tmp_path)))
    assert (row["density"], row["MAC density"]) == ("0.200", "0.300")


def test_the_summary_has_a_run_s_costs_and_accuracies(tmp_path):
    done = make(tmp_path / "ticket", (0.3, 0.5, 0.4), weights=0.1, before=Cost(7.0, 2_000_000), test={"pgd-20": 0.35})
    search = make(tmp_path / "search", (None, None), kind="search", objective="fgsm", epochs=2, rounds=2)
    first, second = cells(report.summary(read(done, search)))
    assert first == {
        "run": "ticket",
        "kind": "train, pgd",
        "density": "0.100",
        "MAC density": "0.316",
        "search s": "7.0",
        "s/epoch": "10.00",
        "total s": "37.0",
        "total MACs": "3.50 M",
        "best robust": "50.0%",
        "its clean": "75.0%",
        "its epoch": "2",
        "last robust": "40.0%",
        "test pgd-20": "35.0%",
        "status": "finished",
    }
    assert (second["kind"], second["best robust"], second["test pgd-20"]) == ("search, fgsm", "", "")
    assert (second["total s"], second["status"]) == ("20.0", "epoch 2 of 4")
    (none,) = cells(report.summary(read(make(tmp_path / "not robust", (0.0, 0.0), test={"pgd-20": 0.0}))))
    assert (none["best robust"], none["last robust"], none["test pgd-20"]) == ("0.0%",) * 3  # 0 is a result


def test_a_run_that_has_just_begun_has_cost_its_search(tmp_path):
    (row,) = cells(report.summary(read(make(tmp_path / "run", (), before=Cost(7.0, 2_000_000)))))
    assert (row["total s"], row["total MACs"], row["s/epoch"], row["status"]) == ("7.0", "2.00 M", "", "epoch 0 of 3")


def test_epochs_that_were_not_evaluated_count_for_costs_only(tmp_path):
    (row,) = cells(report.summary(read(folder := make(tmp_path / "run", (None, 0.5, 0.4, None), epochs=6))))
    assert (row["total s"], row["best robust"], row["its clean"], row["its epoch"]) == ("40.0", "50.0%", "75.0%", "2")
    assert (row["last robust"], row["status"]) == ("40.0%", "epoch 4 of 6")
    (reached,) = cells(report.time_to(read(folder)))
    assert (reached["s"], reached["epochs"]) == ("20.0", "2")


def test_one_slow_epoch_changes_no_median_and_of_equal_epochs_the_first_is_the_best(tmp_path):
    seconds, robust = (2.0, 2.0, 9.0), (0.25, 0.5, 0.5)
    records = [
        epoch_record(n, attack=Cost(s - 0.5), update=Cost(0.5), robust_accuracy=accuracy, clean_accuracy=0.1 * n)
        for n, (s, accuracy) in enumerate(zip(seconds, robust, strict=True), 1)
    ]
    (row,) = cells(report.summary([Run(tmp_path, RunInfo("train", TrainConfig(epochs=3)), records, None)]))
    assert row["s/epoch"] == "2.00"
    assert (row["best robust"], row["its epoch"], row["its clean"]) == ("50.0%", "2", "20.0%")


def test_time_to_a_level_includes_the_search_and_ratios_are_to_the_dense_run(tmp_path):
    ticket = make(
        tmp_path / "ticket",
        (0.1, 0.3, 0.45),
        weights=0.1,
        before=Cost(5.0, 500_000),
        attack=Cost(2.0, 400_000),
        update=Cost(0.5, 100_000),
    )
    dense = make(tmp_path / "dense", (0.1, 0.5, 0.45))
    search = make(tmp_path / "search", (0.05,), kind="search")
    text = report.time_to(read(search, ticket, dense))
    assert "at least 45.0%, the highest" in text and "Ratios are to dense." in text
    assert [list(row.values()) for row in cells(text)] == [
        ["ticket", "12.5", "0.62", "3", "1.50", "2.00 M", "2.00"],
        ["dense", "20.0", "1.00", "2", "1.00", "1.00 M", "1.00"],
    ]
    assert [row["s"] for row in cells(report.time_to(read(ticket, dense), 0.25))] == ["10.0", "20.0"]
    other = make(tmp_path / "other", (0.1, 0.5), weights=0.2)
    assert "Ratios are to ticket." in report.time_to(read(ticket, other))  # without a dense run the first


def test_runs_that_are_not_comparable_are_told_as_such(tmp_path):
    folders = [make(tmp_path / name) for name in ("a", "b", "search")]
    infos = [runs.read(folder).info for folder in folders]
    images = DataConfig("cifar", limit=100).located()
    config = replace(infos[0].train, eps=0.25, lr=0.5)
    for folder, info in zip(
        folders,
        (
            replace(infos[0], data=images),
            replace(infos[1], train=config, data=replace(images, limit=50)),
            replace(infos[2], kind="search", train=replace(config, norm="l2"), data=replace(images, limit=7)),
        ),
        strict=True,
    ):
        json_files.write(folder / runs.INFO, info)
    said = "The runs differ in data.limit (100, 50) and train.eps (0.0313725, 0.25), so their accuracies are not"
    text = report.report(folders, tmp_path / "report")
    assert text.count("not comparable") == 1 and f"{said} comparable." in text
    for alike in (folders[:1], folders[1:], [folders[0], make(tmp_path / "from Python")]):
        assert "not comparable" not in report.report(alike, tmp_path / "report")


def test_a_level_that_a_run_never_reached_is_shown_as_such(tmp_path):
    weak, new = make(tmp_path / "weak", (0.1, 0.2)), make(tmp_path / "new", (None,))
    sparse = make(tmp_path / "sparse", weights=0.1)
    text = report.time_to(read(weak, sparse, new), 0.4)
    assert [row["s"] for row in cells(text)] == ["not reached", "20.0", "not evaluated"]
    assert {row["ratio of s"] for row in cells(text)} == {""} and "no ratios, because weak never reached it" in text
    assert report.time_to(read(new)) == "No run has a robust validation accuracy yet.\n"
    natural = make(tmp_path / "natural", (0.1, 0.2), objective="natural")
    assert [row["s"] for row in cells(report.time_to(read(natural, new)))] == ["20.0", "not evaluated"]
    with pytest.raises(ValueError, match=r"level must be an accuracy in \[0, 1\], got 40"):
        report.time_to(read(weak), 40)


def test_a_run_trained_without_attacks_does_not_lower_the_level(tmp_path):
    natural, robust = make(tmp_path / "natural", (0.0, 0.0), objective="natural"), make(tmp_path / "robust")
    assert [row["s"] for row in cells(report.time_to(read(natural, robust)))] == ["not reached", "30.0"]
    assert [row["s"] for row in cells(report.time_to(read(natural)))] == ["10.0"]


def test_phases_add_up_to_the_total_cost(tmp_path):
    folder = make(tmp_path / "run", (0.2, 0.3), before=Cost(6.0, 900_000), undone_epoch=2)
    rows = cells(report.phases(read(folder)))
    assert [list(row.values())[1:6] for row in rows] == [  # phase, s, share of s, MACs, share of MACs
        ["search", "6.0", "15.8%", "900 k", "36.0%"],
        ["attack", "16.0", "42.1%", "800 k", "32.0%"],
        ["update", "4.0", "10.5%", "200 k", "8.0%"],
        ["undone", "10.0", "26.3%", "500 k", "20.0%"],
        ["evaluation", "2.0", "5.3%", "100 k", "4.0%"],
    ]
    assert rows[1]["MACs/s"] == "50.0 k"
    assert "1 undone" in report.summary(read(folder))
    plain = make(tmp_path / "plain", (None,), attack=Cost(8.0, 0), update=Cost(2.0, 0))
    assert [row["phase"] for row in cells(report.phases(read(plain)))] == ["attack", "update", "evaluation"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / part for part in ("a/1/ticket", "b/1/ticket", "b/2/ticket", "dense")]
    assert labels(read(*[make(folder) for folder in folders])) == [
        "ticket (a/1/ticket)",
        "ticket (b/1/ticket)",
        "ticket (2/ticket)",
        "dense",
    ]


def test_a_folder_in_several_spellings_is_one_run(tmp_path, monkeypatch):
    folder = make(tmp_path / "dense", (0.25,))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    text = report.report([folder, "dense", Path("link"), "./dense/"], tmp_path / "out")
    assert text.splitlines()[0] == "# Report of 1 run"


def test_a_report_has_all_numbers_in_its_csv_and_all_figures_it_links(tmp_path):
    ticket = make(tmp_path / "ticket", (None, 0.1 + 0.2), name="tick|et, new", before=Cost(5.0, 7), weights=0.1)
    dense = make(tmp_path / "dense", (0.25,), test={"clean": 0.5})
    text = report.report([ticket, str(dense), ticket], tmp_path / "out", level=0.2)
    assert text == (tmp_path / "out" / "report.md").read_text()
    assert "# Report of 2 runs" in text and r"tick\|et, new" in text and "at least 20.0%." in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.md", "report.csv", "accuracy.png", "accuracy.svg", "phases.png", "phases.svg",
    }  # fmt: skip
    assert all(
        f"({name})" in text for name in ("accuracy.png", "accuracy.svg", "phases.png", "phases.svg", "report.csv")
    )
    with (tmp_path / "out" / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["epoch"]) for row in rows] == [
        ("tick|et, new", "1"),
        ("tick|et, new", "2"),
        ("dense", "1"),
    ]
    assert rows[0]["robust_accuracy"] == "" and float(rows[1]["robust_accuracy"]) == 0.1 + 0.2
    assert [float(row["total.seconds"]) for row in rows] == [15.0, 25.0, 10.0]


def test_a_report_shows_the_settings_of_its_runs(tmp_path):
    folders = [make(tmp_path / "a", objective="pgd"), make(tmp_path / "b", objective="trades")]
    shared, own = (
        cells(part) for part in report.report(folders, tmp_path / "out").split("made\n\n")[1].split("\n\n")[:2]
    )
    settings = {row["setting"]: row["every run"] for row in shared}
    assert settings["kind"] == "train" and settings["train.milestones"] == "[0.5, 0.75]"
    assert settings["software.torch"] and settings["machine.cores"]
    assert {"setting": "train.objective", "a": "pgd", "b": "trades"} in own and "train.objective" not in settings
    assert all(settings[name] == "" for name in ("ticket", "method", "prune"))


def test_a_setting_that_one_run_has_and_another_lacks_is_no_setting_of_both(tmp_path):
    folders = [make(tmp_path / "a"), make(tmp_path / "b", ticket=runs.TicketSource("0" * 64, True, False))]
    made = report.report(folders, tmp_path / "out").split("made\n\n")[1].split("\n\n")[:2]
    shared, own = ({row["setting"]: row for row in cells(part)} for part in made)
    assert "ticket" not in shared.keys() | own.keys()
    assert own["ticket.reinit"] == {"setting": "ticket.reinit", "a": "", "b": "True"}


def test_folders_that_cannot_be_reported_are_refused_and_nothing_is_written(tmp_path):
    out, good, new = tmp_path / "out", make(tmp_path / "good"), make(tmp_path / "new", ())
    with pytest.raises(ValueError, match=r"new has no epochs yet: wait for the first"):
        report.report([new], out)
    with pytest.raises(ValueError, match=r"new has no epochs yet.*; .* is not a run folder: it has no run\.json"):
        report.report([new, tmp_path], out)
    with pytest.raises(FileNotFoundError, match=r"there is no run folder .*mistyped"):
        report.report([good, tmp_path / "mistyped"], out)
    with pytest.raises(ValueError, match="at least one run folder, got none"):
        report.report([], out)
    with pytest.raises(ValueError, match=r"level must be an accuracy"):
        report.report([good], out, level=2)
    assert not out.exists()
    with pytest.raises(NotADirectoryError, match=r"run\.json is a file: a report needs a folder"):
        report.report([good], good / "run.json")


def test_folders_without_a_readable_run_are_left_out_of_a_report_with_a_warning(tmp_path, caplog):
    good, new, damaged = make(tmp_path / "good"), make(tmp_path / "new", ()), make(tmp_path / "damaged")
    epochs, other = damaged / runs.EPOCHS, tmp_path / "a file"
    epochs.write_text(epochs.read_text()[:-5])
    other.touch()
    text = report.report([new, damaged, other, good], tmp_path / "out")
    assert text.startswith("# Report of 1 run\n")
    assert [row["run"] for row in cells(text.split("## Time")[0])] == ["good"]
    said = [f"{new} has no epochs yet", f"{epochs}, line 3 is not JSON", f"{other} is not a run folder"]
    assert len(caplog.messages) == 3
    for message, reason in zip(caplog.messages, said, strict=True):
        assert message.startswith(f"left out of the report: {reason}")


def test_a_folder_that_holds_a_report_alone_is_no_run_and_no_error(tmp_path, caplog):
    folder = make(tmp_path / "a")
    for _ in range(2):  # the second time its own folder is among those that runs/* names
        text = report.report(sorted(tmp_path.iterdir()), tmp_path / "report")
        assert [row["run"] for row in cells(text.split("## Time")[0])] == ["a"] and not caplog.messages
    with pytest.raises(ValueError, match=r"folders must name a run folder, got a report alone, .*report"):
        report.report([tmp_path / "report"], tmp_path / "other")
    (tmp_path / "report" / "notes.txt").touch()
    with pytest.raises(ValueError, match="report is not a run folder"):
        report.report([tmp_path / "report"], tmp_path / "other")
    report.report([folder], folder)  # a folder may hold a run and a report
    assert [run.name for run in report.reportable([folder])] == ["a"]


def test_a_missing_matplotlib_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'drawn by matplotlib: pip install "sparse_adv\[demo\]"'):
        report.report([make(tmp_path / "run")], Path(tmp_path / "out"))


def test_one_path_in_place_of_a_list_is_told(tmp_path):
    folder = make(tmp_path / "a")
    for one in (folder, str(folder)):
        with pytest.raises(TypeError, match="folders must be of type Sequence"):
            report.report(one, tmp_path / "out")
    with pytest.raises(ValueError, match=r"level must be an accuracy in \[0, 1\], got '0\.5'"):
        report.report([folder], tmp_path / "out", level="0.5")


def test_a_run_that_has_trained_all_epochs_is_finished_once_it_is_tested(tmp_path):
    folders = [make(tmp_path / "all"), make(tmp_path / "some", robust=(0.2,))]
    folders.append(make(tmp_path / "tested", test={"clean": 0.5}))
    rows = cells(report.report(folders, tmp_path / "out").split("## Time")[0])
    assert [row["status"] for row in rows] == ["epoch 3 of 3, not tested", "epoch 1 of 3", "finished"]
