"""What decides the result of a run besides its configuration: network, weights and images, as SHA-256 digests.

A folder remembers them, so that a run is never continued or returned for another network or other images.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from sparse_adv.config import TrainConfig
from sparse_adv.data import Batches, Split
from sparse_adv.training import distributed
from sparse_adv.training.modes import frozen_modules
from sparse_adv.training.random_numbers import seeded

log = logging.getLogger(__name__)

_SAMPLES = 64
"""Number of images of a DataLoader that are read for its digest."""
_ELEMENTS = 4096
"""Number of evenly spaced elements of a long attribute that are read for a digest."""

_FUNCTIONS = (FunctionType, BuiltinFunctionType)

_in_training: WeakKeyDictionary[nn.Module, Path] = WeakKeyDictionary()
"""Models in training, or whose training was interrupted, and the folder of the run."""
_moved: WeakKeyDictionary[nn.Module, dict[tuple[str, str], bytes]] = WeakKeyDictionary()
"""Attributes of modules that training in this process has changed, such as counters, with their earlier values."""
_refrozen: WeakKeyDictionary[nn.Module, dict[str, list[str]]] = WeakKeyDictionary()
"""For modules in which a hook has frozen or unfrozen parameters in training: the parameters frozen before that."""


class Identity(TypedDict):
    """Digests of what must be the same when a run continues, besides its configuration; a dict in `state.pt`."""

    network: str
    weights: str
    """Of the weights that the run began with."""
    batches: str | None
    validation: str | None


class Environment(TypedDict):
    """Facts that affect only the last bits of a run's result; a dict in `state.pt`."""

    threads: int
    torch: str
    device: str


def of_run(
    model: nn.Module,
    batches: Iterable[Any],
    validation: Split | Iterable[Any] | None,
    seed: int,
    masks_change: bool = False,
) -> Identity:
    """Return the identity of a run that begins.

    Masks that change during training belong to the weights, others to the network.
    """
    return {
        "network": network_digest(model, with_masks=not masks_change),
        "weights": weights_digest(model.state_dict()),
        "batches": images_digest(batches, seed),
        "validation": images_digest(validation, seed),
    }


def check_continues(
    folder: Path, state: Mapping[str, Any], config: TrainConfig, own: Identity, model: nn.Module
) -> Identity:
    """Return the identity of the run in a folder; raise ValueError unless a call continues that run.

    The call may ask for more epochs than before.

    Args:
        folder, state: of the run, and the content of its `state.pt`.
        config, own, model: of the call; `own` is from `of_run`.
    """
    known, wanted = state["config"], asdict(config)
    fewer = config.epochs < max(len(state["records"]), known["epochs"])
    free = {"epochs": 0, "graphs": True}  # more epochs continue a run, and graphs change no bit of it
    if fewer or known | free != wanted | free:
        raise ValueError(f"{folder} holds a run of another configuration: take another folder, or delete it")
    processes = len(state["identity"])
    if processes != distributed.world_size():
        raise ValueError(
            f"{folder} holds a run of {processes} processes, got {distributed.world_size()}: start as many"
        )
    begun: Identity = state["identity"][distributed.rank()]
    # The weights may be those at the beginning of the run, or those at its end.
    if own["weights"] == weights_digest(state["model"]):
        own = own | {"weights": begun["weights"]}
    check_same(folder, own, begun, model)
    return begun


def check_same(folder: Path, own: Identity, begun: Identity, model: nn.Module) -> None:
    """Raises ValueError if the run in a folder began with another network or other images."""
    parts = {
        "network": own["network"] == begun["network"],
        "initial weights": own["weights"] == begun["weights"] or was_interrupted(model, folder),
        "training images": own["batches"] == begun["batches"],
        "validation images": own["validation"] == begun["validation"],
    }
    for part, matches in parts.items():
        if not matches:
            raise ValueError(f"{folder} holds a run with other {part}: take another folder, or delete it")


def environment(device: torch.device) -> Environment:
    """Return the environment of this process."""
    return {"threads": torch.get_num_threads(), "torch": str(torch.__version__), "device": device.type}


def warn_of_changes(folder: Path, before: Environment, now: Environment) -> None:
    """Warn of each difference between two environments of one run."""
    for name, value in now.items():
        if before.get(name) != value:
            log.warning(
                "%s was trained with %s %s, now %s: the last bits may differ from those of an uninterrupted run",
                folder,
                name,
                before.get(name),
                value,
            )


def network_digest(model: nn.Module, with_masks: bool = True) -> str:
    """Return the digest of a model's definition: its modules with their attributes, shapes and dtypes, and its masks.

    Attributes are numbers, text, functions (by name), tensors, arrays and sequences of these, if their names do not
    begin with "_". If training in this process has changed an attribute, such as a counter of forward passes, its
    earlier value counts.

    Args:
        model: any module.
        with_masks: whether models that differ only in their masks have different digests.

    Examples:
        >>> network_digest(nn.Linear(2, 1)) == network_digest(nn.Linear(2, 1))
        True
        >>> network_digest(nn.Linear(2, 1)) == network_digest(nn.Linear(2, 1).requires_grad_(False))
        False
    """
    digest, frozen = hashlib.sha256(), _frozen_parameters(model) | _refrozen.get(model, {})
    for name, module in model.named_modules():
        # Addresses in descriptions of functions differ between processes.
        described = re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr())
        if not with_masks:
            described = re.sub(r", density=[^,]*", "", described)
        digest.update(repr((name, type(module).__qualname__, described, frozen[name])).encode())
    for names, attribute in sorted((_attributes(model) | _moved.get(model, {})).items()):
        digest.update(repr(names).encode() + attribute)
    digest.update(repr(frozen_modules(model)).encode())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            got = f"{name!r}, a {type(tensor).__name__}"
            raise ValueError(f"model must have tensors alone in its state dict to be kept in a folder, got {got}")
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.dtype == torch.bool and with_masks:
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def weights_digest(state_dict: Mapping[str, object]) -> str:
    """Return the digest of all values of a state dict.

    Examples:
        >>> weights_digest({"a": torch.zeros(2)}) == weights_digest({"a": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name, value in state_dict.items():
        digest.update(name.encode())
        digest.update(_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return digest.hexdigest()


def images_digest(images: Split | Iterable[Any] | None, seed: int = 0) -> str | None:
    """Return the digest of images and labels, or of batches of them.

    A `Split`, `data.Batches` or list is read as a whole (about a second per gigabyte); from other sequences, 64 evenly
    spaced items are read. If a DataLoader's data set has a length, the digest covers that length, 64 evenly spaced
    samples, each read and collated alone under fixed random numbers, and the attributes of its sampler. For anything
    else, the number of batches and the attributes count: numbers, tensors, arrays, ranges and sequences of these,
    except `epoch` and names that begin with "_".

    Args:
        images: the images for training or validation; None has the digest None.
        seed: of the random numbers for reading the samples of a DataLoader.

    Examples:
        >>> batch = torch.zeros(2, 1, 4, 4), torch.tensor([0, 1])
        >>> images_digest([batch]) == images_digest([batch]), images_digest([batch]) == images_digest([batch, batch])
        (True, False)
    """
    if images is None:
        return None
    digest = hashlib.sha256()
    if isinstance(images, Batches):
        order = images.batch_size, images.shuffle, images.augment, images.seed, images.world_size
        digest.update(repr(order).encode())
        _add(digest, images.split)
    elif isinstance(images, DataLoader) and _has_samples(images.dataset):
        dataset, count = images.dataset, _length(images.dataset)
        digest.update(repr((count, len(images), images.batch_size)).encode())
        for sampler in (images.sampler, images.batch_sampler):
            digest.update(type(sampler).__qualname__.encode())
            _add_attributes(digest, sampler)
        step = max(1, count // _SAMPLES)
        with seeded(seed):
            for index in range(0, count, step):
                if images.batch_sampler is not None:
                    sample = [dataset[index]]
                else:
                    sample = dataset[[index] if isinstance(images.sampler, BatchSampler) else index]
                _add(digest, images.collate_fn(sample))
    elif isinstance(images, list | tuple):  # a Split, too
        _add(digest, images)
    elif isinstance(images, Sequence):  # the user's own, which may read its items from files
        digest.update(repr(len(images)).encode())
        with seeded(seed):
            for index in range(0, len(images), max(1, len(images) // _SAMPLES)):
                _add(digest, images[index])
    else:
        digest.update(repr(_length(images)).encode())
        _add_attributes(digest, images.dataset if isinstance(images, DataLoader) else images)
    return digest.hexdigest()


@contextmanager
def training_of(model: nn.Module, folder: Path | None) -> Iterator[None]:
    """Mark a model as being in training for a folder; after an exception the mark stays, see `was_interrupted`."""
    outer = _in_training.get(model)
    if folder is not None:
        _in_training[model] = folder.resolve()
    before, frozen = _attributes(model), _frozen_parameters(model)
    try:
        yield
    finally:
        after, frozen_after = _attributes(model), _frozen_parameters(model)
        refrozen = {name: keys for name, keys in frozen.items() if frozen_after.get(name, keys) != keys}
        _refrozen[model] = refrozen | _refrozen.get(model, {})
        moved = {name: value for name, value in before.items() if after.get(name, value) != value}
        _moved[model] = moved | _moved.get(model, {})
    _in_training.pop(model, None)
    if outer is not None:
        _in_training[model] = outer


def was_interrupted(model: nn.Module, folder: Path) -> bool:
    """Return whether this process trained the model for this folder, or a folder inside it, and was interrupted.

    Such a model has weights from the middle of an epoch; the folder's weights replace them.
    """
    interrupted, folder = _in_training.get(model), folder.resolve()
    return interrupted is not None and folder in (interrupted, *interrupted.parents)


def _frozen_parameters(model: nn.Module) -> dict[str, list[str]]:
    """For each module the names of its own parameters that are not trained."""
    return {
        name: [key for key, parameter in module.named_parameters(recurse=False) if not parameter.requires_grad]
        for name, module in model.named_modules()
    }


def _has_samples(dataset: Any) -> bool:
    has_index = hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)
    return has_index and _length(dataset) > 0


def _length(images: Any) -> int:
    try:
        return len(images)
    except TypeError:  # a DataLoader over a stream
        return 0


def _attributes(model: nn.Module) -> dict[tuple[str, str], bytes]:
    """The digest of each plain attribute and text of a model's modules, by the names of module and attribute."""
    digests = {}
    for name, module in model.named_modules():
        for attribute, value in _plain_attributes(module, str, *_FUNCTIONS):
            digest = hashlib.sha256()
            _add(digest, value)
            digests[name, attribute] = digest.digest()
    return digests


def _add_attributes(digest: Any, owner: Any) -> None:
    """Add the plain attributes of an object."""
    for name, value in _plain_attributes(owner):
        digest.update(name.encode())
        _add(digest, value)


def _plain_attributes(owner: Any, *others: type) -> Iterator[tuple[str, Any]]:
    """The plain attributes of an object and those of the types `others`; only evenly spaced elements of long ones."""
    plain = (bool, int, float, range, Tensor, np.ndarray, *others)
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        if name[0] == "_" or name in ("training", "epoch"):
            continue
        if isinstance(value, list | tuple | range) or (isinstance(value, Tensor | np.ndarray) and value.ndim):
            value = value[:: max(1, len(value) // _ELEMENTS)]
        parts = value if isinstance(value, list | tuple) else [value]
        if all(isinstance(part, plain) for part in parts):
            yield name, value


def _add(digest: Any, value: Any) -> None:
    """Add tensors, arrays, images of Pillow, numbers and text, and containers of them."""
    if isinstance(value, Tensor):
        digest.update(repr((tuple(value.shape), str(value.dtype))).encode())
        digest.update(_bytes(value))
    elif isinstance(value, dict):
        _add(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item)
    elif hasattr(value, "tobytes"):
        digest.update(value.tobytes())
    elif isinstance(value, _FUNCTIONS):
        digest.update(f"{value.__module__}.{value.__qualname__}".encode())
    elif value is None or isinstance(value, bool | int | float | str | bytes | range):
        digest.update(repr(value).encode())
    else:
        digest.update(type(value).__qualname__.encode())


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor; for an expanded one, whose elements share memory, the bytes of that memory."""
    if tensor.is_meta:
        return b""
    tensor = tensor.detach().cpu()
    stored = tensor.untyped_storage()
    if tensor.numel() * tensor.element_size() > stored.nbytes():
        about = repr((tuple(tensor.shape), tensor.stride())).encode()
        return about + torch.empty(0, dtype=torch.uint8, device="cpu").set_(stored).numpy().tobytes()
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
