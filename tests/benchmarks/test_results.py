"""The committed rows are the ones that the documents' numbers come from."""

import re
import statistics
from pathlib import Path

import bench_layers
import bench_masked_conv2d as bench
import pytest
from harness import Record, read_records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = re.sub(r"\s+", " ", (ROOT / "docs" / "results" / "cpu_kernels.md").read_text(encoding="utf-8"))
UPDATES = (ROOT / "docs" / "results" / "updates.md").read_text(encoding="utf-8").splitlines()
AUTOATTACK = (ROOT / "docs" / "results" / "autoattack.md").read_text(encoding="utf-8").splitlines()


def rows(conditions: str = "avx512_1_thread_batch_64") -> list[Record]:
    records = read_records(RESULTS / "masked_conv2d_zen4" / f"{conditions}.csv")[1]
    assert len(records) == len(bench.MASKS["cpu"]) * len(bench.LAYERS["cpu"]) * 3
    return records


def test_every_line_of_the_table_of_cpu_kernels_follows_from_the_rows():
    lines = bench.ratio_table(rows()).splitlines()
    assert len(lines) == 2 + 7 * 3
    assert [line for line in lines if line not in PAGE] == []


@pytest.mark.parametrize("block", ["1x1", "4x4"])
@pytest.mark.parametrize("density", [0.1, 0.02])
def test_the_milliseconds_beside_the_bounds_follow_from_the_rows(block, density):
    place = {"pass": "forward", "block": block, "density": density}
    milliseconds = [f"{r['ours_ms']:.1f}" for r in rows() if place.items() <= r.items()]
    cells = " | ".join(rf"[\d.]+ of {re.escape(time)}" for time in milliseconds)
    assert re.search(rf"\| \({block.replace('x', ', ')}\) \| {density} \| {cells} \|", PAGE)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (rows("avx512_2_threads_batch_128"), "{lowest} to {highest} of these ratios at batch 128"),
        (rows("avx512_2_threads_batch_64"), "{lowest} to {highest}, median {median}, at batch 64"),
        (rows("avx2_1_thread_batch_64"), "{lowest} to {highest} of these ratios, median {median}"),
    ],
    ids=["2 threads, batch 128", "2 threads, batch 64", "AVX2"],
)
def test_the_ratios_under_other_conditions_follow_from_the_rows(other, sentence):
    """Each is a mean over the layers, relative to that of one thread with AVX-512."""

    def means(records: list[Record]) -> dict[tuple, float]:
        ratios: dict[tuple, list[float]] = {}
        for r in records:
            ratios.setdefault((r["block"], r["pass"], r["density"]), []).append(float(r["ratio"]))
        return {key: statistics.geometric_mean(values) for key, values in ratios.items()}

    base, changed = means(rows()), means(other)
    relative = sorted(changed[key] / base[key] for key in base)
    numbers = {"lowest": relative[0], "highest": relative[-1], "median": statistics.median(relative)}
    assert sentence.format(**{name: f"{number:.2f}" for name, number in numbers.items()}) in PAGE


def test_the_comparison_with_sparseprop_follows_from_the_rows():
    forward, gradients = bench.sparseprop_table(rows()).splitlines()[2:]
    means = [[cell.split()[0] for cell in line.split("|")[3:-1]] for line in (forward, gradients)]
    (first, *_, last), (first_of_both, *_, last_of_both) = means
    assert f"forward takes {first} to {last} times as long" in PAGE
    assert f"both gradients together {first_of_both} to {last_of_both} times" in PAGE


def test_the_count_of_passes_that_lose_no_time_follows_from_the_rows():
    records = read_records(RESULTS / "layers_zen4.csv")[1]
    losers = sum(map(bench_layers.slower, records))
    assert f"Of {len(records)} passes {len(records) - losers} lose no time" in PAGE
    assert f"gain up to {max(float(r['ratio']) for r in records):.0f} times" in PAGE


def test_what_removing_channels_saves_follows_from_the_rows():
    every, inner = read_records(RESULTS / "shrink_zen4.csv")[1]
    assert f"{every['ratio']:.1f} times as fast at {every['macs_kept']:.2f} of the MACs" in PAGE
    assert f"inner channels alone {inner['ratio']:.1f} times at {inner['macs_kept']:.2f}" in PAGE


def table_row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def mask_of(record: Record) -> str:
    """The mask in the words of a table: "(4, 4) at 0.1" or "dense"."""
    return str(record["mask"]).removeprefix("block ").replace(", density", " at")


def three_digits(milliseconds: float) -> str:
    number, unit = (milliseconds, "ms") if milliseconds < 999.5 else (milliseconds / 1e3, "s")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


@pytest.mark.parametrize("machine", ["zen4", "epyc", "epyc_compile", "xeon_207"])
def test_every_line_of_the_tables_of_updates_follows_from_the_rows(machine):
    records = read_records(RESULTS / f"training_{machine}.csv")[1]
    for r in records:
        ours, without, dense = (float(r[f"{side}_ms"]) for side in ("ours", "without_engine", "careful"))
        line = table_row(
            f"{r['network']}, {r['batch']}",
            f"{str(r['op']).removesuffix(' update')}, {mask_of(r)}",
            *map(three_digits, (ours, without, dense)),
            f"**{dense / ours:.1f}**",
            f"{float(r['compile_ms']) / ours:.1f}" if "compile_ms" in r else "-",
            f"{dense / without:.1f}",
        )
        assert line in UPDATES


@pytest.mark.parametrize("machine", ["Xeon, AVX-512", "EPYC, AVX2"])
def test_every_run_of_autoattack_that_was_timed_is_in_the_results(machine):
    records = read_records(RESULTS / f"autoattack_{machine[:4].lower()}.csv")[1]
    for r in records:
        network = f"{str(r['network']).split()[-1]}, {mask_of(r).removesuffix(' at 0.1')}"
        seconds = (f"{float(r[side]) / 1e3:.0f}" for side in ("ours_ms", "torchattacks_ms"))
        counts = r["images"], r["images robust"]
        assert table_row(machine, network, *counts, *seconds, f"{r['ratio']:.1f}") in AUTOATTACK
