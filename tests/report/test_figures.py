"""Figures: every curve and bar has its run's numbers, in the unit that its axis names."""

import warnings
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from helpers.run_folders import epoch_record, make, read

from sparse_adv import report
from sparse_adv.config import TrainConfig
from sparse_adv.runs import NO_COST, Cost, Run, RunInfo


def texts_of(svg):
    """The texts of an SVG figure, which matplotlib notes as comments beside the shapes of their letters."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(svg, parser).getroot()
    return [element.text.strip() for element in root.iter() if element.tag is ElementTree.Comment]


def test_accuracy_is_drawn_against_time_epochs_and_macs(tmp_path):
    ticket = make(tmp_path / "ticket", before=Cost(400.0, 5_000_000))
    one, none = make(tmp_path / "one epoch", (0.3,)), make(tmp_path / "none", (None,))
    search = make(tmp_path / "search", kind="search")
    texts = texts_of(report.accuracy_curves(tmp_path / "picture", read(search, ticket, one, none))[1])
    assert {"robust validation accuracy", "clean validation accuracy", "training time (min),", "epochs"} <= set(texts)
    assert texts.count("with ticket search (dotted)") == 2
    assert {"ticket", "one epoch"} <= set(texts) and not {"search", "none"} & set(texts)
    assert "search" in texts_of(report.accuracy_curves(tmp_path / "picture", read(search))[1])
    assert report.accuracy_curves(tmp_path / "nothing", read(none)) == []


def test_phases_are_drawn_with_whole_names(tmp_path):
    long = make(tmp_path / "long", name=r"a name of many $\no$ words that takes two lines", before=Cost(3.0, 0))
    none = make(tmp_path / "none", (None,), attack=NO_COST, update=NO_COST, evaluation=NO_COST)
    texts = texts_of(report.phase_bars(tmp_path / "picture", read(long, none))[1])
    assert {r"a name of many $\no$ words", "that takes two lines", "search", "attack", "evaluation"} <= set(texts)
    assert "undone" not in texts


@pytest.mark.filterwarnings("ignore:Glyph")  # by the test, which asks for the size of the text
@pytest.mark.parametrize("name", ["word " * 60, "x" * 300, "\N{CJK UNIFIED IDEOGRAPH-65E5} run"])
def test_every_name_is_beside_its_curve_within_the_figure(tmp_path, drawn, name):
    with warnings.catch_warnings(action="error"):
        report.accuracy_curves(tmp_path / "picture", read(make(tmp_path / "long", name=name), make(tmp_path / "other")))
        report.phase_bars(tmp_path / "phases", read(make(tmp_path / "again", name=name)))
    (legend,) = drawn[0].legends
    box, figure = legend.get_window_extent(), drawn[0].bbox
    assert figure.x0 <= box.x0 and box.x1 <= figure.x1 and figure.y0 <= box.y0
    assert [text.get_text().split() for text in legend.get_texts()][1] == ["other"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, with their axes, and what was drawn in these."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (figures.append(self), save(self, file)))
    return figures


@pytest.mark.parametrize(("scale", "seconds", "unit"), [(1, 1, "s"), (40, 60, "min"), (2000, 3600, "h")])
def test_every_curve_has_its_own_numbers_in_the_unit_that_its_axis_names(tmp_path, drawn, scale, seconds, unit):
    before = Cost(5.0 * scale, 7_000)
    records = [
        epoch_record(
            epoch,
            robust_accuracy=0.1 * epoch,
            clean_accuracy=0.5 + 0.1 * epoch,
            total=Cost(10.0 * scale * epoch, 500 * epoch),
        )
        for epoch in (1, 2, 3)
    ]
    info = RunInfo("train", TrainConfig(epochs=3), name="run", before=before)
    report.accuracy_curves(tmp_path / "picture", [Run(tmp_path, info, records, None)])
    axes = drawn[0].axes
    x = ([10 * scale * n / seconds for n in (1, 2, 3)], [1, 2, 3], [500, 1000, 1500])
    ends = [5 * scale / seconds, None, 7_000]
    for row, accuracies in enumerate(([0.1, 0.2, 0.3], [0.6, 0.7, 0.8])):
        for column in range(3):
            curve, *lines = axes[3 * row + column].lines
            assert list(curve.get_xdata()) == pytest.approx(x[column])
            assert list(curve.get_ydata()) == pytest.approx(accuracies)
            assert [line.get_xdata()[0] for line in lines] == ([ends[column]] if ends[column] else [])
    assert [axes[3 * row].get_ylabel().split()[0] for row in (0, 1)] == ["robust", "clean"]
    assert f"({unit})" in axes[3].get_xlabel() and axes[4].get_xlabel() == "epochs"


@pytest.mark.parametrize(("scale", "seconds"), [(1, 1), (13, 60)])  # 13: runs of 325 s and 286 s
def test_every_bar_is_as_long_as_its_phase_costs(tmp_path, drawn, scale, seconds):
    cost = {"attack": Cost(8.0 * scale, 400), "update": Cost(2.0 * scale, 100), "evaluation": Cost(1.0 * scale, 50)}
    records = [epoch_record(epoch, **cost) for epoch in (1, 2)]
    info = RunInfo("train", TrainConfig(epochs=2), before=Cost(3.0 * scale, 70))
    runs = [Run(tmp_path / "a", info, records, None), Run(tmp_path / "b", replace(info, before=Cost()), records, None)]
    report.phase_bars(tmp_path / "picture", runs)
    for axes, wanted, unit in zip(
        drawn[0].axes,
        ([[3, 0], [16, 16], [4, 4], [2, 2]], [[70, 0], [800, 800], [200, 200], [100, 100]]),
        (1, 0),
        strict=True,
    ):
        factor = scale / seconds if unit else 1
        ends = [0.0, 0.0]
        for bars, widths in zip(axes.containers, wanted, strict=True):
            assert [bar.get_width() for bar in bars] == pytest.approx([factor * width for width in widths])
            assert [bar.get_x() for bar in bars] == pytest.approx(ends)
            ends = [end + factor * width for end, width in zip(ends, widths, strict=True)]
