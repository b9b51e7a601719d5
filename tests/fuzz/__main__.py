"""A campaign of random calls of ops and attacks, tampered patterns and damaged files.

Every case must end in a right value or in one clear sentence. A crash, another type of exception, more than 10 s or
more than 1 GiB is a failure, and is printed with the command that repeats it.
"""

from __future__ import annotations

import argparse
import collections
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import IO

from fuzz import child

SECONDS = 10.0
"""That a case may take."""
_START_SECONDS = 120.0
"""For the imports of a process."""
_CASES_OF_A_PROCESS = 400
_CAMPAIGN = 1_000_000
"""Case numbers of a campaign: those of seed 7 begin at 7,000,000."""


def main() -> int:
    """Run a campaign or one case; the exit code is 0 if no case failed, else 1."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(child.KINDS), help="comma-separated")
    parser.add_argument("--case", help="repeat one case, KIND:NUMBER")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, first, last = given.child
        child.run(kind, range(int(first), int(last)))
        return 0
    campaign = Campaign()
    if given.case:
        kind, number = given.case.split(":")
        campaign.run(kind, range(int(number), int(number) + 1), 3600)
    else:
        kinds = given.kinds.split(",")
        print(f"fuzz: seed {given.seed}, {given.minutes:g} minutes of {', '.join(kinds)}")
        for kind in kinds:
            left = 60 * given.minutes / len(kinds)
            first, last = _CAMPAIGN * given.seed, _CAMPAIGN * (given.seed + 1)
            while first < last and left > 0:
                first, spent = campaign.run(kind, range(first, min(last, first + _CASES_OF_A_PROCESS)), left)
                left -= spent
    campaign.print_summary()
    return 1 if campaign.failures else 0


class Campaign:
    """Runs cases in other processes, so that it survives whatever they do."""

    def __init__(self) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []

    def run(self, kind: str, numbers: range, seconds: float) -> tuple[int, float]:
        """Run cases in one process, until one ends it, hangs or the time is over.

        The time counts from the first case: on a busy machine Python and PyTorch take seconds to start.

        Returns:
            The next number, and the seconds that the cases took.
        """
        errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        process = subprocess.Popen(command(kind, numbers), stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        reports: queue.Queue[dict[str, str | int] | None] = queue.Queue()
        threading.Thread(target=_forward, args=(process.stdout, reports), daemon=True).start()
        running: int | None = None
        begun: float | None = None
        following, patience = numbers.start, _START_SECONDS
        try:
            while begun is None or time.monotonic() < begun + seconds:
                report = reports.get(timeout=patience)
                if report is None:
                    code = process.wait()
                    if running is not None:
                        self._fail(kind, running, f"the process ended with {code}")
                    elif code or following < numbers.stop:
                        errors.seek(0)
                        said = errors.read()[-2000:]
                        self._fail(kind, following, f"the process ended with {code} between cases: {said}")
                        following += 1
                    break
                begun = begun or time.monotonic()
                if "begin" in report:
                    running = int(report["begin"])
                    following, patience = running + 1, SECONDS
                else:
                    self._count(kind, report)
                    running, patience = None, _START_SECONDS
        except queue.Empty:
            self._fail(kind, following - 1, f"it took more than {patience:g} s")
        finally:
            process.kill()
            process.wait()
            errors.close()
        return following, 0.0 if begun is None else time.monotonic() - begun

    def print_summary(self) -> None:
        """Print how many cases ended how."""
        for outcome, count in sorted(self.outcomes.items()):
            print(f"{count:8,}  {outcome}")
        print(f"{self.outcomes.total():8,}  cases, {len(self.failures)} failures")

    def _count(self, kind: str, report: dict[str, str | int]) -> None:
        if "wrong" in report:
            self._fail(kind, int(report["end"]), str(report["wrong"]))
        else:
            self.outcomes[f"{kind}, {report['outcome']}"] += 1

    def _fail(self, kind: str, number: int, what: str) -> None:
        self.outcomes[f"{kind}, FAILED"] += 1
        self.failures.append(what)
        print(f"FAILED: make fuzz CASE={kind}:{number}\n  {what}", flush=True)


def command(kind: str, numbers: range) -> list[str]:
    """The command that runs cases and reports them."""
    return [sys.executable, "-m", "fuzz", "--child", kind, str(numbers.start), str(numbers.stop)]


def _forward(lines: IO[str], reports: queue.Queue[dict[str, str | int] | None]) -> None:
    for line in lines:
        reports.put(json.loads(line))
    reports.put(None)


if __name__ == "__main__":
    sys.exit(main())
