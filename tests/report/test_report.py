"""Reports: the numbers in the tables are those of the run folders, and no folder's content breaks one."""

import csv
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sparse_adv import report, runs
from sparse_adv.report.measures import labels
from sparse_adv.report.tables import count


def make(
    folder,
    robust=(0.2, 0.4, 0.5),
    *,
    name=None,
    command="train",
    objective="pgd",
    weights=1.0,
    before=(0.0, 0),
    spent=(8.0, 2.0, 1.0),
    work=(400_000, 100_000, 50_000),
    epochs=3,
    undone_epoch=None,
    result=None,
):
    """A run of an epoch per accuracy (None: not evaluated); `spent`, `work`: of attack, update and evaluation."""
    named = {"name": name} if name else {}
    runs.begin(
        folder,
        {"command": command, "objective": objective, "epochs": epochs, "milestones": [0.5, 0.75]},
        densities={"weights": weights, "multiply_adds": weights},
        before={"seconds": before[0], "multiply_adds": before[1]},
        **named,
    )
    seconds, adds = before
    records = []
    for epoch, accuracy in enumerate(robust, 1):
        attempts = 2 if epoch == undone_epoch else 1
        seconds, adds = seconds + attempts * sum(spent[:2]), adds + attempts * sum(work[:2])
        record = {"epoch": epoch, "loss": 1.5, "seconds": seconds, "multiply_adds": adds}
        for phase, s, w in zip(("attack", "update", "evaluation"), spent, work, strict=True):
            record |= {f"{phase}_seconds": s, f"{phase}_multiply_adds": w}
        if accuracy is not None:
            record |= {"robust_accuracy": accuracy, "clean_accuracy": accuracy + 0.25}
        if epoch == undone_epoch:
            record["rolled_back"] = True
        records.append(record)
    runs.write_records(folder / runs.EPOCHS, records)
    if result is not None:
        runs.write_json(folder / runs.RESULT, {"seconds": seconds, "multiply_adds": adds, **result})
    return folder


def cells(markdown):
    """The rows of the first Markdown table in a text, as dicts by heading."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    grid = [[cell.strip() for cell in line.replace(r"\|", "\0").split("|")[1:-1]] for line in lines]
    assert {len(line) for line in grid} == {len(grid[0])}
    return [dict(zip(grid[0], line, strict=True)) for line in grid[2:]]


def read(*folders):
    return [runs.read(folder) for folder in folders]


def test_a_table_aligns_its_columns_and_leaves_missing_fields_empty():
    rows = [{"run": "ticket", "seconds": 12.345}, {"run": "dense, long name"}, {"run": "new", "seconds": None}]
    lines = report.table(rows, {"run": "{run}", "s": "{seconds:.1f}"}).splitlines()
    assert lines[0].split() == ["|", "run", "|", "s", "|"]
    assert "12.3" in lines[2] and [line.split("|")[2].strip() for line in lines[3:]] == ["", ""]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("name", ["a | b", "a\nb", "<b>", "{name}", "$x$"])
def test_no_name_breaks_a_table(name):
    line = report.table([{"run": name, "s": 1}], {"run": "{run}", "s": "{s}"}).splitlines()[2]
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


def test_the_first_record_at_a_level_is_found():
    records = [{"epoch": 1, "acc": 0.2}, {"epoch": 2}, {"epoch": 3, "acc": 0.6}, {"epoch": 4, "acc": 0.7}]
    assert report.first_to_reach(records, "acc", 0.5)["epoch"] == 3
    assert report.first_to_reach(records, "acc", 0.9) is None


def test_the_summary_has_a_run_s_costs_and_accuracies(tmp_path):
    done = make(
        tmp_path / "ticket", (0.3, 0.5, 0.4), weights=0.1, before=(7.0, 2_000_000), result={"test": {"pgd-20": 0.35}}
    )
    search = make(tmp_path / "search", (None, None), command="search", objective="fgsm", epochs=4)
    first, second = cells(report.summary(read(done, search)))
    assert first == {
        "run": "ticket",
        "made by": "train, pgd",
        "weights kept": "0.100",
        "multiply-adds kept": "0.100",
        "s before": "7.0",
        "s/epoch": "10.00",
        "s in all": "37.0",
        "multiply-adds in all": "3.50 M",
        "best robust": "50.0%",
        "clean then": "75.0%",
        "at epoch": "2",
        "last robust": "40.0%",
        "test pgd-20": "35.0%",
        "status": "finished",
    }
    assert (second["made by"], second["best robust"], second["test pgd-20"]) == ("search, fgsm", "", "")
    assert (second["s in all"], second["status"]) == ("20.0", "epoch 2 of 4")


def test_time_to_a_level_includes_the_search_and_ratios_are_to_the_dense_run(tmp_path):
    ticket = make(tmp_path / "ticket", (0.1, 0.3, 0.45), weights=0.1, before=(5.0, 500_000), spent=(2.0, 0.5, 9.0))
    dense = make(tmp_path / "dense", (0.1, 0.2, 0.5))
    search = make(tmp_path / "search", (0.05,), command="search")
    text = report.time_to(read(search, ticket, dense))
    assert "at least 45.0%, the highest" in text and "Ratios are to dense." in text
    assert [list(row.values()) for row in cells(text)] == [
        ["ticket", "12.5", "0.42", "3", "1.00", "2.00 M", "1.33"],
        ["dense", "30.0", "1.00", "3", "1.00", "1.50 M", "1.00"],
    ]
    assert [row["s"] for row in cells(report.time_to(read(ticket, dense), 0.25))] == ["10.0", "30.0"]


def test_a_level_that_a_run_never_reached_is_said_so(tmp_path):
    weak, new = make(tmp_path / "weak", (0.1, 0.2)), make(tmp_path / "new", (None,))
    sparse = make(tmp_path / "sparse", weights=0.1)
    text = report.time_to(read(weak, sparse, new), 0.4)
    assert [row["s"] for row in cells(text)] == ["not reached", "20.0", "not evaluated"]
    assert {row["ratio of s"] for row in cells(text)} == {""} and "no ratios, as weak never reached it" in text
    assert report.time_to(read(new)) == "No run has a robust validation accuracy yet.\n"
    with pytest.raises(ValueError, match=r"level must be a share in \[0, 1\], got 40"):
        report.time_to(read(weak), 40)


def test_a_run_trained_without_attacks_does_not_lower_the_level(tmp_path):
    natural, robust = make(tmp_path / "natural", (0.0, 0.0), objective="natural"), make(tmp_path / "robust")
    assert [row["s"] for row in cells(report.time_to(read(natural, robust)))] == ["not reached", "30.0"]
    assert [row["s"] for row in cells(report.time_to(read(natural)))] == ["10.0"]


def test_phases_add_up_to_everything_that_was_spent(tmp_path):
    folder = make(tmp_path / "run", (0.2, 0.3), before=(6.0, 900_000), undone_epoch=2)
    rows = cells(report.phases(read(folder)))
    assert [(row["phase"], row["s"], row["share of s"], row["multiply-adds"]) for row in rows] == [
        ("search", "6.0", "15.8%", "900 k"),
        ("attack", "16.0", "42.1%", "800 k"),
        ("update", "4.0", "10.5%", "200 k"),
        ("undone", "10.0", "26.3%", "500 k"),
        ("evaluation", "2.0", "5.3%", "100 k"),
    ]
    assert rows[1]["multiply-adds/s"] == "50.0 k"
    assert "1 undone" in report.summary(read(folder))
    plain = make(tmp_path / "plain", (None,), work=(0, 0, 0))
    assert [row["phase"] for row in cells(report.phases(read(plain)))] == ["attack", "update", "evaluation"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [tmp_path / part for part in ("a/1/ticket", "b/1/ticket", "b/2/ticket", "dense")]
    found = labels(read(*[make(folder) for folder in folders]))
    assert found == ["ticket (a/1/ticket)", "ticket (b/1/ticket)", "ticket (2/ticket)", "dense"]


def test_a_report_has_every_number_in_its_csv_and_every_picture_it_links(tmp_path):
    ticket = make(tmp_path / "ticket", (None, 0.1 + 0.2), name="tick|et, new", before=(5.0, 7), weights=0.1)
    dense = make(tmp_path / "dense", (0.25,), result={})
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
    assert [float(row["seconds"]) for row in rows] == [15.0, 25.0, 10.0]


def test_a_report_says_how_its_runs_were_made(tmp_path):
    folders = [make(tmp_path / "a", objective="pgd"), make(tmp_path / "b", objective="trades")]
    shared, own = (
        cells(part) for part in report.report(folders, tmp_path / "out").split("made\n\n")[1].split("\n\n")[:2]
    )
    facts = {row["fact"]: row["every run"] for row in shared}
    assert (
        facts["settings.command"] == "train"
        and facts["settings.milestones"] == "[0.5, 0.75]"
        and facts["versions.torch"]
        and facts["machine.cores"]
    )
    assert {"fact": "settings.objective", "a": "pgd", "b": "trades"} in own and "settings.objective" not in facts


def test_folders_that_cannot_be_reported_are_named_and_nothing_is_written(tmp_path):
    out, good, new = tmp_path / "out", make(tmp_path / "good"), make(tmp_path / "new", ())
    with pytest.raises(ValueError, match=r"new has no epochs yet: wait for the first"):
        report.report([good, new], out)
    with pytest.raises(FileNotFoundError, match=r"no run folder: it has no run\.json"):
        report.report([good, tmp_path], out)
    with pytest.raises(ValueError, match="at least one run folder, got none"):
        report.report([], out)
    with pytest.raises(ValueError, match=r"level must be a share"):
        report.report([good], out, level=2)
    assert not out.exists()
    with pytest.raises(NotADirectoryError, match=r"run\.json is a file: a report needs a folder"):
        report.report([good], good / "run.json")


def written(svg):
    """The texts that matplotlib notes beside the shapes of an SVG picture's letters."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(svg, parser).getroot()
    return [element.text.strip() for element in root.iter() if element.tag is ElementTree.Comment]


def test_curves_are_drawn_as_png_and_svg(tmp_path):
    lines = {"ticket": [(1.0, 0.2), (2.0, 0.5)], r"_dense $\no$": [(2.0, 0.1), (5.0, 0.55)], "none": []}
    png, svg = report.curves(tmp_path / "new" / "picture", lines, title="robust accuracy", x="seconds", y="accuracy")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert {"robust accuracy", "seconds", "accuracy", "ticket", r"_dense $\no$", "none", "20%"} <= set(written(svg))
    assert sorted(file.name for file in png.parent.iterdir()) == ["picture.png", "picture.svg"]


def test_accuracy_is_drawn_against_time_epochs_and_multiply_adds(tmp_path):
    ticket = make(tmp_path / "ticket", before=(400.0, 5_000_000))
    one, none = make(tmp_path / "one epoch", (0.3,)), make(tmp_path / "none", (None,))
    search = make(tmp_path / "search", command="search")
    texts = written(report.accuracy_curves(tmp_path / "picture", read(search, ticket, one, none))[1])
    assert {"robust validation accuracy", "clean validation accuracy", "training time (min),", "epochs"} <= set(texts)
    assert texts.count("with ticket search (dotted)") == 2
    assert {"ticket", "one epoch"} <= set(texts) and not {"search", "none"} & set(texts)
    assert "search" in written(report.accuracy_curves(tmp_path / "picture", read(search))[1])
    assert report.accuracy_curves(tmp_path / "nothing", read(none)) == []


def test_phases_are_drawn_with_whole_names(tmp_path):
    long = make(tmp_path / "long", name=r"a name of many $\no$ words that takes two lines", before=(3.0, 0))
    none = make(tmp_path / "none", (None,), spent=(0.0, 0.0, 0.0), work=(0, 0, 0))
    texts = written(report.phase_bars(tmp_path / "picture", read(long, none))[1])
    assert {r"a name of many $\no$ words", "that takes two lines", "search", "attack", "evaluation"} <= set(texts)
    assert "undone" not in texts


def test_a_missing_matplotlib_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r'drawn by matplotlib: pip install "sparse_adv\[demo\]"'):
        report.report([make(tmp_path / "run")], Path(tmp_path / "out"))
