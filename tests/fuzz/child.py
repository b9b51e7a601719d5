"""Runs cases one after another and reports each on a line of JSON; the campaign watches from another process."""

from __future__ import annotations

import importlib
import json
import random
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import IO

import torch

from fuzz.case import Case, Wrong

KINDS = {
    "ops": "fuzz.op_calls",
    "attacks": "fuzz.attack_calls",
    "patterns": "fuzz.patterns",
    "files": "fuzz.files",
}
"""Modules with a function `case`."""
MAX_BYTES = 1 << 30
"""Of memory that a case may use."""
_MAX_ADDRESSES = 4 << 30
"""Of addresses: what a case may ask for before the system refuses, so that a mistake does not stop the machine."""


def run(kind: str, numbers: range) -> None:
    """Run the cases of these numbers and report each when it begins and when it ends."""
    reports = _reports()
    case: Case = importlib.import_module(KINDS[kind]).case
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _limit_addresses()
    for number in numbers:
        _write(reports, {"begin": number})
        _write(reports, {"end": number, **_one(case, kind, number)})


def _one(case: Case, kind: str, number: int) -> dict[str, str]:
    rng = random.Random(f"{kind}:{number}")
    torch.manual_seed(rng.randrange(2**63))
    _reset_peak()
    before = _memory("VmRSS")
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
            outcome = case(rng, Path(folder))
    except Wrong as error:
        return {"wrong": str(error)}
    except BaseException:
        return {"wrong": f"the case itself failed: {traceback.format_exc(limit=-4)}"}
    used = _memory("VmHWM") - before
    return {"wrong": f"it used {used >> 20} MiB"} if used > MAX_BYTES else {"outcome": outcome}


def _reports() -> IO[str]:
    """Standard output, for reports only: what libraries print goes to standard error."""
    reports = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.stderr
    return reports


def _write(reports: IO[str], report: dict[str, object]) -> None:
    reports.write(json.dumps(report) + "\n")
    reports.flush()


def _limit_addresses() -> None:
    limit = _memory("VmSize") + _MAX_ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _reset_peak() -> None:
    """Let VmHWM begin again at VmRSS."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
