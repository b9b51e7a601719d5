"""The progress of a run of AutoAttack, in a safetensors file from which the run can continue, and its result."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_adv.attacks.success import is_correct
from sparse_adv.files import write_bytes

_TENSORS = ("adversarial", "predictions", "robust", "pending", "logits")
_COMPARED = 8
"""Number of images whose clean logits are compared, to refuse to continue a run with another function."""
_TOLERANCE = 1e-3
"""Largest accepted difference of logits, relative to the largest; another device or number of threads causes less."""


class OtherRunError(ValueError):
    """A state that belongs to another model, other images or other options."""


@dataclass
class State:
    """The progress of a run."""

    fingerprint: str
    """Digest of the model, the images and the options."""
    seed: int
    adversarial: Tensor
    predictions: Tensor
    robust: Tensor
    pending: Tensor
    """Images that the present attack has not reached yet, bool [N]."""
    logits: Tensor
    """Clean logits of the first images."""
    accuracy: dict[str, float]
    unconfirmed: dict[str, int]
    seconds: float = 0.0
    """Time of all processes that worked on the run, each up to the last file that it wrote."""
    _due: float = field(default=-math.inf, init=False, repr=False, compare=False)

    @classmethod
    def initial(cls, fingerprint: str, seed: int, images: Tensor, labels: Tensor, logits: Tensor) -> State:
        """The state before the first attack, with the clean logits of all images."""
        robust = is_correct(logits, labels)
        accuracy, pending = {"clean": robust.double().mean().item()}, torch.zeros_like(robust)
        first = first_logits(logits)
        return cls(fingerprint, seed, images.clone(), logits.argmax(1), robust, pending, first, accuracy, {})

    def check_logits(self, logits: Tensor, path: Path) -> None:
        """Raise ValueError unless the model returned these clean logits when the run began.

        Parameters and buffers cannot distinguish plain functions, or modules whose code differs.
        """
        count = min(len(logits), len(self.logits))
        now, then = first_logits(logits[:count]), self.logits[:count]
        largest = float(then.nan_to_num(nan=0, posinf=0, neginf=0).abs().max())
        tolerance = max(_TOLERANCE, 8 * torch.finfo(now.dtype).eps) * largest
        if now.shape != then.shape or not now.allclose(then.to(now.dtype), rtol=0, atol=tolerance, equal_nan=True):
            raise OtherRunError(f"state_path {path} is of another model, with other clean logits: name another file")

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        began = time.perf_counter()
        facts = [self.fingerprint, self.seed, self.accuracy, self.unconfirmed, self.seconds]
        metadata = {"sparse_adv_autoattack": json.dumps(facts)}
        write_bytes(path, save({name: getattr(self, name).contiguous() for name in _TENSORS}, metadata))
        ended = time.perf_counter()
        self._due = ended + 9 * (ended - began)

    def write_if_due(self, path: Path) -> None:
        """Write the file, unless writing all images would then take more than a tenth of the time."""
        if time.perf_counter() >= self._due:
            self.write(path)

    def result(self, name: str, budgets: str, signs: list[str]) -> Result:
        """The result of a run that ends in this state."""
        of_images = self.adversarial, self.predictions, self.robust
        return Result(name, budgets, *of_images, self.accuracy, self.unconfirmed, signs, self.seconds)

    @classmethod
    def read(cls, path: Path, fingerprint: str) -> State:
        """Read the file; raise ValueError if it is not a state, or belongs to another run."""
        try:
            with safe_open(path, "pt") as file:
                known, seed, accuracy, unconfirmed, seconds = json.loads(
                    (file.metadata() or {})["sparse_adv_autoattack"]
                )
                tensors = {name: file.get_tensor(name) for name in _TENSORS}
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            reason = f"it lacks the key {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"state_path {path} is no state of AutoAttack: {reason}") from error
        if known != fingerprint:
            others = "another model, other images or other options"
            raise OtherRunError(f"state_path {path} is of {others}: name another file")
        return cls(known, seed, accuracy=accuracy, unconfirmed=unconfirmed, seconds=seconds, **tensors)


@dataclass(frozen=True)
class Result:
    """What a run of `AutoAttack` found."""

    name: str
    """"AutoAttack", or what ran instead."""
    budgets: str
    """The attacks in their order, each with its budget."""
    adversarial: Tensor = field(repr=False)
    """For each image the example found, else the image itself."""
    predictions: Tensor = field(repr=False)
    """The model's class of each row of `adversarial`."""
    robust: Tensor = field(repr=False)
    """Whether each image is robust: classified correctly, and no adversarial example was found; bool [N]."""
    accuracy: dict[str, float]
    """Robust accuracy, "clean" and after each attack, in their order."""
    unconfirmed: dict[str, int]
    """For each attack the number of unconfirmed examples: the attack claimed them, but verification did not confirm
    them.

    Their images are attacked again in float32 and without the engine. Attacks that average gradients (eot_iter > 1)
    count none: with a model that draws random numbers, one pass decides, as in the authors' implementation.
    """
    signs: list[str]
    """Signs that the number is not to be trusted, see `signs_of_masking`."""
    seconds: float
    """Time of the attacks; for an interrupted run, the sum over all processes that worked on it."""


def first_logits(logits: Tensor) -> Tensor:
    """The logits of the first images, for `State.logits`."""
    return logits[:_COMPARED].detach().cpu()


def fingerprint(text: str, tensors: Iterable[Tensor]) -> str:
    """SHA-256 of a text and of the bytes of tensors; of a DTensor (FSDP2), only this process's part counts.

    Examples:
        >>> len(fingerprint("linf", [torch.zeros(2)]))
        64
    """
    digest = hashlib.sha256(text.encode())
    for tensor in (each.to_local() if hasattr(each, "to_local") else each for each in tensors):
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        # A copy, because a storage that NumPy has seen cannot be resized, but FSDP2 resizes its storages.
        copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        digest.update(copied.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
