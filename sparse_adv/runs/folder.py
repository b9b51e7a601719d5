"""The folder of a run and the schema of its files. Searches, training and the demo write it, reports read it.

run.json             a RunInfo
epochs.jsonl         an EpochRecord in each line
result.json          a SearchResult or TrainResult, once the run is finished and tested, which `training.train` leaves
                     to `final_test`; result_N.json: that of a training run of N epochs that was extended to more
last.safetensors     state dict after the last epoch; best.safetensors: after the epoch of the best validation accuracy
                     among those whose record says `may_be_result`
state.pt             what a stopped run continues from, readable with torch.load(..., weights_only=True)
identity.pt          digests of the network, the weights and the images that a search was begun with
initial.safetensors  the initial weights of a search; rewind.safetensors: those that it rewinds to
ticket.safetensors   the ticket that a search found
round_N/             a training of a search, a run folder with a ticket of its own; early_stopping.pt: its last masks
config.yaml          the options of the command that made the run
run.lock             locked by the process that writes to the folder, whose number it holds
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from sparse_adv import json_files
from sparse_adv.argument_types import checks_types
from sparse_adv.config import TrainConfig
from sparse_adv.runs.records import DESCRIPTIVE, EpochRecord, RunInfo, SearchResult, TrainResult

log = logging.getLogger(__name__)

INFO = "run.json"
EPOCHS = "epochs.jsonl"
RESULT = "result.json"
LAST = "last.safetensors"
BEST = "best.safetensors"
STATE = "state.pt"
IDENTITY = "identity.pt"
INITIAL = "initial.safetensors"
REWIND = "rewind.safetensors"
TICKET = "ticket.safetensors"
CONFIG = "config.yaml"
LOCK = "run.lock"
_PROGRESS = frozenset([EPOCHS, RESULT, LAST, BEST, STATE, IDENTITY, INITIAL, REWIND, TICKET])
"""Files that a run writes after its network, images and settings were accepted."""
FILES = _PROGRESS | {INFO, CONFIG, LOCK}
"""All files that a run writes to its folder."""


@dataclass(frozen=True)
class Run:
    """A run folder as it was read; `result` is None while the run is unfinished or not tested."""

    folder: Path
    info: RunInfo
    records: list[EpochRecord]
    result: SearchResult | TrainResult | None

    @property
    def name(self) -> str:
        """The name given to the run, else the folder's."""
        return self.info.name or self.folder.resolve().name


@checks_types
def begin(folder: Path | str, info: RunInfo) -> None:
    """Write `run.json`, or check that the run in the folder has the same settings; then the file is not changed.

    If `run.json` is the only file that a run has written, it is replaced: a refused call does not bind the next one. A
    training run may get more epochs than before, and the images may lie elsewhere; `resume` records that, once digests
    have shown that it is the same run.

    Args:
        folder: of the run; it is created if it does not exist.
        info: of the run. A caller that has only a model and batches names no network; then network, images, ticket and
            earlier cost are taken from the folder.

    Raises:
        ValueError: if the folder holds a run with other settings, naming the first three that differ, or a run of
            another version of this library.
        NotADirectoryError: if `folder` is a file.
        FileNotFoundError: if the run has lost its settings, see `check_info`, or is to be extended and has lost its
            state, see `check_state`.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=5)))  # more epochs are allowed
    """
    folder = Path(folder)
    path = folder / INFO
    if not path.exists():
        check_info(folder)
        json_files.write(path, info)
        return
    begun = json_files.read(RunInfo, path)
    if info.network is None:
        same = replace(info, data=begun.data, network=begun.network, ticket=begun.ticket, before=begun.before)
        if _has_progress(folder) or settings(same) == settings(begun):
            info = same
    known, wanted = settings(begun), settings(info)
    differing = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
    if "data.data" in differing and any((folder / name).exists() for name in (STATE, IDENTITY)):
        differing.remove("data.data")  # the digests there show whether the images are the same, wherever they are
    epochs = begun.train.epochs
    if differing == ["train.epochs"] and info.kind == "train" and info.train.epochs > epochs:
        check_state(folder)
    elif differing:
        changes = ", ".join(f"{key} {known.get(key)!r}, now {wanted.get(key)!r}" for key in differing[:3])
        if not _has_progress(folder):
            log.info("%s: a run of other settings (%s) wrote nothing but its %s: replaced", folder, changes, INFO)
            json_files.write(path, info)
            return
        raise ValueError(f"{folder} holds a run with other settings ({changes}): take another folder, or delete it")


@checks_types
def resume(folder: Path | str, info: RunInfo) -> None:
    """Update `run.json` for the call that continues its run, after `begin` and digests have accepted the call.

    Name, place of the images, block and number of epochs become those of the call. The result of fewer epochs is kept
    under another name.

    Args:
        folder: of the run.
        info: as given to `begin`; without a name, images or a block, the run keeps its own.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> resume(folder, RunInfo("train", TrainConfig(epochs=5), name="longer"))
        >>> run = read(folder)
        >>> run.name, run.info.train.epochs, run.info.extended
        ('longer', 5, (3,))
    """
    folder = Path(folder)
    begun = json_files.read(RunInfo, folder / INFO)
    now = replace(begun, data=info.data or begun.data, name=info.name or begun.name, block=info.block or begun.block)
    epochs = begun.train.epochs
    if info.train.epochs != epochs:
        now = replace(now, train=info.train, extended=(*begun.extended, epochs))
        if (folder / RESULT).exists():
            (folder / RESULT).rename(folder / _earlier_result(epochs))
    if now != begun:
        json_files.write(folder / INFO, now)


@checks_types
def check_info(folder: Path | str) -> None:
    """Check that a folder with files of a run also has `run.json`.

    Raises:
        FileNotFoundError: if it has not: new settings would be taken for those of the files.

    Examples:
        >>> import tempfile
        >>> check_info(Path(tempfile.mkdtemp()))  # no files
    """
    folder = Path(folder)
    written = next((name for name in sorted(_PROGRESS) if (folder / name).exists()), None)
    if written is not None and not (folder / INFO).exists():
        raise FileNotFoundError(
            f"{folder} has {written}, but not the {INFO} of its run: put that file back, or take another folder"
        )


@checks_types
def check_state(folder: Path | str) -> None:
    """Check that a folder with epochs of a training run also has the state from which the run continues.

    Raises:
        FileNotFoundError: if it has not. A new beginning would mix its files with those of the earlier epochs.

    Examples:
        >>> import tempfile
        >>> check_state(Path(tempfile.mkdtemp()))  # no epochs
    """
    folder = Path(folder)
    written = [name for name in (EPOCHS, RESULT, LAST, BEST) if (folder / name).exists()]
    if written and not (folder / STATE).exists():
        raise FileNotFoundError(
            f"{folder} has {written[0]}, but not the {STATE} that its run continues from: put that file back, or take "
            "another folder"
        )


@checks_types
def read(folder: Path | str) -> Run:
    """Read a run, finished or not.

    Raises:
        FileNotFoundError: if there is no run in the folder.
        ValueError: naming the file that is damaged or was written by another version of this library.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "dense"
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> run = read(folder)
        >>> run.name, run.info.train.epochs, run.records, run.result
        ('dense', 3, [], None)
    """
    folder = Path(folder)
    if not (folder / INFO).is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no {INFO}")
    info = json_files.read(RunInfo, folder / INFO)
    records = json_files.read_lines(EpochRecord, folder / EPOCHS) if (folder / EPOCHS).exists() else []
    kind: type[SearchResult | TrainResult] = SearchResult if info.kind == "search" else TrainResult
    return Run(folder, info, records, json_files.read(kind, folder / RESULT) if (folder / RESULT).exists() else None)


@checks_types
def of_weights(path: Path | str) -> Run | None:
    """Return the run that wrote a file of weights, `best.safetensors` or `last.safetensors`; None for other files.

    A round of a search has the network and the images of the search.

    Examples:
        >>> of_weights(Path("nowhere") / BEST) is None
        True
    """
    path = Path(path)
    folder, above = path.parent, path.parent.parent
    if path.name not in (BEST, LAST) or not (folder / INFO).is_file():
        return None
    run = read(folder)
    if run.info.network is None and folder.name.startswith("round_") and (above / INFO).is_file():
        search = read(above).info
        about = {name: getattr(search, name) for name in ("data", "network", "input_shape", "class_names")}
        run = replace(run, info=replace(run.info, **about))
    return run


@checks_types
def is_file_of_run(path: Path | str) -> bool:
    """Return whether a path is a file that a run writes to its folder.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> is_file_of_run(folder / "best.safetensors"), is_file_of_run(folder / "mine.json")
        (True, False)
    """
    path = Path(path)
    is_run = (path.parent / INFO).is_file()
    return is_run and (path.name in FILES or fnmatchcase(path.name, _earlier_result("*")))


def _has_progress(folder: Path) -> bool:
    return any((folder / name).exists() for name in _PROGRESS)


def _earlier_result(epochs: int | str) -> str:
    """Name for the earlier result of an extended run, from its number of epochs at that time."""
    return f"result_{epochs}.json"


def best(records: Sequence[EpochRecord], config: TrainConfig) -> EpochRecord | None:
    """Return the first epoch with the highest validation accuracy (robust, unless training is natural), or None.

    Epochs after which a method has yet to prune the network do not count: their `may_be_result` is False.

    Examples:
        >>> best([], TrainConfig()) is None
        True
    """

    def accuracy(record: EpochRecord) -> float:
        value = record.clean_accuracy if config.objective == "natural" else record.robust_accuracy
        return -1.0 if value is None else value

    first = max((record for record in records if record.may_be_result), key=accuracy, default=None)
    return None if first is None or accuracy(first) < 0 else first


def settings(info: RunInfo) -> dict[str, json_files.JSON]:
    """Return the fields that decide the result, by their path: "train.lr".

    Examples:
        >>> settings(RunInfo("train", TrainConfig(epochs=3)))["train.epochs"]
        3
    """
    fields = {key: value for key, value in json_files.to_json(info).items() if key not in DESCRIPTIVE}
    flat = dict(json_files.flatten(fields))
    flat.pop("train.graphs", None)  # graphs change no bit of a result
    return flat
