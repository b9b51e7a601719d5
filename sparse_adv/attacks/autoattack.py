"""`AutoAttack`: the standard sequence of attacks for robust accuracies, each on the images that are still robust."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import check_count, checks_types, shortened
from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.autoattack_run import Evaluation, batches_of
from sparse_adv.attacks.autoattack_state import Result, fingerprint
from sparse_adv.attacks.autoattack_versions import MEMBERS, VERSIONS, Settings, Versioned
from sparse_adv.attacks.ball import checked_ball
from sparse_adv.attacks.base import Attack, as_device
from sparse_adv.attacks.checks import check_batch, check_images, check_labels, int64_labels
from sparse_adv.attacks.square import check_has_squares
from sparse_adv.attacks.success import is_correct
from sparse_adv.files import check_writable
from sparse_adv.ops.arguments import check_flags


class AutoAttack(Versioned, Attack):
    """AutoAttack: APGD-CE, targeted APGD, targeted FAB and Square, each on the images that are still robust.

    Every example found is moved into the ball without slack, clamped to the range of pixel values and classified again
    by the model itself, without the engine and without autocast (in float32, if weights and images are); only those
    that are then misclassified count. An image with a NaN among its logits is misclassified. Each attack is printed
    with its budget. The settings in `apgd`, `apgd_targeted`, `fab` and `square` may be changed as in the authors'
    implementation, for example `evaluator.apgd.n_restarts = 2`. Only version "standard" with unchanged settings is
    called AutoAttack.

    Args:
        model: maps images in [lo, hi] to logits [N, classes]; a module, or a plain function.
        norm: "linf" or "l2", also written "Linf" or "L2".
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image of a run.
        version: "standard": apgd-ce (100 steps, 1 restart), apgd-t (100 steps, 9 targets), fab-t (100 steps, 9
            targets), square (5000 queries). "plus", slower and seldom stronger: apgd-ce, apgd-dlr and fab (100 steps, 5
            restarts), square, apgd-t, fab-t. "rand", for models that draw random numbers: apgd-ce and apgd-dlr, each
            gradient averaged over 20. "custom": the attacks of `attacks_to_run`, with the budgets of "plus".
        n_classes: accepted for compatibility with torchattacks, without effect.
        seed: of all random numbers; None to draw one from PyTorch's global generator.
        verbose: print what runs and what it found.
        attacks_to_run: names of attacks, for version "custom" only.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.
        device: the device to move batches to; None for the model's device.
        log_path: a text file to which the printed lines are also appended.

    Raises:
        TypeError: if eps, lo or hi is neither a number nor a float tensor of one dimension.
        ValueError: if an option is out of range or an attack is unknown.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (ICML 2020), section 6. The interface is that of the authors' implementation.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> evaluator = attacks.AutoAttack(
        ...     models.build("digits_cnn", width=8),
        ...     eps=0.1,
        ...     version="custom",
        ...     attacks_to_run=["apgd-ce"],
        ...     verbose=False,
        ... )
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = evaluator.run_standard_evaluation(images, labels, bs=2)
        >>> list(evaluator.result.accuracy)
        ['clean', 'apgd-ce']
        >>> list(evaluator.run_standard_evaluation_individual(images, labels, bs=2))
        ['apgd-ce']
    """

    supports_targets = False
    n_classes: int | None = None
    """Accepted, and without effect."""

    def __init__(
        self,
        model: Model,
        norm: str = "linf",
        eps: float | Tensor = 8 / 255,
        version: str = "standard",
        n_classes: int | None = None,
        seed: int | None = None,
        verbose: bool = True,
        *,
        attacks_to_run: Sequence[str] = (),
        lo: float | Tensor = 0.0,
        hi: float | Tensor = 1.0,
        engine: bool = True,
        device: str | torch.device | None = None,
        log_path: str | Path | None = None,
    ) -> None:
        super().__init__(model)
        check_flags(verbose=verbose)
        if log_path is not None and not isinstance(log_path, str | Path):
            raise TypeError(f"log_path must be a path, got {shortened(log_path)}")
        self.seed, self.verbose = seed, verbose
        self.ball = checked_ball(eps, norm, lo, hi)
        self.set_version(version, attacks_to_run)
        self.engine = engine
        self.device = as_device(device) if device is not None else self.device or torch.device("cpu")
        self.log_path = None if log_path is None else Path(log_path)
        self.result: Result | None = None
        """The result of the last run; None before it."""

    @property
    def module(self) -> nn.Module:
        """The model as a module."""
        return as_module(self.model)[0]

    @property
    def engine(self) -> bool:
        """Whether the engine may compute the gradients; it leaves plain functions to autograd."""
        return self._engine and as_module(self.model)[1]

    @engine.setter
    def engine(self, engine: bool) -> None:
        check_flags(engine=engine)
        self._engine = engine

    def __repr__(self) -> str:
        norm, eps, version, seed = self.ball.norm, self.ball.eps_in_words, self.version, self.seed
        return f"AutoAttack({norm=}, eps={eps}, {version=}, attacks_to_run={self.attacks_to_run}, {seed=})"

    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Attack one batch; return the examples, or the images themselves where none was found."""
        if not len(images):
            return images
        run = copy.copy(self)
        run._model, run._normalization, run._training = model, None, None  # `model` contains them
        adversarial = run.run_standard_evaluation(images, labels, bs=len(images))
        self.result = run.result
        return adversarial

    def for_images(self, index: Tensor) -> Attack:
        """This attack for some images of a batch, see `Attack.for_images`."""
        attack = copy.copy(self)
        eps = self.ball.eps
        attack.ball = self.ball.of(index.to(eps.device) if isinstance(eps, Tensor) else index)
        return attack

    @overload
    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: Literal[False] = False,
        state_path: str | Path | None = None,
    ) -> Tensor: ...

    @overload
    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        *,
        return_labels: Literal[True],
        state_path: str | Path | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @checks_types
    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | Path | None = None,
    ) -> Any:
        """Run the attacks; `result` then says what they found.

        Args:
            x_orig: float tensor [N, ...], the clean images.
            y_orig: integer tensor [N], the true classes.
            bs: images per batch.
            return_labels: also return the model's classes of the examples.
            state_path: a safetensors file that is written between batches, in at most a tenth of the time. If it
                exists, the run continues from there and ends with the same examples as an uninterrupted one. `bs` may
                be changed, for example after a lack of memory; the rest of the run then draws other random numbers.

        Returns:
            The examples, or the image itself where none was found; with return_labels, a tuple of these and int64 [N].

        Raises:
            TypeError, ValueError: as in `attacks.pgd`; if there is no image; if bs is less than 1; if the file is of
                another model, other images or other options; if normalised images or a training mode have been set.
            OSError: if the file cannot be written, before any attack.
        """
        self.result = self._run(
            self.attacks_to_run, x_orig, y_orig, bs, None if state_path is None else Path(state_path)
        )
        return self._found(self.result, x_orig, return_labels)

    @overload
    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, *, return_labels: Literal[True]
    ) -> dict[str, tuple[Tensor, Tensor]]: ...

    @checks_types
    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Run each attack on all images that are classified correctly, whatever the earlier attacks found.

        Args:
            x_orig, y_orig, bs, return_labels: as in `run_standard_evaluation`.

        Returns:
            For each attack, by name, what `run_standard_evaluation` would return. `result` is the last attack's. The
            class's documentation has an example.
        """
        found = {}
        for name in self.attacks_to_run:
            result = self._run((name,), x_orig, y_orig, bs, None)
            self._log(f"robust accuracy by {name}: {result.accuracy[name]:.2%}")
            self.result, found[name] = result, self._found(result, x_orig, return_labels)
        return found

    @checks_types
    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The fraction of images that the model classifies correctly; NaN is never correct."""
        check_count("bs", bs, least=1)
        check_images(x_orig)
        if not len(x_orig):
            raise ValueError("x_orig must hold at least one image, got none")
        y_orig = int64_labels(y_orig)
        check_labels(x_orig, y_orig)
        right = [is_correct(self.get_logits(x), y).sum() for x, y in batches_of(x_orig, y_orig, int(bs), self.device)]
        accuracy = int(torch.stack(right).sum()) / len(x_orig)
        self._log(f"clean accuracy {accuracy:.2%}")
        return accuracy

    def _found(self, result: Result, images: Tensor, return_labels: bool) -> Any:
        """What a run returns, on the device of the given images."""
        adversarial, predictions = result.adversarial.to(images.device), result.predictions.to(images.device)
        return (adversarial, predictions) if return_labels else adversarial

    def _run(self, names: Sequence[str], images: Tensor, labels: Tensor, batch: int, path: Path | None) -> Result:
        if not names:
            raise ValueError('attacks_to_run must name at least one attack for version "custom", got none')
        if self._normalization is not None or self._training is not None:
            which = "set_model_training_mode" if self._normalization is None else "set_normalization_used"
            raise ValueError(f"{which} is for calls of the attack: make an AutoAttack of a model with it to evaluate")
        labels = int64_labels(labels)
        self.ball.on(images)  # raises where a tensor is of another length
        label_range = check_batch(images, labels, lo=self.ball.lo, hi=self.ball.hi)
        check_count("bs", batch, least=1)
        if not len(images):
            raise ValueError("x_orig must hold at least one image, got none")
        if "square" in self.attacks_to_run:
            check_has_squares(images)  # now, not hours later
        if path is not None:
            check_writable(path)
        full = self.version == "standard" and tuple(names) == VERSIONS["standard"] and self.settings == Settings()
        title = "AutoAttack" if full else f'version "{self.version}", which is not the whole AutoAttack'
        images, labels = images.detach().cpu(), labels.cpu()
        evaluation = Evaluation(
            title=title,
            names=tuple(names),
            settings=self.settings,
            model=self.model,
            get_logits=self.get_logits,
            ball=self.ball,
            engine=self.engine,
            device=self.device,
            images=images,
            labels=labels,
            label_range=label_range,
            batch=int(batch),
            log=self._log,
        )
        known = self._identity(names, images, labels)
        return evaluation.run(known, self.seed, path, draws=self.version == "rand")

    @torch.no_grad()
    def get_logits(self, x: Tensor) -> Tensor:
        """What the model itself returns, without engine and autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return super().get_logits(x)

    def _identity(self, names: Sequence[str], images: Tensor, labels: Tensor) -> str:
        ball = tuple("tensor" if isinstance(value, Tensor) else value for value in self.ball)
        own = [value for value in self.ball if isinstance(value, Tensor)]
        budgets = [MEMBERS[name].options(self.settings) for name in names]
        options = repr((self.version, tuple(names), budgets, ball, self.seed))
        return fingerprint(options, [images, labels, *own, *self.module.parameters(), *self.module.buffers()])

    def _log(self, text: str) -> None:
        if self.verbose:
            print(text, flush=True)
        if self.log_path is not None:
            with self.log_path.open("a") as file:
                file.write(text + "\n")
