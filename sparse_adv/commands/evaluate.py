"""`evaluate`: clean accuracy, and an upper bound of robust accuracy by PGD, or AutoAttack."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import nn

from sparse_adv import attacks, data, experiment, runs, tickets
from sparse_adv.argument_types import check_count
from sparse_adv.commands import networks
from sparse_adv.commands.options import POSITIONAL
from sparse_adv.commands.output import Output, check_new
from sparse_adv.config import DataConfig, Norm, TrainConfig
from sparse_adv.config.checks import require_radius
from sparse_adv.files import check_writable, write_text
from sparse_adv.masks.layers import device_of
from sparse_adv.training import clean_accuracy, deterministic, distributed, fgsm_accuracy, robust_accuracy

log = logging.getLogger(__name__)

CONFIGURABLE = True

STEPS, RESTARTS = 20, 1
"""Defaults of PGD on the cross-entropy."""
BOUND_STEPS, BOUND_RESTARTS = 50, 5
CHECKED_IMAGES = 64
"""Number of images at which to look for signs of gradient masking."""


@dataclass(frozen=True)
class Options:
    """Measure accuracy, clean and under attack: a run's best weights, a ticket or any pruned checkpoint.

    By default the attacks are FGSM and PGD-20 on the cross-entropy, each on all images, and PGD-50 on the margin from 5
    random starts on those that withstood both. The share that withstands all is an upper bound of robust accuracy, good
    for comparing runs. Published numbers need --attack autoattack: APGD-CE, targeted APGD, targeted FAB and Square,
    each on images still robust. Under torchrun the processes share the images; AutoAttack runs in one process.

    Args:
        what: run folder, ticket, or a file of weights. A file of other code needs --arch and --data.
        weights: weights of a run, of its best validated or its last epoch; the default is best, or last where no epoch
            counts.
        split: images to measure on.
        images: measure on the first N images only, at least 1.
        attack: bound, which is quick, or autoattack.
        state: file of AutoAttack's progress; if it exists, the attack continues from there.
        out: also write the result to this JSON file.
        eps: radius of the perturbation ball; the default is that of the run or the ticket, or 8/255.
        alpha: step size of PGD; the default is eps / 4.
        steps: steps of PGD on the cross-entropy, at least 1; the default is 20.
        restarts: random starts of PGD on the cross-entropy, at least 1; the default is 1.
        norm: linf or l2, which needs --eps; the default is that of the run or the ticket, or linf.
        data: "digits", or a folder or archive of images; the default is that of the run or the ticket.
        limit: number of training images that were used; the default is that of the run or the ticket.
        validation: fraction or number of training images held out; the default is that of the run or the ticket.
        seed: seed of the attacks, and of the split of images that neither a run nor a ticket has divided; the default
            is that of the run or the ticket.
        arch: name of an architecture of `sparse_adv.models`; the default is that of the run or the ticket.
        width: channels of the first stage; the default is that of the run or the ticket.
        normalize: mean and standard deviation of a checkpoint that has none: of cifar10, cifar100, mnist,
            fashion_mnist or digits, or none for images in [0, 1] as they are.
        density: fraction of weights that each layer keeps, in a checkpoint that has scores and no masks.
        device: cpu, cuda, one GPU such as cuda:0, or auto, which is cuda where there is a GPU.
        deterministic: deterministic algorithms only: a GPU gives the same bits again, more slowly.
        json: print JSON lines instead of text; the default is text on a terminal and JSON in a pipe.
    """

    what: Path = field(metadata=POSITIONAL)
    weights: Literal["best", "last"] | None = None
    split: Literal["test", "validation", "train"] = "test"
    images: int | None = None
    attack: Literal["bound", "autoattack"] = "bound"
    state: Path | None = None
    out: Path | None = None
    eps: float | None = None
    alpha: float | None = None
    steps: int | None = None
    restarts: int | None = None
    norm: Norm | None = None
    data: str | None = None
    limit: int | None = None
    validation: float | None = None
    seed: int | None = None
    arch: str | None = None
    width: int | None = None
    normalize: str | None = None
    density: float | None = None
    device: str = "auto"
    deterministic: bool = False
    json: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"--alpha must be positive, got {self.alpha}")
        if self.seed is not None:
            check_count("--seed", self.seed, least=0)
        for attack, names in (("autoattack", ("state",)), ("bound", ("alpha", "steps", "restarts"))):
            for name in names:
                if getattr(self, name) is not None and self.attack != attack:
                    raise ValueError(f"--{name} is for --attack {attack}, got --attack {self.attack}")
        for name in ("limit", "validation"):
            if getattr(self, name) is not None and self.split == "test":
                raise ValueError(f"--{name} applies to --split train or validation, got --split test")
        if self.out is not None:
            check_new("--out", self.out, self.what, self.state)

    @property
    def after_a_stop(self) -> str | None:
        """What to do after an interruption."""
        if self.attack == "autoattack" and self.state is None:
            return "give --state, from which the same command could continue"
        return None if self.state is None else f"start the same command again, it continues from {self.state}"


def run(options: Options) -> int:
    for path in (options.out, options.state):
        if path is not None:
            check_writable(path)
    with deterministic(options.deterministic), distributed.group(options.device) as device:
        subject = _subject(options, device)
        output = Output(options.json)
        measure = partial(_autoattack, verbose=not output.as_json) if options.attack == "autoattack" else _bound
        measured = measure(options, subject.model, subject.images, subject.seed, subject.ball)
        result = _result(options, subject, measured)
        try:
            if options.out and distributed.rank() == 0:
                write_text(options.out, json.dumps(result, indent=2) + "\n")
        finally:  # if one of the two cannot be written, the other has the result
            output.print(_text(options, subject, measured), result)
    return 0


class BallArgs(TypedDict):
    """Keyword arguments of attacks: radius and norm of the ball around each image."""

    eps: float
    norm: Norm


class Subject(NamedTuple):
    """What is evaluated, and on what."""

    model: nn.Module
    images: data.Split
    source: DataConfig
    """Where the images are from."""
    ball: BallArgs
    seed: int
    weights: str | None
    """"best" or "last" for the weights of a run; None for other files."""
    epoch: object
    """Of these weights."""


def _subject(options: Options, device: torch.device) -> Subject:
    """The model and the images that the options name, or else the run or the ticket."""
    if options.weights is not None and not options.what.is_dir():
        raise ValueError(f"--weights is for the folder of a run, got {options.what}")
    path = networks.weights_of(options.what, options.weights)
    pruned, run = experiment.read_pruned(path, dense=True, density=options.density), runs.of_weights(path)
    if run and run.info.network is None and options.arch is None:
        raise ValueError(
            f"{options.what} is the run of a model of your own: evaluate it in Python (guide, Sparsify your own "
            "training loop), or name the same network of the library with --arch"
        )
    train = tickets.training_of(pruned, path) or TrainConfig()
    known = experiment.images_of(pruned, str(path))
    source = _images(options, known)
    seed = train.seed if options.seed is None else options.seed
    ball = _ball(options, train)
    # Validation images stay those that were held out, whatever the seed of the attacks.
    dataset = experiment.load_data(source, seed if known is None else train.seed, device)
    model = networks.trained(
        pruned,
        dataset,
        str(options.what),
        arch=options.arch,
        width=options.width,
        normalize=options.normalize,
    ).to(device)
    images = getattr(dataset, options.split)
    if options.images is not None:
        images = data.Split(images.images[: options.images], images.labels[: options.images])
    weights, epoch = (path.stem, pruned.provenance.get("epoch")) if run else (None, None)
    return Subject(model, images, source, ball, seed, weights, epoch)


def _ball(options: Options, train: TrainConfig) -> BallArgs:
    """The radius and the norm that the options name, or else the training."""
    if options.norm not in (None, train.norm) and options.eps is None:
        raise ValueError(f"--norm {options.norm} needs its own --eps: {train.eps:g} is a radius in {train.norm}")
    eps = train.eps if options.eps is None else options.eps
    ball: BallArgs = {"eps": eps, "norm": options.norm or train.norm}
    require_radius(**ball)
    require_radius(options.alpha or 0, ball["norm"], "alpha")
    return ball


def _result(options: Options, subject: Subject, measured: Measured) -> dict[str, object]:
    """The result as JSON."""
    source, eps = subject.source, subject.ball["eps"]
    return {
        "what": str(options.what),
        "weights": subject.weights,
        "epoch": subject.epoch,
        "data": source.data,
        "split": options.split,
        **({} if options.split == "test" else {"limit": source.limit, "validation": source.validation}),
        "images": len(subject.images.labels),
        **subject.ball,
        **({"alpha": _step_size(options, eps)} if options.attack == "bound" else {}),
        "seed": subject.seed,
        **measured.accuracies,
        "robust": measured.robust,
        "meaning": measured.meaning,
        "warnings": measured.signs,
        **({} if measured.unconfirmed is None else {"unconfirmed": measured.unconfirmed}),
    }


def _text(options: Options, subject: Subject, measured: Measured) -> str:
    """The result in words."""
    listed = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in measured.accuracies.items())
    which = f" ({subject.weights} weights, epoch {subject.epoch})" if subject.weights else ""
    images = f"{len(subject.images.labels)} {options.split} images of {subject.source.data}"
    warnings = [f"warning: {sign}" for sign in measured.signs]
    first = f"{options.what}{which}: {listed} of {images}, eps {subject.ball['eps']:g}"
    return "\n".join([first, measured.meaning, *warnings])


def _images(options: Options, known: DataConfig | None) -> DataConfig:
    """The images named by the flags, else by the run or the ticket."""
    if options.data is None and known is None:
        raise ValueError(f"{options.what} does not say which images it is for: name them with --data")
    given = {name: getattr(options, name) for name in ("data", "limit", "validation")}
    wanted = replace(known or DataConfig(), **{name: value for name, value in given.items() if value is not None})
    # limit and validation divide training images only, and may not fit this data set.
    return DataConfig(wanted.data) if options.split == "test" else wanted


class Measured(NamedTuple):
    """What was measured."""

    accuracies: dict[str, float]
    robust: float
    """The share of images that withstood all attacks."""
    meaning: str
    """What the accuracies mean."""
    signs: list[str]
    """Signs that they cannot be trusted."""
    unconfirmed: dict[str, int] | None = None
    """For each attack of AutoAttack, the number of examples that float32 did not confirm."""


def _step_size(options: Options, eps: float) -> float:
    """The step size of PGD, in units of the images."""
    return eps / 4 if options.alpha is None else options.alpha


def _bound(options: Options, model: nn.Module, images: data.Split, seed: int, ball: BallArgs) -> Measured:
    """Accuracies under attacks that take seconds."""
    steps, restarts = options.steps or STEPS, options.restarts or RESTARTS
    name = f"pgd-{steps}" + (f" x {restarts}" if restarts > 1 else "")
    attacked = f"clean, fgsm, {name}, pgd-{BOUND_STEPS} x {BOUND_RESTARTS} on the margin"
    log.info("testing on %s images: %s", f"{len(images.labels):,}", attacked)
    step: dict[str, Any] = {"alpha": _step_size(options, ball["eps"]), "seed": seed}
    clean = clean_accuracy(model, images)
    fgsm = fgsm_accuracy(model, images, **ball)
    pgd = robust_accuracy(model, images, **ball, **step, steps=steps, restarts=restarts)
    assert fgsm.robust is not None and pgd.robust is not None
    strongest: dict[str, Any] = {"loss": "margin", "early_stop": True, "among": fgsm.robust & pgd.robust}
    robust = robust_accuracy(model, images, **ball, **step, steps=BOUND_STEPS, restarts=BOUND_RESTARTS, **strongest)
    accuracies = {"clean": clean.fraction, "fgsm": fgsm.fraction, name: pgd.fraction}
    meaning = (
        f"robust accuracy is at most {robust.fraction:.1%}: the images that withstood fgsm and {name}, and then "
        f"pgd-{BOUND_STEPS} on the margin with {BOUND_RESTARTS} restarts; for a number to report, --attack autoattack"
    )
    device = device_of(model)
    x, y = (tensor[:CHECKED_IMAGES].to(device) for tensor in (images.images, images.labels))
    return Measured(accuracies, robust.fraction, meaning, attacks.signs_of_masking(model, data.to_unit(x), y, **ball))


def _autoattack(
    options: Options, model: nn.Module, images: data.Split, seed: int, ball: BallArgs, verbose: bool
) -> Measured:
    """Accuracies after each attack of AutoAttack."""
    if distributed.world_size() > 1:
        raise ValueError(f"--attack autoattack runs in one process, got {distributed.world_size()}")
    evaluator = attacks.AutoAttack(model, **ball, seed=seed, verbose=verbose)
    evaluator.run_standard_evaluation(data.to_unit(images.images), images.labels, state_path=options.state)
    result = evaluator.result
    assert result is not None
    robust = list(result.accuracy.values())[-1]
    meaning = f"robust accuracy {robust:.1%} under {result.name}: {result.budgets}"
    return Measured(result.accuracy, robust, meaning, result.signs, result.unconfirmed)
