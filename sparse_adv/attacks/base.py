"""`Attack`: the base class of attack objects, with the interface of torchattacks."""

from __future__ import annotations

import copy
import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_adv.argument_types import check_count, checks_types, shortened
from sparse_adv.attacks import saved
from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import Ball, ball_around
from sparse_adv.attacks.checks import check_has_values, check_images, count_classes, int64_labels
from sparse_adv.attacks.modes import TrainingMode, in_mode
from sparse_adv.attacks.normalized import Normalized, channel_statistics
from sparse_adv.attacks.targets import TargetFunction, Targets, given_targets, least_likely, random_targets


class Attack(ABC):
    """An attack bound to a model: `adv = attack(images, labels)`.

    A subclass computes the examples in `forward`. It sets `supports_targets` to False if labels cannot be classes to
    reach, and `needs_labels` to False if it needs no labels. Its constructor sets its options, which may be set again
    between two calls. Setting a public attribute that the constructor has not set raises AttributeError.

    Args:
        model: maps images to logits [N, classes]; a module, or a plain function.

    Raises:
        TypeError: if the model cannot be called.

    Source: the interface is that of torchattacks (Kim, "Torchattacks: a PyTorch repository for adversarial attacks",
    2020).

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> class Brighter(attacks.Attack):
        ...     supports_targets = False
        ...     def forward(self, model, images, labels, targeted):
        ...         return (images + 0.1).clamp(max=1)
        >>> attack = Brighter(models.build("digits_cnn", width=8))
        >>> attack(torch.full((2, 1, 8, 8), 0.95), torch.tensor([0, 1])).unique()
        tensor([1.])
    """

    supports_targets = True
    needs_labels = True
    _normalization: Normalized | None = None

    def __init__(self, model: Model) -> None:
        as_module(model)
        self._model = model
        self._training: TrainingMode | None = None
        self.device = _device_of(model)
        self.targeted = False
        self.attack_mode = "default"
        self._target_function: Targets | None = None
        self._complete = type(self).__init__ is Attack.__init__

    def __init_subclass__(cls) -> None:
        """Let the constructor set a mark at its end; `__setattr__` reads it."""
        super().__init_subclass__()
        if "__init__" not in vars(cls):
            return
        construct = cls.__init__

        @functools.wraps(construct)
        def constructed(self: Attack, *args: Any, **options: Any) -> None:
            construct(self, *args, **options)
            if type(self).__init__ is constructed:  # a subclass's constructor would still go on
                self._complete = True

        cls.__init__ = constructed  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: object) -> None:
        if vars(self).get("_complete") and not name.startswith("_") and not hasattr(self, name):
            raise AttributeError(f"{self.attack} has no option {shortened(name)}")
        super().__setattr__(name, value)

    @abstractmethod
    def forward(self, model: Model, images: Tensor, labels: Any, targeted: bool) -> Tensor:
        """Return adversarial images for a batch; `model` takes images in the range of pixel values."""

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial images for a batch: images float [N, ...], labels integer [N], on any device."""
        check_images(images)
        if isinstance(labels, Tensor):
            check_has_values("labels", labels)
        if self.targeted:
            self._check_supports_targets()
        if labels is None and self.needs_labels and self._target_function is None:
            raise TypeError(f"labels must be an integer tensor, {type(self).__name__} needs them, got None")
        if self.device is not None:
            images = images.to(self.device)
            labels = labels.to(self.device) if isinstance(labels, Tensor) else labels
        if self._target_function is not None:
            labels = self._target_function(self.get_logits, images, self._labels_or_predictions(images, labels))
        model, normalized = self.model, self._normalization
        if normalized is not None:
            # The engine leaves plain functions to autograd, also normalised ones. A bound method would count as its
            # module.
            model = normalized if normalized.traceable else partial(_normalized, normalized)
            images = normalized.undo(images, self._box_of(images))
        if self._training is not None:
            model = partial(_in_training, model, self._training)
        adv = self.forward(model, images, labels, self.targeted)
        return adv if normalized is None else normalized.apply_to(adv)

    def set_mode_default(self) -> None:
        """Labels are the true classes, and the attack leads away from them."""
        self.targeted, self.attack_mode, self._target_function = False, "default", None

    @checks_types
    def set_mode_targeted_by_function(self, target_map_function: TargetFunction, quiet: bool = False) -> None:
        """Labels are the true classes, and target_map_function(images, labels) gives the classes to reach."""
        self._set_targets("targeted(custom)", partial(given_targets, target_map_function), quiet)

    @checks_types
    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
        """Labels are the classes to reach."""
        self._set_targets("targeted(label)", None, quiet)

    @checks_types
    def set_mode_targeted_random(self, quiet: bool = False) -> None:
        """Labels are the true classes; the classes to reach are drawn from the others by PyTorch's global generator."""
        self._set_targets("targeted(random)", random_targets, quiet)

    @checks_types
    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Labels are the true classes; the class to reach is the wrong one with the kth lowest logit."""
        check_count("kth_min", kth_min, least=1)
        self._set_targets("targeted(least-likely)", partial(least_likely, kth_min), quiet)

    def set_normalization_used(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take and return normalised images from now on, as the model does: (pixels - mean) / std of each channel."""
        self._normalization = Normalized(self.model, *channel_statistics(mean, std))

    def set_device(self, device: torch.device | str) -> None:
        """Images and labels go to this device from now on; the model must be there."""
        self.device = as_device(device)

    @checks_types
    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """Attack the model in training mode, for RNNs on CUDA, which have no gradients in eval mode.

        Gradients are then left to autograd. Running statistics of BatchNorm stay as they are.

        Args:
            model_training: whether all modules except those of the next two arguments are in training mode.
            batchnorm_training: whether BatchNorm layers are too, and use the statistics of the batch.
            dropout_training: whether dropout layers are too, and drop.
        """
        self._training = TrainingMode(batchnorm_training, dropout_training) if model_training else None

    @staticmethod
    def to_type(inputs: Tensor, type: str) -> Tensor:
        """Byte images as float ("float"), or float images as bytes, rounded down ("int"); others unchanged."""
        return saved.to_type(inputs, type)

    def for_images(self, index: Tensor) -> Attack:
        """This attack for some images of a batch: eps and alpha are indexed if they are tensors."""
        values = {name: getattr(self, name, None) for name in ("eps", "alpha")}
        own = {name: value[index.to(value.device)] for name, value in values.items() if isinstance(value, Tensor)}
        attack = copy.copy(self)
        vars(attack).update(own)
        return attack

    @property
    def model(self) -> Model:
        """The model under attack; assigning to it calls `set_model`."""
        return self._model

    @model.setter
    def model(self, model: Model) -> None:
        self.set_model(model)

    def set_model(self, model: Model) -> None:
        """Attack another model from now on."""
        as_module(model)
        self._model, self.device = model, _device_of(model)
        if self._normalization is not None:
            self._normalization = Normalized(model, self._normalization.mean, self._normalization.std)

    @property
    def model_name(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    @property
    def attack(self) -> str:
        """The class of the attack."""
        return type(self).__name__

    @property
    def supported_mode(self) -> list[str]:
        """ "default", and "targeted" if labels may be classes to reach."""
        return ["default", "targeted"] if self.supports_targets else ["default"]

    @property
    def normalization_used(self) -> dict[str, Tensor] | None:
        """Mean and std of the images that this attack takes; None for pixels."""
        used = self._normalization
        return None if used is None else {"mean": used.mean.view(1, -1, 1, 1), "std": used.std.view(1, -1, 1, 1)}

    @property
    def labels_are_targets(self) -> bool:
        """Whether labels are the classes to reach; in all other modes they are the true classes."""
        return self.targeted and self._target_function is None

    def get_mode(self) -> str:
        """Return the name of the mode, as torchattacks calls it."""
        return self.attack_mode

    @checks_types
    def save(
        self,
        data_loader: Iterable[tuple[Tensor, Tensor]],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: str = "float",
    ) -> Any:
        """Attack all batches; write a dict of adv_inputs and labels with `torch.save`, for `load` and `torch.load`.

        An image is robust if its example has the class of its label. Where labels are the classes to reach, it is
        robust if its example has another class: the target was not reached.

        Args:
            data_loader: batches (images, labels).
            save_path: the file; None to write none.
            verbose: print the robust accuracy in percent and the mean l2 distance of the adversarial examples.
            return_verbose: return both, and the seconds per batch.
            save_predictions, save_clean_inputs: whether the file also gets preds and clean_inputs.
            save_type: "float", or "int" for bytes: pixels times 255, rounded down, so they may leave the ball.

        Returns:
            With return_verbose the robust accuracy in percent, the mean distance (0 if there is no adversarial example)
            and the seconds per batch; else None.

        Raises:
            ValueError: if save_type has another value or there is no image.
            OSError: if the file cannot be written, before any attack.
        """
        wanted = {"preds": save_predictions, "clean_inputs": save_clean_inputs}
        found = saved.attacked(self, data_loader, save_path, {name for name in wanted if wanted[name]}, save_type)
        if verbose:
            print(f"robust accuracy {found.accuracy:.2f} %, l2 {found.distance:.5f}, {found.seconds:.3f} s a batch")
        return tuple(found) if return_verbose else None

    @staticmethod
    @checks_types
    def load(
        load_path: str | Path,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: dict[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Read a file that `save` or torchattacks wrote. Reading it runs no code.

        Args:
            load_path: the file.
            batch_size, shuffle: of the DataLoader.
            normalize: dict of mean and std of each channel, to normalise the images; None for pixels in [0, 1].
            load_predictions, load_clean_inputs: whether batches also hold preds and clean_inputs.

        Returns:
            A DataLoader of batches: adv_inputs, labels, and then preds and clean_inputs if requested.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not such a file, or lacks requested entries.
        """
        wanted = {"adv_inputs": True, "labels": True, "preds": load_predictions, "clean_inputs": load_clean_inputs}
        return saved.load(Path(load_path), batch_size, shuffle, normalize, [name for name in wanted if wanted[name]])

    def __repr__(self) -> str:
        hidden = ("device", "supports_targets", *(() if self.targeted else ("targeted",)))
        shown = {name: value for name, value in vars(self).items() if name not in hidden and not name.startswith("_")}
        return f"{self.attack}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def _set_targets(self, mode: str, function: Targets | None, quiet: bool) -> None:
        self._check_supports_targets()
        self.targeted, self.attack_mode, self._target_function = True, mode, function
        if not quiet:
            print(f"Attack mode is changed to '{mode}'.")

    def _check_supports_targets(self) -> None:
        if not self.supports_targets:
            raise ValueError(f"{self.attack} has no targeted mode")

    @torch.no_grad()
    def get_logits(self, images: Tensor) -> Tensor:
        """The logits of images as this attack takes them, with the model in eval mode."""
        check_images(images)
        module, _ = as_module(self.model)
        with in_mode(module, "eval") as model:
            logits = model(images)
        count_classes(logits, len(images))
        return logits

    def _labels_or_predictions(self, images: Tensor, labels: Tensor | None) -> Tensor:
        return self.get_logits(images).argmax(1) if labels is None else int64_labels(labels)

    def normalize(self, images: Tensor) -> Tensor:
        """(pixels - mean) / std of each channel, if `set_normalization_used` gave them; else the pixels."""
        check_images(images)
        return images if self._normalization is None else self._normalization.apply_to(images)

    def inverse_normalize(self, images: Tensor) -> Tensor:
        """The inverse of `normalize`, images * std + mean, kept in the range of pixel values in spite of rounding."""
        check_images(images)
        return images if self._normalization is None else self._normalization.undo(images, self._box_of(images))

    def _box_of(self, images: Tensor) -> Ball:
        """The range of pixel values of a batch, as a ball."""
        return ball_around(images, 0.0, "linf", getattr(self, "lo", 0.0), getattr(self, "hi", 1.0))


def as_device(device: torch.device | str) -> torch.device:
    """The device with this name; TypeError if it does not name one."""
    try:
        return torch.device(device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"device must be a torch.device or the name of one, got {shortened(device)}") from None


def _normalized(model: Normalized, images: Tensor) -> Tensor:
    return model(images)


def _in_training(model: Model, mode: TrainingMode, images: Tensor) -> Tensor:
    with in_mode(as_module(model)[0], mode) as running:
        return running(images)


def _device_of(model: object) -> torch.device | None:
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else ()
    return next((tensor.device for tensor in tensors), None)  # without one, images stay where they are
