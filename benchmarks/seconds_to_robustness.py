"""Robust test accuracy against seconds of training: dense, tickets, and networks that are sparse from the first step.

    python benchmarks/seconds_to_robustness.py CIFAR OUT time [--rows "dense, 1"]   # first, on a quiet machine
    python benchmarks/seconds_to_robustness.py CIFAR OUT train [--rows "dense, 1"] [--seeds 0,1,2]
    python benchmarks/seconds_to_robustness.py CIFAR OUT table [--out FILE.csv] [--picture FILE.svg]

One unit of time is what `--unit` dense epochs take. `time` measures the seconds per epoch of every row, in turns. From
these follows how many epochs a row has in its share of the unit. Changes of masks are included in the measured time,
and a ticket's search in its seconds. `train` continues where it was stopped, and needs no quiet machine. The last epoch
is validated, and tested once: clean, and under PGD-50 on the margin loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import torch
from harness import Record, run, write_records
from machine import environment

from sparse_adv import data, experiment, keep_freed_memory
from sparse_adv.config import DataConfig, MethodConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.files import write_text
from sparse_adv.training import clean_accuracy, robust_accuracy

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CPU = torch.device("cpu")
SECONDS = "seconds.json"
"""What `time` writes: the machine, and the seconds of an epoch of each kind of training."""
ROUNDS = 2
"""Number of measurements of each row's seconds."""
TIMED_UPDATES = 20
"""Number of updates in a measurement; it includes one change of the masks."""


@dataclass(frozen=True)
class Row:
    """The training of a row, and for how long.

    Args:
        share: of the unit of time; None for as many epochs as the unit has.
        method: of sparse training; None for none.
        prune: of a ticket search, which gets a third of the share; None for none.
        shuffle, reinit: controls of a ticket.
    """

    share: float | None
    method: MethodConfig | None = None
    prune: PruneConfig | None = None
    shuffle: bool = False
    reinit: bool = False


def _method(name: str, block: int, density: float, taps: tuple[int, ...] = (), **others: float) -> MethodConfig:
    return MethodConfig(name, density, (block, block, *taps), scope="uniform", interval=TIMED_UPDATES, **others)


def _rows() -> Iterator[tuple[str, Row]]:
    for share in (0.5, 1.0, 2.0):
        yield f"dense, {share:g}", Row(share)
    for density in (0.2, 0.1):
        for name in ("static", "flying-bird"):
            for block in (1, 2, 4, 8):
                yield f"{name} ({block}, {block}) {density}, 0.5", Row(0.5, _method(name, block, density))
    for density in (0.2, 0.1):
        for name in ("static", "flying-bird"):
            yield f"{name} (4, 4) {density}, 0.3", Row(0.3, _method(name, 4, density))
    for name in ("static", "flying-bird"):
        for block in (1, 2, 4, 8):
            yield f"{name} ({block}, {block}) 0.1, as many epochs", Row(None, _method(name, block, 0.1))
    for block in (1, 4):
        whole_filters = _method("flying-bird", block, 0.1, (3, 3))
        yield f"flying-bird ({block}, {block}, 3, 3) 0.1, as many epochs", Row(None, whole_filters)
    yield "flying-bird (4, 4) 0.1, 1", Row(1.0, _method("flying-bird", 4, 0.1))
    warm = _method("flying-bird", 4, 0.2, dense_epochs=1.0)
    yield "flying-bird (4, 4) 0.2 after a dense epoch, 0.5", Row(0.5, warm)
    for block in (1, 4):
        prune = PruneConfig(0.2, (block, block), scope="uniform")
        yield f"ticket ({block}, {block}) 0.2, 0.5", Row(0.5, prune=prune)
    yield "shuffled ticket (4, 4) 0.2, 0.5", Row(0.5, prune=prune, shuffle=True)
    yield "ticket (4, 4) 0.2 re-initialised, 0.5", Row(0.5, prune=prune, reinit=True)


ROWS = dict(_rows())


@dataclass(frozen=True)
class Setting:
    """Images, network and recipe that all rows have in common."""

    images: DataConfig
    network: NetworkConfig
    train: TrainConfig
    unit: int
    tested: int

    @property
    def training_images(self) -> int:
        assert self.images.limit is not None and self.images.validation is not None
        return self.images.limit - int(self.images.validation)

    def run(self, folder: Path, row: Row, epochs: int, seed: int, ticket: Path | None = None) -> experiment.TrainRun:
        train = replace(self.train, epochs=epochs, evaluate_every=epochs, seed=seed)
        dataset = experiment.load_data(self.images, seed, CPU)
        loaded = experiment.ticket_to_train(ticket, reinit=row.reinit, shuffle=row.shuffle) if ticket else None
        return experiment.TrainRun(
            folder, train, self.images, self.network, dataset, CPU, ticket=loaded, method=row.method
        )

    def search(self, folder: Path, prune: PruneConfig, epochs: int, seed: int) -> Path:
        train = replace(self.train, epochs=epochs, evaluate_every=epochs, seed=seed)
        dataset = experiment.load_data(self.images, seed, CPU)
        experiment.SearchRun(folder, train, prune, self.images, self.network, dataset, CPU).run()
        return folder / "ticket.safetensors"


def time(setting: Setting, out: Path, names: Sequence[str]) -> None:
    """Write the seconds per epoch of every row, medians of rounds in turns; the first epoch of a run is not counted."""
    measured = out / SECONDS
    if measured.exists():
        raise FileExistsError(f"{measured} exists: remove it to measure again")
    kinds = {_kind(row): row for row in map(ROWS.__getitem__, names) if row.prune is None}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    size = TIMED_UPDATES * setting.images.batch_size
    images = replace(setting.images, limit=size + 100, validation=100)
    train = replace(setting.train, evaluation_steps=1, overfitting_monitor=False)
    short = replace(setting, images=images, train=train)
    for _ in range(ROUNDS):
        for kind, row in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                *_, record = short.run(Path(folder) / "run", row, 2, 0).epochs()
            scale = setting.training_images / record.images
            seconds[kind].append(scale * (record.attack.seconds + record.update.seconds))
            print(f"{kind}: {seconds[kind][-1]:.1f} s per epoch", flush=True)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    write_text(measured, json.dumps({"machine": environment(), "epoch": medians, "all": seconds}, indent=1))


def _kind(row: Row) -> str:
    """The kind of training that decides the seconds of an epoch."""
    masks = row.method or row.prune
    if masks is None:
        return "dense"
    name = "static" if row.method is None else row.method.method  # the masks of a ticket are static
    return f"{name} {masks.block} {masks.density}"


def plan(row: Row, epoch: dict[str, float], unit: int) -> tuple[int, int, float]:
    """Epochs of the search, epochs of training, and the seconds of both."""
    missing = {"dense", _kind(row)} - set(epoch)
    if missing:
        raise ValueError(
            f"{SECONDS} has no seconds of {', '.join(sorted(missing))}: `time` measures the rows it is given"
        )
    dense, own = epoch["dense"], epoch[_kind(row)]
    if row.share is None:
        return 0, unit, unit * own
    budget = row.share * unit * dense
    if row.prune is not None:
        search = max(1, round(budget / 3 / dense))
        epochs = max(1, round((budget - search * dense) / own))
        return search, epochs, search * dense + epochs * own
    first = row.method.dense_epochs if row.method is not None else 0.0
    epochs = max(1, round(first + (budget - first * dense) / own))
    return 0, epochs, first * dense + (epochs - first) * own


def train(setting: Setting, out: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and test every row with every seed, all rows of the first seed first."""
    measured = out / SECONDS
    if not measured.exists():
        raise FileNotFoundError(f"{measured} is missing: run `time` first")
    epoch = json.loads(measured.read_text())["epoch"]
    for seed in seeds:
        for name in names:
            row = ROWS[name]
            search, epochs, seconds = plan(row, epoch, setting.unit)
            folder = out / f"seed{seed}" / name.replace(" ", "")
            result = folder / "answer.json"
            if result.exists():
                continue
            ticket = None
            if row.prune is not None:
                path = out / f"seed{seed}" / f"search{row.prune.block}"
                ticket = setting.search(path, row.prune, search, seed)
            run = setting.run(folder, row, epochs, seed, ticket)
            records = list(run.epochs())
            test = run.dataset.test
            tested = data.Split(test.images[: setting.tested], test.labels[: setting.tested])
            robust = robust_accuracy(run.model, tested, steps=50, loss="margin", early_stop=True, seed=0)
            answer = {
                "width": setting.network.width,
                "images": setting.training_images,
                "row": name,
                "seed": seed,
                "search_epochs": search,
                "epochs": epochs,
                "seconds": round(seconds, 1),
                "validation_pgd10": records[-1].robust_accuracy,
                "test_clean": clean_accuracy(run.model, tested).fraction,
                "test_pgd50_margin": robust.fraction,
            }
            write_text(result, json.dumps(answer, indent=1))
            print(json.dumps(answer), flush=True)


def answers(out: Path) -> list[Record]:
    found = [json.loads(path.read_text()) for path in sorted(out.glob("seed*/*/answer.json"))]
    return sorted(found, key=lambda answer: (list(ROWS).index(answer["row"]), answer["seed"]))


def table(out: Path, rows: Path | None, picture: Path | None) -> None:
    """Print a line per row, means over seeds."""
    found = answers(out)
    if not found:
        raise ValueError(f"{out} has no tested run: run `train` first")
    print("| row | epochs | seconds | seeds | validation PGD-10 | test clean | test PGD-50 margin |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    points = []
    for name in ROWS:
        own = [answer for answer in found if answer["row"] == name]
        if not own:
            continue
        means = [statistics.mean(100 * float(answer[key]) for answer in own) for key in list(own[0])[-3:]]
        search, epochs, seconds = (own[0][key] for key in ("search_epochs", "epochs", "seconds"))
        length = f"{search} + {epochs}" if search else str(epochs)
        robust = [100 * float(answer["test_pgd50_margin"]) for answer in own]
        listed = f" ({' '.join(f'{value:.1f}' for value in robust)})" if len(own) > 1 else ""
        validation, clean, pgd = (f"{mean:.1f}" for mean in means)
        print(f"| {name} | {length} | {seconds:.0f} | {len(own)} | {validation} | {clean} | {pgd}{listed} |")
        points.append((name, float(seconds), robust))
    if rows is not None:
        write_records(rows, found, json.loads((out / SECONDS).read_text())["machine"])
    if picture is not None:
        draw(points, picture)


def draw(points: Sequence[tuple[str, float, list[float]]], path: Path) -> None:
    """A line per recipe through the means of its points of different lengths, and a dot for each seed."""
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for name, seconds, robust in points:
        lines.setdefault(name.rpartition(",")[0], []).append((seconds, robust))
    for (recipe, line), marker in zip(lines.items(), "osv^<>DPXdph*8H" * 2, strict=False):
        means = sorted((seconds, statistics.mean(robust)) for seconds, robust in line)
        (drawn,) = axes.plot(*zip(*means, strict=True), marker=marker, label=recipe)
        seeds = [(seconds, value) for seconds, robust in line for value in robust]
        axes.plot(*zip(*seeds, strict=True), ".", color=drawn.get_color(), alpha=0.5)
    axes.set(xlabel="seconds of training, search included", ylabel="test accuracy under PGD-50 (margin), %")
    axes.set_xlim(left=0)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def seeds(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be integers from 0 on, such as 0,1,2, got {text!r}")
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cifar", type=Path, help="folder or archive of CIFAR-10")
    parser.add_argument("folder", type=Path, help="of all runs")
    parser.add_argument("what", choices=("time", "train", "table"))
    parser.add_argument("--images", type=int, default=5000, help="training images; 1,000 more are for validation")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--unit", type=int, default=8, help="dense epochs of a unit of time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tested", type=int, default=2000, help="test images")
    parser.add_argument("--seeds", type=seeds, default=[0], help="such as 0,1,2")
    parser.add_argument("--rows", action="append", choices=ROWS, metavar="ROW", help="may be repeated; default: all")
    parser.add_argument("--out", type=Path, help="CSV file to write as well")
    parser.add_argument("--picture", type=Path, help="PNG or SVG file to write as well")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    images = DataConfig(str(options.cifar), limit=options.images + 1000, validation=1000, batch_size=options.batch)
    recipe = TrainConfig("n-fgsm", schedule="cyclic", lr=0.1, overfitting_monitor=False)
    setting = Setting(images, NetworkConfig("resnet18", options.width), recipe, options.unit, options.tested)
    names = options.rows or list(ROWS)
    if options.what == "time":
        options.folder.mkdir(parents=True, exist_ok=True)
        time(setting, options.folder, names)
    elif options.what == "train":
        train(setting, options.folder, names, options.seeds)
    else:
        table(options.folder, options.out, options.picture)


if __name__ == "__main__":
    run(main)
