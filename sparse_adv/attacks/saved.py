"""Files of adversarial images, as torchattacks writes them with `torch.save`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv import torch_files
from sparse_adv.argument_types import check_count, shortened
from sparse_adv.attacks.checks import int64_labels
from sparse_adv.attacks.normalized import channel_statistics, normalized
from sparse_adv.attacks.success import is_adversarial
from sparse_adv.errors import first_line
from sparse_adv.files import check_writable, replacing
from sparse_adv.ops.arguments import check_tensors

if TYPE_CHECKING:
    from sparse_adv.attacks.base import Attack

_IMAGES = ("adv_inputs", "clean_inputs")


class Found(NamedTuple):
    """What an attack found."""

    accuracy: float
    """Robust accuracy in percent."""
    distance: float
    """Mean l2 distance of the adversarial examples; 0 if there is none."""
    seconds: float
    """Mean time per batch."""


def attacked(
    attack: Attack,
    batches: Iterable[tuple[Tensor, Tensor]],
    path: str | Path | None,
    more: set[str],
    save_type: str,
) -> Found:
    """Attack all batches and write the file of `Attack.save`, also with the entries in `more`."""
    check_type("save_type", save_type)
    if path is not None:
        check_writable(Path(path))
    kept: dict[str, list[Tensor]] = {"adv_inputs": [], "labels": [], "preds": [], "clean_inputs": []}
    distances, robust, start = [], [], time.perf_counter()
    for batch in batches:
        images, labels = _pair(batch)
        adv = attack(images, labels)
        logits, labels = attack.get_logits(adv), int64_labels(labels.to(adv.device))
        fallen = is_adversarial(logits, labels, attack.labels_are_targets)
        moved, clean = map(attack.inverse_normalize, (adv, images.to(adv.device)))
        offset = (moved - clean).flatten(1).norm(dim=1)
        robust.append(~fallen)
        distances.append(offset[fallen])
        for name, values in (("adv_inputs", adv), ("clean_inputs", images)):
            kept[name].append(attack.inverse_normalize(values).cpu())
        kept["labels"].append(labels.cpu())
        kept["preds"].append(logits.argmax(1).cpu())
    if not any(map(len, robust)):
        raise ValueError("data_loader must hold at least one image, got none")
    seconds = (time.perf_counter() - start) / len(robust)
    accuracy = 100 * torch.cat(robust).float().mean().item()
    lengths = torch.cat(distances)
    if path is not None:
        wanted = {"adv_inputs", "labels", *more}
        content: dict[str, Any] = {name: torch.cat(values) for name, values in kept.items() if name in wanted}
        content |= {name: to_type(content[name], save_type) for name in _IMAGES if name in content}
        with replacing(Path(path)) as temporary:
            torch.save({**content, "save_type": save_type}, temporary)
    return Found(accuracy, lengths.mean().item() if len(lengths) else 0.0, seconds)


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch of a data loader."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(each, Tensor) for each in batch):
        return batch[0], batch[1]
    raise TypeError(f"data_loader must hold batches (images, labels) of tensors, got {shortened(batch)}")


def load(
    path: Path, batch_size: int, shuffle: bool, normalize: Mapping[str, Sequence[float]] | None, names: Sequence[str]
) -> DataLoader[tuple[Tensor, ...]]:
    """Read the file of `Attack.save`: batches of these entries."""
    check_count("batch_size", batch_size, least=1)
    if normalize is not None and not {"mean", "std"} <= normalize.keys():
        raise ValueError(f"normalize must have mean and std, got {shortened(normalize)}")
    with path.open("rb") as file:
        try:
            content = torch_files.load(file)
        except Exception as error:  # of many types
            reason = torch_files.why_refused(error) or first_line(error)
            raise ValueError(f"{path} is no file of adversarial images: {reason}") from error
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), Tensor):
            raise ValueError(f"{path} has no tensor {name!r}: it is no file of adversarial images, or saved without it")
    tensors = {name: content[name] for name in names}
    for name in tensors.keys() & set(_IMAGES):
        tensors[name] = to_type(tensors[name], "float")
        if normalize is not None:
            mean, std = channel_statistics(normalize["mean"], normalize["std"])
            tensors[name] = normalized(tensors[name], mean, std)
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        raise ValueError(f"{path} has tensors of different lengths: {[len(tensor) for tensor in tensors.values()]}")
    return DataLoader(TensorDataset(*tensors.values()), batch_size=batch_size, shuffle=shuffle)


def check_type(name: str, kind: object) -> None:
    """Raise ValueError unless this is "float" or "int"."""
    if not isinstance(kind, str) or kind not in ("float", "int"):
        raise ValueError(f'{name} must be "float" or "int", got {shortened(kind)}')


def to_type(images: Tensor, kind: str) -> Tensor:
    """Byte images as float, or float images as bytes; others unchanged."""
    check_type("type", kind)
    check_tensors(inputs=images)
    if kind == "int" and images.is_floating_point():
        return (images * 255).to(torch.uint8)
    return images.float() / 255 if kind == "float" and images.dtype == torch.uint8 else images
