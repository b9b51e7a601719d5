"""Records: what is measured of a case, its line of text and its CSV file. And every benchmark runs to its end."""

import importlib

import harness
import pytest
import torch
from harness import Case
from machine import Peak
from timing import Times

from sparse_adv.config import TrainConfig
from sparse_adv.runs import RunInfo

PEAK = Peak(flops=2e6, bandwidth=1e9)
FACTS = {"device": "a CPU", "threads": 1}
SLOW = Times(median=6e-3, q20=5e-3, q80=8e-3)
FAST = Times(median=2e-3, q20=2e-3, q80=2.2e-3)
RECORD = {
    "op": "masked_conv2d",
    "block": "4x4",
    "density": 0.1,
    "ours_ms": 2.0,
    "dense_ms": 6.0,
    "bound_ms": 0.5,
    "ratio": 3.0,
    "spread": 0.5,
}
QUICK = {
    "bench_masked_conv2d": ["ours_ms", "ours_unpacked_ms", "dense_ms", "dense_channels_last_ms", "bound_ms"],
    "bench_layers": ["kernel", "ours_ms", "dense_ms", "dense_channels_last_ms", "bound_ms"],
    "bench_pgd_step": ["ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_pgd_step_normalized": ["ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_random_start": ["ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_pgd_ops": ["shape", "ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_batch_norm_act": ["pass", "layout", "ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_max_pool2d": ["pass", "layout", "ours_ms", "eager_ms", "bound_ms"],
    "bench_pointwise": ["pass", "ours_ms", "eager_ms", "compile_ms", "bound_ms"],
    "bench_winograd_conv2d": ["tile", "ours_ms", "engine_ms", "dense_ms", "dense_channels_last_ms", "bound_ms"],
    "bench_masked_winograd_conv2d": ["mask", "ours_ms", "direct_ms", "winograd_ms", "dense_ms", "bound_ms"],
    "bench_attack": ["ours_ms", "published_ms", "compile_ms", "ours_dense_ms"],
    "bench_shrink": ["macs_kept", "ours_ms", "dense_ms"],
    "winograd_thresholds": ["constant", "value", "images", "ours_ms", "without_ms"],
}


def case_of(times: dict[str, Times], rivals: list[str], monkeypatch, **fields) -> Case:
    """A case whose times are given instead of measured."""
    monkeypatch.setattr(harness, "interleaved", lambda sides, rounds, device: {name: times[name] for name in sides})
    labels = {"op": "masked_conv2d", "block": "4x4", "density": 0.1}
    return Case(labels, {name: lambda: None for name in times}, rivals, **fields)


def test_a_record_has_medians_bound_ratio_and_spread(monkeypatch):
    case = case_of({"ours": FAST, "dense": SLOW}, ["dense"], monkeypatch, macs=500, moved=10)
    assert harness.record_of(case, PEAK, "cpu") == RECORD


def test_the_fastest_rival_counts_for_the_ratio_and_other_sides_do_not(monkeypatch):
    times = {"ours": FAST, "dense": SLOW, "dense_channels_last": SLOW._replace(median=5e-3), "ours_unpacked": FAST}
    record = harness.record_of(case_of(times, ["dense", "dense_channels_last"], monkeypatch), PEAK, "cpu")
    assert record["ratio"] == 2.5 and "bound_ms" not in record


def test_all_sides_but_ours_are_rivals_where_none_is_named(monkeypatch):
    times = {"ours": FAST, "dense": SLOW, "dense_channels_last": SLOW._replace(median=5e-3)}
    assert harness.record_of(case_of(times, [], monkeypatch), PEAK, "cpu")["ratio"] == 2.5


def test_each_side_is_warmed_up_as_often_as_its_case_says():
    calls = []
    case = Case({}, {"ours": lambda: calls.append(1)}, ["ours"], rounds=2, warmup=4)
    harness.record_of(case, PEAK, "cpu")
    assert len(calls) == 4 + 2


def test_a_line_of_text_has_the_labels_and_how_the_sides_compare():
    line = " ".join(harness.line_of(RECORD).split())
    assert line == "masked_conv2d, block 4x4, density 0.1 2 ms (25% of the bound); times as long: dense 3.00"


def test_a_file_returns_what_was_written(tmp_path):
    other = {"op": "PGD-10 update, shrunk", "removed": "half", "ours_ms": 1.5, "spread": 0.1}
    harness.write_records(tmp_path / "a.csv", [RECORD, other], FACTS)
    facts, records = harness.read_records(tmp_path / "a.csv")
    assert facts == {"device": "a CPU", "threads": "1"} and records == [RECORD, other]
    header = (tmp_path / "a.csv").read_text().splitlines()[len(FACTS)]
    assert header == "op,block,density,removed,ours_ms,dense_ms,bound_ms,ratio,spread"
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(
    ("measured", "written", "kept"),
    [
        (1, True, "the rows so far are in {}"),
        (1, False, "the rows so far are printed above (--out writes them as well)"),
        (0, True, "nothing was measured"),
    ],
)
def test_an_interruption_loses_no_record_and_says_where_they_are(
    tmp_path, monkeypatch, capsys, measured, written, kept
):
    def cases():
        for _ in range(measured):
            yield case_of({"ours": FAST, "dense": SLOW}, ["dense"], monkeypatch)
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "measured_peak", lambda device: PEAK)
    out = tmp_path / "a.csv"
    options = harness.argument_parser("").parse_args(["--quick", *(["--out", str(out)] if written else [])])
    with pytest.raises(SystemExit) as ended:
        harness.measure(cases(), options)
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == f"interrupted: {kept.format(out)}"
    assert not (written and measured) or [r["ratio"] for r in harness.read_records(out)[1]] == [3.0]


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_run_of_each_benchmark_leaves_records(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(harness, "measured_peak", lambda device: PEAK)
    benchmark, threads = importlib.import_module(name), torch.get_num_threads()
    benchmark.main(["--quick", "--threads", str(threads), "--out", str(tmp_path / "a.csv")])
    printed = capsys.readouterr().out
    facts, records = harness.read_records(tmp_path / "a.csv")
    assert facts["threads"] == str(threads) and "commit" in facts
    assert {column for record in records for column in record} >= {"op", "ratio", "spread", *QUICK[name]}
    assert all(harness.line_of(record) in printed for record in records)


def test_the_picture_is_drawn_from_a_quick_run_and_again_from_its_rows(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.setattr(harness, "measured_peak", lambda device: PEAK)
    plot, threads = importlib.import_module("plot_masked_conv2d"), str(torch.get_num_threads())
    rows, first, again = tmp_path / "a.csv", tmp_path / "a.svg", tmp_path / "b.svg"
    plot.main(["--quick", "--threads", threads, "--out", str(rows), "--picture", str(first)])
    plot.main(["--rows", str(rows), "--threads", threads, "--picture", str(again), "--quick"])
    assert "block (4, 4)" in first.read_text() and len(first.read_text()) == len(again.read_text())


def error_of(benchmark: str, capsys, *arguments: str) -> str:
    """The last line of what a script that refuses its arguments prints."""
    with pytest.raises(SystemExit) as ended:
        harness.run(lambda: importlib.import_module(benchmark).main(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["bench_attack", "bench_masked_conv2d", "bench_shrink", "bench_update"])
def test_without_a_gpu_its_benchmarks_end_with_one_sentence(script, capsys):
    assert error_of(script, capsys, "--device", "cuda").endswith("--device cuda needs a GPU, and torch finds none")


BAD = {
    "threads": ("bench_pointwise", ["--threads", "0"], "--threads: must be an integer of at least 1, got '0'"),
    "folder of out": ("bench_pointwise", ["--out", "nowhere/a.csv"], "in a folder that exists, got nowhere/a.csv"),
    "batch": ("bench_training", ["--batch", "0"], "--batch: must be an integer of at least 1, got '0'"),
    "seeds": (
        "seconds_to_robustness",
        ["c", "o", "train", "--seeds", "x"],
        "must be integers from 0 on, such as 0,1,2",
    ),
    "rows": ("bench_training", ["--rows", "0,99"], "must be numbers from 0 to 10, such as 0,3, got '0,99'"),
    "network": ("bench_training", ["--network", "nope"], '--network: there is no architecture "nope"'),
    "picture": ("plot_masked_conv2d", ["--quick"], "--quick needs --picture"),
    "run": ("permute_channels", ["nowhere"], "nowhere is not a run folder: it has no run.json"),
    "time": ("seconds_to_robustness", ["nowhere", "OUT", "train"], "seconds.json is missing: run `time` first"),
    "table": ("seconds_to_robustness", ["nowhere", "OUT", "table"], "OUT has no tested run: run `train` first"),
    "report": ("gpu_report", ["nowhere"], "'nowhere/parts.tsv'"),
    "tables": ("gpu_table", ["--hepl"], "unrecognized arguments: --hepl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_in_one_line(name, capsys, monkeypatch, tmp_path):
    benchmark, arguments, message = BAD[name]
    if benchmark in ("plot_masked_conv2d", "seconds_to_robustness"):
        pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(harness, "measured_peak", lambda device: PEAK)
    assert message in error_of(benchmark, capsys, *arguments)


def test_seconds_that_were_measured_are_kept_and_missing_ones_named(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    (tmp_path / "seconds.json").write_text('{"epoch": {"dense": 1.0}}')
    message = error_of("seconds_to_robustness", capsys, "nowhere", str(tmp_path), "time")
    assert message.endswith("seconds.json exists: remove it to measure again")
    row = "static (4, 4) 0.1, 0.5"
    message = error_of("seconds_to_robustness", capsys, "nowhere", str(tmp_path), "train", "--rows", row)
    assert "seconds.json has no seconds of static (4, 4) 0.1" in message


def test_a_file_that_exists_is_not_written_again(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("an hour of rows")
    message = error_of("bench_pointwise", capsys, "--quick", "--out", str(tmp_path / "a.csv"))
    assert message.endswith(f"--out must name a new file, {tmp_path / 'a.csv'} exists")
    assert (tmp_path / "a.csv").read_text() == "an hour of rows"


def test_autoattack_is_timed_on_each_of_several_runs(tmp_path, monkeypatch):
    """Both sides are replaced by ones that return at once."""
    compare = importlib.import_module("compare_autoattack")
    monkeypatch.setattr(harness, "measured_peak", lambda device: PEAK)
    monkeypatch.setattr(compare, "find_spec", lambda name: True)
    monkeypatch.setattr(compare.runs, "read", lambda folder: RunInfo("train", TrainConfig(), name=folder.name))
    monkeypatch.setattr(
        compare, "case", lambda run, *_: Case({"run": run.name}, {"ours": int, "torchattacks": int}, ["torchattacks"])
    )
    compare.main(["first", "second", "--out", str(tmp_path / "a.csv")])
    assert [record["run"] for record in harness.read_records(tmp_path / "a.csv")[1]] == ["first", "second"]
