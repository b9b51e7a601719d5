"""The folder of a run: what each file in it is called, how it is begun, continued and read.

run.json            the command's settings, seeds, versions, machine, git commit
epochs.jsonl        one record per epoch
result.json         there once the run is finished: totals, test accuracies, checks
last.safetensors    weights after the last epoch, as a state dict; best.safetensors: of the best validated epoch
state.pt            everything else that continuing needs, loadable with weights_only=True
ticket.safetensors  what a search found
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_adv.files import write_text
from sparse_adv.ops import build_facts

Record = dict[str, Any]
"""What is known after an epoch: plain numbers and names, ready for a line of JSON."""

FACTS = "run.json"
EPOCHS = "epochs.jsonl"
RESULT = "result.json"
LAST = "last.safetensors"
BEST = "best.safetensors"
STATE = "state.pt"
TICKET = "ticket.safetensors"


@dataclass(frozen=True)
class Run:
    """A run folder as it was read; `result` is None while the run is unfinished."""

    folder: Path
    facts: dict[str, Any]
    records: list[Record]
    result: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The folder's name, unless the run was given one."""
        return self.facts.get("name") or self.folder.resolve().name


def begin(folder: Path, settings: Mapping[str, Any], **facts: Any) -> None:
    """Write `run.json`, or make sure that the run begun here before had the same settings.

    Args:
        folder: the run's; it is made if missing.
        settings: JSON data that decide the run's result.
        facts: more JSON data that do not, such as densities that follow from the settings.

    Raises:
        ValueError: if the folder holds a run of other settings, naming the first that differ.
        NotADirectoryError: if `folder` is a file.
    """
    path = folder / FACTS
    wanted = json.loads(json.dumps(settings))
    if path.exists():
        known = read_json(path).get("settings", {})
        differing = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if differing:
            told = ", ".join(f"{key} {known.get(key)!r}, now {wanted.get(key)!r}" for key in differing[:3])
            raise ValueError(f"{folder} holds a run with other settings ({told}): take another --out, or delete it")
        return
    write_text(path, json.dumps({"settings": wanted, **facts, **environment()}, indent=2) + "\n")


def environment() -> dict[str, Any]:
    """Versions, machine and git commit, for whoever wants to repeat a run."""
    return {
        "versions": {
            "sparse_adv": build_facts()["version"],
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": _cpu(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": _commit(),
    }


def read(folder: Path) -> Run:
    """Read a run, finished or not.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: naming the file that is damaged.
    """
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no {FACTS}")
    epochs, result = folder / EPOCHS, folder / RESULT
    return Run(
        folder,
        read_json(folder / FACTS),
        read_records(epochs) if epochs.exists() else [],
        read_json(result) if result.exists() else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file; ValueError names the file if it is none."""
    (found,) = _objects(path, [(str(path), path.read_text(encoding="utf-8"))])
    return found


def read_records(path: Path) -> list[Record]:
    """The records of a file of JSON lines; ValueError names the file and the line that is not a JSON object."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return _objects(path, ((f"{path}, line {number}", line) for number, line in enumerate(lines, 1)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a file of JSON lines anew."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line of JSON, so that a run that dies keeps what it knew."""
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")


def _objects(path: Path, texts: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    found = []
    for place, text in texts:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON: {error.msg}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{place} is not a JSON object")
        found.append(value)
    return found


def _cpu() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this code runs from; None where it was installed without one."""
    here = Path(__file__).resolve().parent
    asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
