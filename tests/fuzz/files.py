"""Damaged files for every reader: what is read is a value, or refused in one sentence that names the file."""

from __future__ import annotations

import functools
import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from helpers.foreign_formats import WRITERS, Network
from helpers.run_folders import epoch_record
from PIL import Image
from torch import Tensor

from fuzz.case import REFUSALS, Wrong, check_refusal
from fuzz.mutations import CANARY, mutated
from sparse_adv import data, json_files, masks, runs
from sparse_adv.attacks.autoattack_state import OtherRunError, State
from sparse_adv.commands import options, search, train
from sparse_adv.config import DataConfig, NetworkConfig, PruneConfig, TrainConfig
from sparse_adv.training.checkpoint import read_state, read_weights, write_state, write_weights

Files = Mapping[str, bytes]
"""The files of a folder by their path in it."""
Reader = Callable[[Path], object]


def case(rng: random.Random, folder: Path) -> str:
    """Damage one file of a valid set, and read the set."""
    subjects = _subjects()
    name = rng.choice(sorted(subjects))
    files, read = subjects[name]
    damaged = rng.choice(sorted(files))
    others = [next(iter(subjects[other][0].values())) for other in sorted(subjects)]
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(mutated(rng, content, others) if path == damaged else content)
    try:
        read(folder)
        outcome = "read"
    except Exception as error:
        try:
            check_refusal(
                error, (*REFUSALS, FileNotFoundError, OtherRunError), [*Path(damaged).parts, str(folder), *_PARTS]
            )
        except Wrong as wrong:
            raise Wrong(f"{name}, {damaged}: {wrong}") from error
        outcome = "refused"
    if os.environ.pop(CANARY, None):
        raise Wrong(f"{name}, {damaged}: code in the file was executed")
    return f"{name}: {outcome}"


_PARTS = ("state_dict", "mask", "masks", "weight", "model", "path", "format", *(f.name for f in fields(TrainConfig)))
"""What a sentence may name instead of the file, where the file is readable and what it holds does not fit."""


@functools.cache
def _subjects() -> dict[str, tuple[Files, Reader]]:
    """Valid files and the function that reads them."""
    subjects: dict[str, tuple[Files, Reader]] = {
        "ticket": (_made("t.safetensors", _save_ticket), lambda f: masks.load_ticket(f / "t.safetensors")),
        "weights": (_made("w.safetensors", _save_weights), lambda f: read_weights(f / "w.safetensors")),
        "state": (_made("s.pt", _save_state), lambda f: read_state(f / "s.pt", torch.device("cpu"), ["epoch"])),
        "autoattack": (_made("a.safetensors", _save_autoattack), lambda f: State.read(f / "a.safetensors", "x")),
        "run": ({"run.json": _RUN, "epochs.jsonl": _EPOCHS, "result.json": _RESULT}, runs.read),
        "train config": ({"c.yaml": _CONFIG}, functools.partial(_parse, "train", train.Options)),
        "search config": ({"c.yaml": _CONFIG}, functools.partial(_parse, "search", search.Options)),
        "idx": (_idx(False), data.load),
        "idx.gz": (_idx(True), data.load),
        "cifar10": (_cifar("cifar-10-batches-py/"), lambda f: data.load(f / "cifar-10-batches-py")),
        "cifar10.tar.gz": ({"c.tar.gz": _archive()}, lambda f: data.load(f / "c.tar.gz")),
        "mask list": (_mask_list(), _load_mask_list),
    }
    for kind in ("png", "jpg", "bmp", "gif", "ppm", "tiff", "webp"):
        subjects[kind] = (_images(kind), data.load)
    for name in WRITERS:
        for suffix, save in (("pt", torch.save), ("old.pt", _save_old), ("safetensors", _save_safetensors)):
            file = f"{name}.{suffix}"
            subjects[file] = (_made(file, functools.partial(_save_foreign, name, save)), _load_pruned(file))
    return subjects


def _load_pruned(file: str) -> Reader:
    return lambda folder: masks.load_pruned(folder / file)


def _made(name: str, write: Callable[[Path], object]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        write(path)
        return {name: path.read_bytes()}


def _network() -> tuple[Network, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Network()
    return model, masks.prune(model, 0.5, linear=True)


def _save_ticket(path: Path) -> None:
    model, kept = _network()
    masks.save_ticket(path, masks.Ticket(kept, model.state_dict(), {"seed": 0, "data": {"name": "digits"}}))


def _save_weights(path: Path) -> None:
    write_weights(path, _network()[0].state_dict(), {"epoch": 3, "accuracy": 0.5})


def _save_state(path: Path) -> None:
    write_state(path, {"epoch": 3, "model": _network()[0].state_dict(), "lr": [0.1]})


def _save_autoattack(path: Path) -> None:
    robust, pending = torch.ones(2, 2, dtype=torch.bool).unbind()
    State(
        "x",
        0,
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2),
        robust.clone(),
        pending.clone(),
        torch.zeros(2, 5),
        {"clean": 1.0},
        {"apgd-ce": 0},
    ).write(path)


def _save_foreign(name: str, save: Callable[[dict[str, Tensor], Path], None], path: Path) -> None:
    save({key: value.clone() for key, value in WRITERS[name](*_network()).items()}, path)


def _save_old(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "epoch": 3}, path, _use_new_zipfile_serialization=False)


def _save_safetensors(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)


def _mask_list() -> Files:
    model, kept = _network()
    layers = [kept["conv1"], kept["block.conv2"], torch.ones(6), kept["fc"]]
    entries = np.empty(len(layers), dtype=object)
    entries[:] = [mask.float().numpy() for mask in layers]
    return _made("w.pt", lambda path: torch.save(model.state_dict(), path)) | _made(
        "m.npy", lambda path: np.save(path, entries)
    )


def _load_mask_list(folder: Path) -> object:
    return masks.load_pruned(folder / "w.pt", folder / "m.npy", model=Network())


def _idx(packed: bool) -> Files:
    files = {}
    for part in ("train", "t10k"):
        files[f"{part}-images-idx3-ubyte"] = struct.pack(">BBBBIII", 0, 0, 8, 3, 12, 4, 4) + bytes(range(192))
        files[f"{part}-labels-idx1-ubyte"] = struct.pack(">BBBBI", 0, 0, 8, 1, 12) + bytes(i % 10 for i in range(12))
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()} if packed else files


def _cifar(folder: str) -> Files:
    batch = {b"data": np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072), b"labels": [3, 9], b"batch_label": b"1"}
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {f"{folder}{name}": pickle.dumps(batch, protocol=i % 5) for i, name in enumerate(names)}


def _archive() -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w:gz") as archive:
        for name, content in _cifar("cifar-10-batches-py/").items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def _images(kind: str) -> Files:
    pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, {"jpg": "jpeg"}.get(kind, kind))
    return {f"{c}/{i:02d}.{kind}": written.getvalue() for c in ("cat", "dog") for i in range(10)}


def _parse(command: str, kind: type, folder: Path) -> object:
    arguments = ["--out", str(folder / "out"), "--config", str(folder / "c.yaml")]
    return options.parse(options.parser_of(command, kind, True), kind, arguments)


_CONFIG = b"""\
data: digits
epochs: 3
eps: 8/255
milestones: [0.5, 0.75]
objective: fgsm-rs
overfitting_monitor: true
seed: 1
"""


def _written(write: Callable[[Path], object], name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        return (Path(folder) / name).read_bytes()


def _run_info() -> runs.RunInfo:
    return runs.RunInfo("train", TrainConfig(epochs=3), PruneConfig(), DataConfig(), NetworkConfig("digits_cnn", 8))


_RUN = _written(lambda folder: runs.begin(folder, _run_info()), "run.json")
_EPOCHS = _written(
    lambda folder: json_files.write_lines(folder / "e", [epoch_record(i, clean_accuracy=0.5) for i in (1, 2)]), "e"
)
_RESULT = _written(
    lambda folder: json_files.write(
        folder / "r",
        runs.TrainResult(runs.Cost(1.0, 5), runs.TicketChecks(weights=3), "best", 2, 0.5, {"clean": 0.9}),
    ),
    "r",
)
