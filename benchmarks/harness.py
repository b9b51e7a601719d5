"""One way to measure, print and write for all benchmarks.

A benchmark file makes cases. As pytest tests (`make bench`) each side of a case is timed by pytest-benchmark; see
conftest.py. Its `main` times the sides in turns, because the published ratios need that, and writes a record for each
case: a line of text, and with --out a line of a CSV file.
"""

from __future__ import annotations

import argparse
import csv
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import torch
from machine import Peak, environment, measured_peak, print_machine
from timing import Side, Times, interleaved, interleaved_graphs
from torch import Tensor

from sparse_adv import keep_freed_memory
from sparse_adv.files import write_text

Value = str | int | float
Record = dict[str, Value]
"""A line of a CSV file: labels, then milliseconds of each side, then `DERIVED`. Benchmarks differ in their labels."""
DERIVED = ("bound_ms", "ratio", "spread")
QUICK_ROUNDS = 2


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    `macs` and `moved` (bytes) are the least that a call needs; if both are 0, the case has no bound. A rival is a side
    that counts for the ratio; all sides but ours are rivals if none is named.
    """

    labels: Mapping[str, Value]
    sides: Mapping[str, Side]
    """The side "ours" and the sides that it is compared with."""
    rivals: Sequence[str] = ()
    macs: int = 0
    moved: int = 0
    rounds: int = 9
    warmup: int = 1
    capture: bool = False
    """Whether a GPU times each side as a CUDA graph of several calls, to exclude the launches by Python."""


def argument_parser(description: str | None, devices: Sequence[str] = ("cpu",)) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--threads", type=positive, help="of PyTorch on the CPU")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few rounds: shows that the benchmark works")
    parser.add_argument("--out", type=Path, help="new CSV file to write as well")
    return parser


def positive(text: str) -> int:
    """Parse an argument that is an integer of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def integers(text: str) -> tuple[int, ...]:
    """Parse an argument such as "4,4"."""
    return tuple(int(number) for number in text.split(","))


def label_of(sizes: Sequence[int]) -> str:
    """Sizes of a block or a tensor as a label, such as "4x4"."""
    return "x".join(map(str, sizes))


def start(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the arguments, and set up PyTorch and the memory allocator for measuring."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch finds none")
    if options.out and options.out.exists():
        parser.error(f"--out must name a new file, {options.out} exists")
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out must name a file in a folder that exists, got {options.out}")
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.quick:
        keep_freed_memory()
    torch.backends.cudnn.benchmark = options.device == "cuda"
    return options


def main(
    cases: Callable[[str, bool], Iterable[Case]],
    description: str | None,
    arguments: Sequence[str] | None = None,
    devices: Sequence[str] = ("cpu",),
) -> None:
    """The script of a benchmark whose cases depend only on the device and on `--quick`."""
    options = start(argument_parser(description, devices), arguments)
    measure(cases(options.device, options.quick), options)


def run(main: Callable[[], object]) -> None:
    """Run a script; errors about its folders and names become one line and exit code 2, as with `parser.error`."""
    try:
        main()
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(cases: Iterable[Case], options: argparse.Namespace) -> list[Record]:
    """Measure, print and write each case; an interruption ends the process, and a sentence says where the rows are.

    Args:
        cases: made one by one, after the machine's rates were measured.
        options: as `start` returned it.
    """
    peak = measured_peak(options.device)
    print_machine(peak, options.device)
    records, facts = [], environment()
    try:
        for case in cases:
            records.append(record_of(case, peak, options.device, options.quick))
            print(line_of(records[-1]), flush=True)
            if options.out:
                write_records(options.out, records, facts)
    except KeyboardInterrupt:
        if options.out and records:  # the last one may be printed but not yet written
            write_records(options.out, records, facts)
        kept = f"in {options.out}" if options.out else "printed above (--out writes them as well)"
        print(f"\ninterrupted: {f'the rows so far are {kept}' if records else 'nothing was measured'}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    return records


def record_of(case: Case, peak: Peak, device: str, quick: bool = False) -> Record:
    """Time the sides of a case in turns."""
    warmup, rounds = (1, QUICK_ROUNDS) if quick else (case.warmup, case.rounds)
    for side in case.sides.values():
        for _ in range(warmup - 1):  # `interleaved` makes one warm-up call itself
            side()
    if case.capture and device == "cuda":
        times = interleaved_graphs(case.sides, rounds)
    else:
        times = interleaved(case.sides, rounds, device)
    rivals = case.rivals or [side for side in case.sides if side != "ours"]
    return {**case.labels, **columns(times, rivals, peak.seconds(case.macs, case.moved))}


def columns(times: Mapping[str, Times], rivals: Sequence[str], bound: float) -> Record:
    """The measured part of a record, to five digits.

    `<side>_ms` is a median. `bound_ms` is missing if there is no bound. `ratio` is how many times as long the fastest
    rival takes. `spread` is the largest `Times.spread` of the sides.
    """
    numbers = {f"{side}_ms": 1e3 * quantiles.median for side, quantiles in times.items()}
    if bound:
        numbers["bound_ms"] = 1e3 * bound
    numbers["ratio"] = min(times[rival].median for rival in rivals) / times["ours"].median
    numbers["spread"] = max(quantiles.spread for quantiles in times.values())
    return {name: float(f"{number:.5g}") for name, number in numbers.items()}


def sides_of(record: Record) -> dict[str, float]:
    """The milliseconds of each side."""
    return {
        name.removesuffix("_ms"): float(value)
        for name, value in record.items()
        if name.endswith("_ms") and name not in DERIVED
    }


def ratios_of(record: Record) -> dict[str, float]:
    """How many times as long as ours each other side takes."""
    times = sides_of(record)
    ours = times.pop("ours")
    return {side: milliseconds / ours for side, milliseconds in times.items()}


def compared(record: Record) -> tuple[str, str]:
    """The share of the bound in our time, empty if there is no bound, and `ratios_of`, as text."""
    share = f"{float(record['bound_ms']) / float(record['ours_ms']):.0%}" if "bound_ms" in record else ""
    return share, ", ".join(f"{side} {ratio:.2f}" for side, ratio in ratios_of(record).items())


def title_of(labels: Mapping[str, Value]) -> str:
    """The labels of a case or of a record as a title: words stand alone, numbers and blocks have their name."""
    measured = {*DERIVED, *(f"{side}_ms" for side in sides_of(dict(labels)))}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" if isinstance(value, (int, float)) or name == "block" else value
        for name, value in labels.items()
        if name not in measured
    )


def line_of(record: Record) -> str:
    """A record as a line of text: our time and its share of the bound, and how many times as long the others take."""
    share, ratios = compared(record)
    bound = f" ({share} of the bound)" if share else ""
    return f"{title_of(record):<72} {float(record['ours_ms']):9.4g} ms{bound}; times as long: {ratios}"


def table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (heading, ["---"] * len(heading), *lines)]


def write_records(path: Path, records: Sequence[Record], facts: Mapping[str, Value]) -> None:
    """Write a CSV file, which appears whole or not at all; `facts` hold for all records and are comments at its top."""
    names = list(dict.fromkeys(name for record in records for name in record))
    sides = [name for name in names if name.endswith("_ms") and name not in DERIVED]
    labels = [name for name in names if name not in (*sides, *DERIVED)]
    text = StringIO()
    for name, value in facts.items():
        text.write(f"# {name}: {value}\n")
    header = [*labels, *sides, *(name for name in DERIVED if name in names)]
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def compiled(function: Callable[..., Tensor], quick: bool) -> Callable[..., Tensor]:
    """The rival "compile", compiled for one shape: code for several shapes is slower, and after some shapes PyTorch
    gives up.

    The backend "eager" compiles nothing: compiling would take seconds.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, backend="eager" if quick else "inductor")


def read_records(path: Path) -> tuple[dict[str, str], list[Record]]:
    """The facts and the records of a CSV file; empty cells are left out of a record."""
    lines = path.read_text().splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    facts = dict(comment[2:].split(": ", 1) for comment in comments)
    rows = csv.DictReader(lines[len(comments) :])
    return facts, [{name: _value(text) for name, text in row.items() if text} for row in rows]


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
