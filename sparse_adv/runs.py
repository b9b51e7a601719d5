"""The folder of a run and the schema of its files. Searches, training and the demo write it, reports read it.

run.json             a RunInfo
epochs.jsonl         an EpochRecord in each line
result.json          a SearchResult or TrainResult, once the run is finished; result_N.json: the one of a training run
                     of N epochs that was extended to more
last.safetensors     state dict after the last epoch; best.safetensors: after the epoch of the best validation accuracy
state.pt             what a stopped run continues from, readable with torch.load(..., weights_only=True)
identity.pt          digests of the network, the weights and the images that a search was begun with
initial.safetensors  the initial weights of a search; rewind.safetensors: those that it rewinds to
ticket.safetensors   the ticket that a search found
config.yaml          the options of the command that made the run
run.lock             locked by the process that writes to the folder, whose number it holds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch

from sparse_adv import json_files
from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig, make_plain
from sparse_adv.facts import Machine, Software, machine, software

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
_FILES = frozenset([INFO, EPOCHS, RESULT, LAST, BEST, STATE, IDENTITY, INITIAL, REWIND, TICKET, CONFIG, LOCK])


@dataclass(frozen=True)
class Cost:
    """Seconds of wall clock, or of the GPU, and multiply-adds (MACs)."""

    seconds: float = 0.0
    macs: int = 0

    def __post_init__(self) -> None:
        make_plain(self)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.macs + other.macs)


NO_COST = Cost()


@dataclass(frozen=True)
class Density:
    """Fractions, in [0, 1], of the weights of convolutions and linear layers, and of their MACs, that masks keep."""

    weights: float
    macs: float


DENSE = Density(1.0, 1.0)


@dataclass(frozen=True)
class TicketSource:
    """The ticket that a run trains, and what was changed in it as a control."""

    sha256: str
    """Digest of the ticket's file."""
    reinit: bool = False
    """Whether the masks are trained with freshly initialised weights."""
    shuffle: bool = False
    """Whether the masks of each layer are permuted at random."""


@dataclass(frozen=True)
class UserCode:
    """A class of the user's that takes part in a run, and its settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """Settings and environment of a run; all fields except `DESCRIPTIVE` decide its result."""

    kind: Literal["search", "train"]
    train: TrainConfig
    prune: PruneConfig | None = None
    """Configuration of the pruning; None unless the run is a search."""
    data: DataConfig | None = None
    """None if the images are not read by this library; likewise `network`."""
    network: NetworkConfig | None = None
    ticket: TicketSource | None = None
    """None for a dense run."""
    method: MethodConfig | None = None
    """Configuration of a method that makes and changes the masks; None without one."""
    hook: UserCode | None = None
    """An update hook of the user's; None without one."""
    objective: UserCode | None = None
    """A training objective of the user's; None for the one that `train` names."""
    world_size: int = 1
    """Number of processes that share each batch."""
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)
    """Whether PyTorch is limited to deterministic algorithms."""
    name: str | None = None
    """Name of the run in reports; None for the folder's name."""
    density: Density = DENSE
    before: Cost = NO_COST
    """Cost of the search that found the ticket."""
    input_shape: tuple[int, ...] | None = None
    """[C, H, W] of the images; None if it was not recorded."""
    extended: tuple[int, ...] = ()
    """Numbers of epochs that the run was to have before it was extended to more, each with its own schedule."""
    software: Software = field(default_factory=software)
    machine: Machine = field(default_factory=machine)


DESCRIPTIVE = ("name", "density", "before", "input_shape", "extended", "software", "machine")


@dataclass(frozen=True)
class EpochRecord:
    """Updates and costs of an epoch, and the accuracies after it (fractions in [0, 1])."""

    epoch: int
    """Counted from 1, in a search through all rounds."""
    step: int
    """Updates until the end of the epoch."""
    learning_rate: float
    """Learning rate of the last update."""
    loss: float
    """Mean loss over the adversarial images of the epoch."""
    images: int
    """Images in the updates of the epoch, over all processes."""
    device: str
    """Device on which this process ran the epoch."""
    total: Cost
    """Cost of attacks and updates since the beginning of the run, with the search before it and undone epochs.

    Evaluations are not counted."""
    attack: Cost
    """Cost of the attacks of this epoch. MACs are those executed, with the kernels that the layers take; `update` and
    `evaluation` likewise."""
    update: Cost
    evaluation: Cost
    density: Density | None = None
    """None for a model without convolutions and linear layers."""
    clean_accuracy: float | None = None
    """Accuracy on the validation images; None in an epoch without evaluation."""
    robust_accuracy: float | None = None
    """Accuracy on the validation images under PGD; None in an epoch without evaluation."""
    robust_loss: float | None = None
    """Mean cross-entropy on the validation images under PGD; None unless a method of the run needs it."""
    train_accuracy: float | None = None
    """Accuracy on the adversarial images of the epoch's updates, each before its update and in training mode."""
    monitor_accuracy: float | None = None
    """Accuracy of the weights in training, not of their average, under the attack of the overfitting monitor; None
    without monitor."""
    undone_accuracy: float | None = None
    """`monitor_accuracy` of the last attempt at this epoch that was undone; None if none was."""
    bytes_sent: int | None = None
    """Bytes of gradients that one process has sent since the run was started or continued; None with one process."""
    bytes_dense: int | None = None
    """`bytes_sent` if the gradients of pruned weights were sent too."""
    round: int | None = None
    """Round of a search, counted from 1."""
    mask_distance: float | None = None
    """In a search with early stopping: fraction of positions in which the epoch's mask differs from earlier ones."""

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise ValueError(f"epoch must be at least 1, got {self.epoch}")
        for name, value in vars(self).items():
            if name.endswith("_accuracy") and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True)
class TicketChecks:
    """Invariants of a ticket that were verified, see `tickets.checks`; None where one does not apply."""

    reset: bool | None = None
    """The weights to begin with are bit for bit those of the initial or rewound network."""
    pruned_weights_zero: bool | None = None
    nested: bool | None = None
    """No round kept a weight that an earlier round had pruned."""
    weights: int | None = None
    """Number of weights under masks, of those kept, and of those that the configuration asks for."""
    weights_kept: int | None = None
    weights_requested: int | None = None
    retained: tuple[float, float] | None = None
    """Fraction of the squared scores in kept blocks, before and after channels were permuted."""


@dataclass(frozen=True)
class SearchResult:
    """The end of a search."""

    total: Cost
    checks: TicketChecks
    density: Density
    """Densities of the ticket."""


@dataclass(frozen=True)
class TrainResult:
    """The end of a training run."""

    total: Cost
    """Cost of the run, with that of the search that found the ticket."""
    checks: TicketChecks
    tested: Literal["best", "last"]
    """The weights that were tested: those of the epoch with the best validation accuracy, or the last ones."""
    tested_epoch: int
    validation_robust_accuracy: float | None
    """Robust validation accuracy of the tested weights; None without validation images."""
    test: dict[str, float]
    """Accuracy on the test images by attack: "clean", "fgsm", "pgd-20"."""


@dataclass(frozen=True)
class Run:
    """A run folder as it was read; `result` is None while the run is unfinished."""

    folder: Path
    info: RunInfo
    records: list[EpochRecord]
    result: SearchResult | TrainResult | None

    @property
    def name(self) -> str:
        """The name that the run was given, else the folder's."""
        return self.info.name or self.folder.resolve().name


def begin(folder: Path, info: RunInfo) -> None:
    """Write `run.json`, or check that the run in the folder has the same settings, which then stays as it is.

    A training run may be given more epochs than before, and the images may lie elsewhere; `resume` writes that down,
    once digests have shown that it is the same run.

    Args:
        folder: of the run; it is created if it does not exist.
        info: of the run.

    Raises:
        ValueError: if the folder holds a run of other settings, naming the first three that differ, or of another
            version of this library.
        NotADirectoryError: if `folder` is a file.
        FileNotFoundError: if the run is to be extended and has lost its state, see `check_state`.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=5)))  # more epochs are allowed
    """
    path = folder / INFO
    if not path.exists():
        json_files.write(path, info)
        return
    begun = json_files.read(RunInfo, path)
    known, wanted = settings(begun), settings(info)
    differing = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
    if "data.data" in differing and any((folder / name).exists() for name in (STATE, IDENTITY)):
        differing.remove("data.data")  # the digests there say whether these are the same images, wherever they are
    epochs = begun.train.epochs
    if differing == ["train.epochs"] and info.kind == "train" and info.train.epochs > epochs:
        check_state(folder)
    elif differing:
        changes = ", ".join(f"{key} {known.get(key)!r}, now {wanted.get(key)!r}" for key in differing[:3])
        raise ValueError(f"{folder} holds a run with other settings ({changes}): take another folder, or delete it")


def resume(folder: Path, info: RunInfo) -> None:
    """Bring `run.json` up to date with the call that goes on with its run, which `begin` and digests have accepted.

    Name, place of the images and number of epochs become those of the call. The result of fewer epochs is kept under
    another name.

    Args:
        folder: of the run.
        info: what `begin` was given; without a name the run keeps its own.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> resume(folder, RunInfo("train", TrainConfig(epochs=5), name="longer"))
        >>> run = read(folder)
        >>> run.name, run.info.train.epochs, run.info.extended
        ('longer', 5, (3,))
    """
    begun = json_files.read(RunInfo, folder / INFO)
    now = replace(begun, data=info.data, name=info.name or begun.name)
    epochs = begun.train.epochs
    if info.train.epochs != epochs:
        now = replace(now, train=info.train, extended=(*begun.extended, epochs))
        if (folder / RESULT).exists():
            (folder / RESULT).rename(folder / _earlier_result(epochs))
    if now != begun:
        json_files.write(folder / INFO, now)


def check_state(folder: Path) -> None:
    """Check that a training run whose epochs are in a folder has the state there that it continues from.

    Raises:
        FileNotFoundError: if it has not. Begun anew it would mix its files with those of the earlier epochs.

    Examples:
        >>> import tempfile
        >>> check_state(Path(tempfile.mkdtemp()))  # no epochs
    """
    written = [name for name in (EPOCHS, RESULT, LAST, BEST) if (folder / name).exists()]
    if written and not (folder / STATE).exists():
        raise FileNotFoundError(
            f"{folder} has {written[0]}, but not the {STATE} that its run continues from: put that file back, or take "
            "another folder"
        )


def begin_without_data(folder: Path, info: RunInfo) -> RunInfo:
    """Do what `begin` does, for a caller that knows neither images nor network; return `info` with the folder's."""
    path = folder / INFO
    if path.exists():
        known = json_files.read(RunInfo, path)
        info = replace(info, data=known.data, network=known.network, ticket=known.ticket, before=known.before)
    begin(folder, info)
    return info


def read(folder: Path | str) -> Run:
    """Read a run, finished or not.

    Raises:
        FileNotFoundError: if the folder holds no run.
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


def is_file_of_run(path: Path) -> bool:
    """Return whether a path is that of a file which a run writes to its folder.

    Examples:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> begin(folder, RunInfo("train", TrainConfig(epochs=3)))
        >>> is_file_of_run(folder / "best.safetensors"), is_file_of_run(folder / "mine.json")
        (True, False)
    """
    is_run = (path.parent / INFO).is_file()
    return is_run and (path.name in _FILES or fnmatchcase(path.name, _earlier_result("*")))


def _earlier_result(epochs: int | str) -> str:
    """Name of the result of a run that was extended, from its number of epochs at that time."""
    return f"result_{epochs}.json"


def best(records: Sequence[EpochRecord], config: TrainConfig) -> EpochRecord | None:
    """Return the first epoch of the highest validation accuracy, robust unless training is natural; None if none is.

    Examples:
        >>> best([], TrainConfig()) is None
        True
    """

    def accuracy(record: EpochRecord) -> float:
        value = record.clean_accuracy if config.objective == "natural" else record.robust_accuracy
        return -1.0 if value is None else value

    first = max(records, key=accuracy, default=None)
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
    source = flat.get("data.data")
    if isinstance(source, str) and source != DataConfig().data:
        flat["data.data"] = str(Path(source).resolve())
    return flat
