"""The contents of a run's files: its settings, an epoch, its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.config.checks import make_plain
from sparse_adv.facts import Machine, Software, machine, software


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
    """Fractions, in [0, 1], of weights and of their MACs that masks keep.

    The record of an epoch counts all convolutions and linear layers; `RunInfo` and `SearchResult` count those with
    masks.
    """

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
    """The user's own class that takes part in a run, and its settings."""

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
    """None if this library does not read the images; likewise `network`."""
    network: NetworkConfig | None = None
    ticket: TicketSource | None = None
    """None for a dense run."""
    method: MethodConfig | None = None
    """Configuration of a method that makes and changes the masks; None without one."""
    hook: UserCode | None = None
    """The user's update hook; None without one."""
    objective: UserCode | None = None
    """The user's training objective; None for the one that `train` names."""
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
    class_names: tuple[str, ...] | None = None
    """Names of the classes, in the order of their numbers; None if the images have none."""
    block: tuple[int, ...] | str | None = None
    """Block of the trained masks, from the method or the ticket; None without masks or if unknown."""
    extended: tuple[int, ...] = ()
    """The earlier numbers of epochs of an extended run, each with its own schedule."""
    software: Software = field(default_factory=software)
    machine: Machine = field(default_factory=machine)


DESCRIPTIVE = ("name", "density", "before", "input_shape", "class_names", "block", "extended", "software", "machine")


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
    """Cost of attacks and updates since the beginning of the run, including the search before it and undone epochs.

    Evaluations are not counted."""
    attack: Cost
    """Cost of the attacks of this epoch. MACs are the executed ones, with the kernels of the layers; likewise in
    `update` and `evaluation`."""
    update: Cost
    evaluation: Cost
    density: Density | None = None
    """None for a model without convolutions and linear layers."""
    may_be_result: bool = True
    """Whether these weights may be the best ones: False while a method has yet to prune them to its density."""
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
    """`monitor_accuracy` of the last undone attempt at this epoch; None if none was undone."""
    bytes_sent: int | None = None
    """Bytes of gradients that one process has sent since the run started or continued; None with one process."""
    bytes_dense: int | None = None
    """`bytes_sent` if the gradients of pruned weights were sent too."""
    round: int | None = None
    """Round of a search, counted from 1."""
    mask_distance: float | None = None
    """In a search with early stopping: fraction of positions in which the epoch's mask differs from earlier masks."""

    def __post_init__(self) -> None:
        if self.epoch < 1:
            raise ValueError(f"epoch must be at least 1, got {self.epoch}")
        for name, value in vars(self).items():
            if name.endswith("_accuracy") and value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True)
class TicketChecks:
    """Verified invariants of a ticket, see `tickets.checks`; None if one does not apply."""

    reset: bool | None = None
    """The weights to begin with equal those of the initial or rewound network, bit for bit."""
    pruned_weights_zero: bool | None = None
    nested: bool | None = None
    """No round kept a weight that an earlier round had pruned."""
    weights: int | None = None
    """Numbers of weights: under masks, kept, and requested by the configuration."""
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
    """Cost of the run, including the search that found the ticket."""
    checks: TicketChecks
    tested: Literal["best", "last"]
    """The tested weights: those of the epoch with the best validation accuracy, or the last ones."""
    tested_epoch: int
    validation_robust_accuracy: float | None
    """Robust validation accuracy of the tested weights; None without validation images."""
    test: dict[str, float]
    """Accuracy on the test images by attack: "clean", "fgsm", "pgd-20"."""
