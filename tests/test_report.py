"""Tables and pictures."""

from sparse_adv import report


def test_a_table_aligns_its_columns_and_leaves_missing_fields_empty():
    rows = [{"run": "ticket", "seconds": 12.345}, {"run": "dense, long name"}]
    lines = report.table(rows, {"run": "{run}", "s": "{seconds:.1f}"}).splitlines()
    assert lines[0].split() == ["|", "run", "|", "s", "|"]
    assert "12.3" in lines[2] and "12.3" not in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_curves_are_drawn_as_png_and_svg(tmp_path):
    lines = {"ticket": [(1.0, 0.2), (2.0, 0.5)], "dense": [(2.0, 0.1), (5.0, 0.55)]}
    png, svg = report.curves(tmp_path / "new" / "picture", lines, title="robust accuracy", x="seconds", y="accuracy")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    assert sorted(file.name for file in png.parent.iterdir()) == ["picture.png", "picture.svg"]


def test_the_first_record_at_a_level_is_found():
    records = [{"epoch": 1, "acc": 0.2}, {"epoch": 2}, {"epoch": 3, "acc": 0.6}, {"epoch": 4, "acc": 0.7}]
    assert report.first_to_reach(records, "acc", 0.5)["epoch"] == 3
    assert report.first_to_reach(records, "acc", 0.9) is None
