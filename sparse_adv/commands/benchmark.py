"""`benchmark`: a pruned network under the protocol of the Adversarial Pruning Benchmark, and its row."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_adv import attacks, data, experiment, facts, json_files
from sparse_adv.argument_types import check_count
from sparse_adv.attacks.autoattack_state import OtherRunError
from sparse_adv.commands import networks
from sparse_adv.commands.options import POSITIONAL
from sparse_adv.commands.out_folder import check_folder
from sparse_adv.commands.output import Output
from sparse_adv.config import DataConfig
from sparse_adv.config.checks import require_radius
from sparse_adv.files import check_writable, write_text
from sparse_adv.report.tables import table
from sparse_adv.training import distributed

SPARSITIES = {"weights": (90, 95, 99), "filters": (50, 75, 90)}
"""Percentages of weights, or of filters, that are pruned in the benchmark's networks."""
TOLERANCE = 0.5
"""The measured percentage may differ by this many points."""

FMN_FIRST, FMN_IMAGES, FMN_STEPS, FMN_EPS = 2048, 128, 200, 8 / 255
"""The benchmark attacks 128 images from number 2048 on, and tunes on those before. With fewer images, the last 128."""

ROW, MARKDOWN = "row.json", "row.md"


@dataclass(frozen=True)
class Options:
    """Score a pruned network as the Adversarial Pruning Benchmark does, write its row.

    Checks the sparsity, measures clean accuracy and AutoAttack (version standard, linf) at both radii, and the least
    distances of FMN on 128 images, whose share above 8/255 is the robust accuracy of its second column. The
    benchmark's HO-FMN tunes the optimiser of FMN for each network; here nothing is tuned, so that column is an upper
    bound of theirs. The same command goes on where it was stopped. Writes row.json and row.md to the folder --out.

    Args:
        what: checkpoint of this library or of other code, or run folder.
        out: folder of the row and of the states of AutoAttack.
        structure: what was pruned.
        sparsity: percent pruned: 90, 95 or 99 of the weights of convolutions and linear layers, 50, 75 or 90 of the
            filters of convolutions.
        data: CIFAR-10 as published, or another data set; the test images are attacked.
        arch: name of an architecture of `sparse_adv.models`; the default is the run's.
        width: channels of the first stage; the default is the run's.
        normalize: mean and standard deviation of a checkpoint that has none: of cifar10, cifar100, mnist,
            fashion_mnist or digits, or none for images in [0, 1] as they are.
        density: fraction of weights that each layer keeps, in a checkpoint that has scores and no masks.
        eps: radii of AutoAttack; the benchmark's is 0.031, most tables' 8/255.
        images: attack the first N images only; the row says so.
        batch: images per batch.
        seed: of the attacks.
        device: cpu, cuda, one GPU such as cuda:0, or auto, which is cuda where there is a GPU.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    what: Path = field(metadata=POSITIONAL)
    out: Path
    structure: Literal["weights", "filters"]
    sparsity: int
    data: str
    arch: str | None = None
    width: int | None = None
    normalize: str | None = None
    density: float | None = None
    eps: tuple[float, ...] = (0.031, 8 / 255)
    images: int | None = None
    batch: int = 500
    seed: int = 0
    device: str = "auto"
    json: bool | None = None

    after_a_stop = "start the same command again, it continues from its states in --out"

    def __post_init__(self) -> None:
        if self.sparsity not in SPARSITIES[self.structure]:
            allowed = ", ".join(map(str, SPARSITIES[self.structure]))
            raise ValueError(f"--sparsity must be one of {allowed} for {self.structure}, got {self.sparsity}")
        if not self.eps or not all(0 < eps < math.inf for eps in self.eps):
            raise ValueError(f"--eps must be positive numbers, got {list(self.eps)}")
        for eps in self.eps:
            require_radius(eps, "linf")
        for name in ("images", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        check_count("--seed", self.seed, least=0)


@dataclass(frozen=True)
class Sparsity:
    """Percentages of weights that are zero, and of the convolutions' filters whose weights are all zero."""

    weights: float
    filters: float


@dataclass(frozen=True)
class AutoAttackScore:
    """What AutoAttack found at one radius."""

    eps: float
    name: str
    budgets: str
    accuracy: dict[str, float]
    """Robust accuracy, "clean" and after each attack."""
    robust: float
    """The lowest of these."""
    unconfirmed: dict[str, int]
    """For each attack the number of unconfirmed examples."""
    seconds: float
    images_per_second: float
    warnings: list[str]


@dataclass(frozen=True)
class FMNScore:
    """The least distances that FMN found."""

    eps: float
    robust: float
    """Fraction of the images whose distance is greater than eps."""
    distances: list[float | None]
    """For each image; None if no adversarial example was found, 0 if the clean image is misclassified."""
    first: int
    """Number of the first image that was attacked, counted from 0."""
    images: int
    steps: int
    loss: str
    tuned: bool
    """Whether the optimiser's settings were searched for this network."""
    seconds: float


@dataclass(frozen=True)
class BenchmarkRow:
    """The content of row.json."""

    what: str
    protocol: str
    data: str
    images: int
    structure: str
    sparsity: int
    """Percentage pruned, as given by --sparsity."""
    measured_sparsity: Sparsity
    clean: float
    autoattack: list[AutoAttackScore]
    fmn: FMNScore
    peak_memory_bytes: int
    seed: int
    software: facts.Software
    machine: facts.Machine


def run(options: Options) -> int:
    check_folder(options.out)
    with distributed.group(options.device) as device:
        if distributed.world_size() > 1:
            raise ValueError(f"benchmark runs in one process, got {distributed.world_size()}")
        path = networks.weights_of(options.what)
        dataset = experiment.load_data(DataConfig(options.data), options.seed, device)
        model = networks.trained(
            experiment.read_pruned(path, dense=True, density=options.density),
            dataset,
            str(options.what),
            arch=options.arch,
            width=options.width,
            normalize=options.normalize,
        ).to(device)
        sparsity = measured_sparsity(model)
        _check_sparsity(options, sparsity)
        for name in (ROW, MARKDOWN):
            check_writable(options.out / name)
        x, y = data.to_unit(dataset.test.images[: options.images]), dataset.test.labels[: options.images]
        output = Output(options.json)
        scores = [_autoattack(options, eps, model, x, y, verbose=not output.as_json) for eps in options.eps]
        row = BenchmarkRow(
            what=str(options.what),
            protocol="Adversarial Pruning Benchmark (Piras et al. 2024)",
            data=options.data,
            images=len(y),
            structure=options.structure,
            sparsity=options.sparsity,
            measured_sparsity=sparsity,
            clean=scores[0].accuracy["clean"],
            autoattack=scores,
            fmn=_fmn(model, x, y, options.batch),
            peak_memory_bytes=_peak_memory(device),
            seed=options.seed,
            software=facts.software(),
            machine=facts.machine(),
        )
        text = markdown(row)
        try:
            json_files.write(options.out / ROW, row)
            write_text(options.out / MARKDOWN, text)
        finally:  # if one of the two cannot be written, the other has the result
            output.print(text, json_files.to_json(row))
    return 0


def measured_sparsity(model: nn.Module) -> Sparsity:
    """The sparsity of all convolutions and linear layers, masked or not, in percent.

    Examples:
        >>> conv = nn.Conv2d(1, 2, 1)
        >>> conv.weight.data[0] = 0
        >>> measured_sparsity(conv)
        Sparsity(weights=50.0, filters=50.0)
    """
    weights = pruned = filters = empty = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() not in (2, 4):
            continue
        mask = getattr(module, "weight_mask", None)
        kept = weight != 0 if mask is None else (weight != 0) & (mask != 0)
        weights, pruned = weights + kept.numel(), pruned + int((~kept).sum())
        if weight.dim() == 4:
            filters, empty = filters + len(kept), empty + int((~kept.flatten(1).any(1)).sum())
    return Sparsity(100 * pruned / max(1, weights), 100 * empty / max(1, filters))


def markdown(row: BenchmarkRow) -> str:
    """The row as a Markdown table, and the attacks that ran with their budgets."""
    fmn, scores = row.fmn, row.autoattack
    measured = getattr(row.measured_sparsity, row.structure)
    cells = {
        "network": row.what,
        "pruned": f"{row.sparsity} % {row.structure} ({measured:.2f} measured)",
        "clean": f"{row.clean:.2%}",
    }
    for score in scores:
        cells[f"AA {score.eps:.5g}"] = f"{score.robust:.2%}"
    cells |= {
        f"FMN {fmn.eps:.5g}": f"{fmn.robust:.2%}",
        "seconds": f"{sum(score.seconds for score in scores) + fmn.seconds:.0f}",
        "images/s": " / ".join(f"{score.images_per_second:.3g}" for score in scores),
        "peak memory": f"{row.peak_memory_bytes / 2**30:.2f} GiB",
        "evaluator": f"sparse_adv {row.software.sparse_adv}",
    }
    ran = [f"{score.name} at eps {score.eps:g}: {score.budgets}." for score in scores]
    ran += [f"Warning at eps {score.eps:g}: {sign}." for score in scores for sign in score.warnings]
    ran.append(
        f"FMN: {fmn.steps} steps, loss {fmn.loss}, images {fmn.first} to {fmn.first + fmn.images - 1}, "
        "not tuned (the benchmark's HO-FMN is)."
    )
    text = table(list(cells), [list(cells.values())])
    return f"{text}\n{row.images} test images of {row.data}. " + " ".join(ran) + "\n"


def _check_sparsity(options: Options, measured: Sparsity) -> None:
    percent = getattr(measured, options.structure)
    if abs(percent - options.sparsity) > TOLERANCE:
        raise ValueError(
            f"--sparsity {options.sparsity} does not fit {options.what}: {percent:.2f} % of its {options.structure} "
            "are zero"
        )


def _autoattack(options: Options, eps: float, model: nn.Module, x: Tensor, y: Tensor, verbose: bool) -> AutoAttackScore:
    evaluator = attacks.AutoAttack(model, "linf", eps, seed=options.seed, verbose=verbose)
    state = options.out / f"autoattack_{eps:.8g}.safetensors"
    try:
        evaluator.run_standard_evaluation(x, y, bs=options.batch, state_path=state)
    except OtherRunError as error:
        others = "another model, other images or other options"
        raise ValueError(f"--out {options.out} has the state of {others}: name another folder") from error
    result = evaluator.result
    assert result is not None
    return AutoAttackScore(
        eps=eps,
        name=result.name,
        budgets=result.budgets,
        accuracy=result.accuracy,
        robust=min(result.accuracy.values()),
        unconfirmed=result.unconfirmed,
        seconds=result.seconds,
        images_per_second=len(y) / max(result.seconds, 1e-9),
        warnings=result.signs,
    )


def _fmn(model: nn.Module, x: Tensor, y: Tensor, batch: int) -> FMNScore:
    first = min(FMN_FIRST, max(0, len(y) - FMN_IMAGES))
    x, y = x[first : first + FMN_IMAGES], y[first : first + FMN_IMAGES]
    start = time.perf_counter()
    distances: list[float] = []
    for images, labels in zip(x.split(batch), y.split(batch), strict=True):
        adv = attacks.fmn(model, images, labels, steps=FMN_STEPS, loss="dlr")
        distances += attacks.distances(model, adv, images, labels).tolist()
    return FMNScore(
        eps=FMN_EPS,
        robust=sum(distance > FMN_EPS for distance in distances) / len(distances),
        distances=[distance if math.isfinite(distance) else None for distance in distances],
        first=first,
        images=len(distances),
        steps=FMN_STEPS,
        loss="dlr",
        tuned=False,
        seconds=time.perf_counter() - start,
    )


def _peak_memory(device: torch.device) -> int:
    """The peak memory in bytes: of the GPU if one is used, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
