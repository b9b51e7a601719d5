"""`AutoAttack`: the standard sequence of attacks for robust accuracies, each on the images that are still robust."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from sparse_adv.argument_types import check_count, checks_types, shortened
from sparse_adv.attacks.autoattack_state import Result, State, fingerprint
from sparse_adv.attacks.autoattack_versions import MEMBERS, VERSIONS, Settings, Versioned, with_enough_classes
from sparse_adv.attacks.ball import Ball, checked_ball, into_ball
from sparse_adv.attacks.base import Attack, as_device
from sparse_adv.attacks.checks import (
    Model,
    as_module,
    check_batch,
    check_images,
    check_label_range,
    check_labels,
    int64_labels,
    is_correct,
)
from sparse_adv.attacks.gradient_masking import signs_of_masking
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.square import check_has_squares
from sparse_adv.engine import input_gradients
from sparse_adv.files import check_writable
from sparse_adv.ops.arguments import check_flags
from sparse_adv.ops.random_start import as_philox_state


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
        right = [is_correct(self.get_logits(x), y).sum() for x, y in self._batches(x_orig, y_orig, bs)]
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
        known = self._identity(names, images, labels)
        state = State.read(path, known) if path is not None and path.exists() else None
        seed = state.seed if state else int(as_philox_state(None)[0]) if self.seed is None else self.seed
        first, truth = (tensor[:batch].to(self.device) for tensor in (images, labels))
        logits = self.get_logits(first)
        classes = with_enough_classes(names, logits.shape[1])
        check_label_range(label_range, classes)
        budgets = "; ".join(f"{name} ({MEMBERS[name].budget(self.settings, classes)})" for name in names)
        self._log(
            f"{title}: {budgets}; {self.ball.norm}, eps {self.ball.eps_in_words}, {len(images)} images, seed {seed}"
        )
        ball = self.ball.of(torch.arange(len(first), device="cpu"))._asdict()
        signs = signs_of_masking(self.model, first, truth, **ball)
        if path is not None and state is not None and not any("between two calls" in sign for sign in signs):
            state.check_logits(logits, path)
        if self.version == "rand":
            signs = [sign for sign in signs if "between two calls" not in sign]
        for sign in signs:
            self._log(f"warning: {sign}")
        if state is None:
            logits = torch.cat([self.get_logits(x).cpu() for x, _ in self._batches(images, labels, batch)])
            state = State.initial(known, seed, images, labels, logits)
        else:
            done = ", ".join(name for name in state.accuracy if name != "clean") or "no attack"
            self._log(f"continued from {path}: {done} finished")
        self._log(f"clean accuracy {state.accuracy['clean']:.2%}")
        for name in names:
            if name not in state.accuracy:
                self._attack(name, state, images, labels, batch, path)
        before = list(state.accuracy)[-2]
        if names[-1] == "square" and before != "clean" and state.accuracy["square"] < state.accuracy[before]:
            signs.append("square, which needs no gradients, found examples where the gradient attacks found none")
            self._log(f"warning: {signs[-1]}")
        return state.result(title, budgets, signs)

    def _attack(self, name: str, state: State, images: Tensor, labels: Tensor, batch: int, path: Path | None) -> None:
        """Run one attack on the images that are still robust, batch by batch, and save the state after each."""
        start, before = time.perf_counter(), int(state.robust.sum())
        if not state.pending.any():
            state.pending = state.robust.clone()
            state.unconfirmed[name] = 0
        while state.pending.any():
            began = time.perf_counter()
            index = state.pending.nonzero().squeeze(1)[:batch]
            # A generator for each batch and attack, so that an interrupted run draws the same numbers again.
            own_seed = state.seed * 1_000_003 + zlib.crc32(name.encode()) + int(index[0])
            generator = torch.Generator().manual_seed(own_seed % 2**63)
            options = MEMBERS[name].options(self.settings)
            attack, left = partial(MEMBERS[name].attack, self.model, generator=generator, **options), index
            # An unconfirmed example ended the search for its image too early. So the image is attacked again without
            # autocast and engine, because these round differently. With averaged gradients no example ends a search.
            for exact in (False, True):
                if not len(left):
                    break
                x, y, ball = images[left].to(self.device), labels[left].to(self.device), self.ball.of(left)
                with torch.autocast(x.device.type, enabled=False) if exact else nullcontext():
                    adv = attack(x, y, **ball._asdict(), engine=self.engine and not exact)
                found, fallen, predictions, claimed = self._verified(adv, x, y, ball.on(x))
                state.adversarial[left[fallen]] = found[fallen]
                state.predictions[left[fallen]] = predictions[fallen]
                state.robust[left[fallen]] = False
                left = left[claimed & ~fallen] if options.get("eot_iter", 1) == 1 else left[:0]
                state.unconfirmed[name] += len(left) if not exact else 0
            state.pending[index] = False
            state.seconds += time.perf_counter() - began
            if path is not None and state.pending.any():
                state.write_if_due(path)
        state.accuracy[name] = state.robust.double().mean().item()
        if path is not None:
            state.write(path)
        self._log(
            f"after {name}: robust accuracy {state.accuracy[name]:.2%} ({int(state.robust.sum())} of {before} still "
            f"robust; {state.unconfirmed[name]} examples unconfirmed in float32; {time.perf_counter() - start:.1f} s)"
        )

    def _verified(self, adv: Tensor, x: Tensor, y: Tensor, ball: Ball) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The examples, moved into the ball; whether the model misclassifies each; its classes; and what the search
        claimed.

        All are on the CPU.
        """
        with (
            torch.no_grad(),
            in_mode(self.module, "eval") as model,
            input_gradients(model, adv, self.engine) as searched,
        ):
            claimed = ~is_correct(searched.logits(adv), y)
        inside = into_ball(adv, x, ball)
        logits = self.get_logits(inside)
        fallen = ~is_correct(logits, y) & inside.isfinite().flatten(1).all(1)
        return inside.cpu(), fallen.cpu(), logits.argmax(1).cpu(), claimed.cpu()

    @torch.no_grad()
    def get_logits(self, x: Tensor) -> Tensor:
        """What the model itself returns, without engine and autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return super().get_logits(x)

    def _batches(self, images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(images.split(int(size)), labels.split(int(size)), strict=True):
            yield x.to(self.device), y.to(self.device)

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
