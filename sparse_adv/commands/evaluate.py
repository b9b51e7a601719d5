"""`evaluate`: clean accuracy, and accuracy under FGSM and PGD with restarts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_adv import data, experiment, masks, runs
from sparse_adv.commands import flags, networks
from sparse_adv.commands.output import Output
from sparse_adv.config import DataConfig, TrainConfig
from sparse_adv.files import write_text
from sparse_adv.nn import sparsify
from sparse_adv.training import clean_accuracy, distributed, fgsm_accuracy, robust_accuracy

SPLITS = ("test", "validation", "train")


def add(commands: Any) -> None:
    parser = flags.command(
        commands,
        "evaluate",
        "measure accuracy, clean and under attack",
        "Measures a run's best weights, a ticket or any pruned checkpoint: clean, FGSM, and PGD with restarts, each of "
        "which attacks what the ones before left standing. These are upper bounds of robustness, good for comparing "
        "runs; published numbers need AutoAttack. Under torchrun the processes share the images.",
    )
    parser.add_argument("what", type=Path, help="run folder, or a file of weights (then --arch says of which network)")
    parser.add_argument("--weights", default="best", metavar="WHICH", help="of a run: best or last")
    parser.add_argument("--split", default="test", metavar="WHICH", help=f"images to measure on: {', '.join(SPLITS)}")
    parser.add_argument("--images", type=flags.whole, metavar="N", help="measure on the first N images only")
    parser.add_argument("--out", type=Path, help="also write the result to this JSON file")
    attack = parser.add_argument_group("attack")
    attack.add_argument("--eps", type=flags.number, help="radius of the ball; left out, the run's, or 8/255")
    attack.add_argument("--alpha", type=flags.number, help="step size of PGD; left out, eps / 4")
    attack.add_argument("--steps", type=flags.whole, default=20, help="of PGD")
    attack.add_argument("--restarts", type=flags.whole, default=1, help="of PGD, each from a random start")
    attack.add_argument("--norm", help="linf or l2; left out, the run's, or linf")
    flags.add_config(parser)
    flags.add_output(parser)
    flags.add_data(parser, None, None)
    flags.add_network(parser, None)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    for name, known in (("weights", ("best", "last")), ("split", SPLITS)):
        if getattr(options, name) not in known:
            raise ValueError(f"--{name} must be one of {', '.join(known)}, got {getattr(options, name)!r}")
    for name in ("steps", "restarts", "images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    with distributed.group(options.device) as device:
        folder = runs.read(options.what) if options.what.is_dir() else None
        images_config = (folder.info.data if folder else None) or DataConfig()
        settings = asdict(images_config) | asdict(folder.info.train if folder else TrainConfig())
        for name in ("data", "limit", "validation", "seed", "eps", "norm"):
            if getattr(options, name) is None:
                setattr(options, name, settings[name])
        dataset = experiment.load_data(networks.images_of(options), options.seed, device)
        model = _network(options, folder, dataset).to(device)
        images = getattr(dataset, options.split)
        if options.images is not None:
            images = data.Split(images.images[: options.images], images.labels[: options.images])
        ball = {"eps": options.eps, "norm": options.norm}
        tried = f"pgd-{options.steps}" + (f" x {options.restarts}" if options.restarts > 1 else "")
        measured = {
            "clean": clean_accuracy(model, images),
            "fgsm": fgsm_accuracy(model, images, **ball),
            tried: robust_accuracy(
                model,
                images,
                **ball,
                alpha=options.alpha,
                steps=options.steps,
                restarts=options.restarts,
                seed=options.seed,
            ),
        }
        found = {attack: accuracy.fraction for attack, accuracy in measured.items()}
        result = {"what": str(options.what), "split": options.split, "images": len(images.labels), **ball, **found}
        if options.out and distributed.rank() == 0:
            write_text(options.out, json.dumps(result, indent=2) + "\n")
        told_as = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in found.items())
        Output(options.json).say(
            f"{options.what}: {told_as} of {len(images.labels)} {options.split} images, eps {options.eps:g}",
            result,
        )
    return 0


def _network(options: argparse.Namespace, folder: runs.Run | None, dataset: data.Dataset) -> nn.Module:
    """The network of a run or a file, sparse where that has masks."""
    path = options.what
    if folder is not None:
        path = options.what / (runs.LAST if options.weights == "last" else runs.BEST)
        if not path.exists() and folder.info.kind == "search":
            raise ValueError(f"{options.what} is a search: evaluate its {runs.TICKET}, or a run that has trained it")
    found = masks.load_pruned(path, dense=True)
    network = folder.info.network if folder is not None else None
    told = found.provenance if network is None else asdict(network)
    about = networks.agreed(options, told, str(options.what))
    model = experiment.build_network(about, dataset, 0, torch.device("cpu"))
    try:
        model.load_state_dict(found.state_dict)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {about.arch}: {str(error).splitlines()[-1].strip()}") from error
    return sparsify(model, found.masks)
