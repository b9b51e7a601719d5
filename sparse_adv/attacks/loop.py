"""The loop of PGD, and of the attacks that are PGD with settings of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv.argument_types import shortened
from sparse_adv.attacks import movement
from sparse_adv.attacks.ball import check_shapes, into_ball, step_sizes
from sparse_adv.attacks.checks import (
    LabelRange,
    Model,
    as_module,
    check_batch,
    check_images,
    check_label_range,
    check_labels,
    count_classes,
    int64_labels,
    is_adversarial,
)
from sparse_adv.attacks.geometry import per_image
from sparse_adv.attacks.gradients import BatchGradients, batch_gradients
from sparse_adv.attacks.losses import kl_divergence, loss_values, takes_classes
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.options import AttackOptions
from sparse_adv.attacks.zero_gradients import is_telling, warn_if_zero
from sparse_adv.ops.random_start import as_philox_state


def run_attack(model: Model, images: Tensor, labels: Any, options: AttackOptions) -> Tensor:
    """Run the attack that the options describe: PGD, or one that is PGD with settings of its own.

    Args:
        model: a module that maps images to logits [N, classes], or a plain function, which autograd differentiates.
        images: float tensor [N, ...].
        labels: integer tensor [N]; with a callable loss, whatever it takes.
        options: the settings of the attack.

    Returns:
        The adversarial images, detached.

    Raises:
        TypeError, ValueError: as in `attacks.pgd`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> options = attacks.AttackOptions(eps=0.1, alpha=0.02, steps=3, start_eps=0.01)
        >>> adv = attacks.run_attack(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), options)
        >>> adv.shape
        torch.Size([2, 1, 8, 8])
    """
    if not isinstance(options, AttackOptions):
        raise TypeError(f"options must be attacks.AttackOptions, got {shortened(options)}")
    module, traceable = as_module(model)
    labels = int64_labels(labels)
    label_range, with_labels = None, takes_classes(options.loss)
    check_images(images)
    check_shapes(images, eps=options.eps, alpha=options.alpha, lo=options.lo, hi=options.hi)
    if options.check:
        label_range = check_batch(images, labels, with_labels, options.lo, options.hi)
    elif with_labels:
        check_labels(images, labels)
    # Tensors made in inference mode could not be written to later; a CUDA graph does that in every replay.
    with torch.inference_mode(False):
        philox_state = None
        if options.random_start:
            # With non_blocking=False the host would wait until the GPU has finished all earlier work.
            on_gpu = images.device.type == "cuda"
            # A copy, because the loop advances the offset.
            philox_state = as_philox_state(options.generator, "generator").to(
                images.device, non_blocking=on_gpu, copy=True
            )
        if not len(images):
            return images.detach().clone()
        loop = PGDLoop(module, options if traceable else replace(options, engine=False))
        if options.graphs is None or options.varies:  # the tensors' values are no part of a graph's key
            adv = loop.run(images, labels, philox_state, label_range)
        else:
            adv = options.graphs.run(loop, images, labels, philox_state, label_range)
        if options.check and options.project:
            adv = into_ball(adv, images.detach(), options.ball.on(images))
        return adv


@dataclass(eq=False)
class PGDLoop:
    """The loop of an attack on a model. It never synchronises with a GPU, so that a CUDA graph can capture it."""

    model: nn.Module
    options: AttackOptions
    classes: int | None = None
    """Number of classes of the model; known after a run with a label range."""

    def run(self, images: Tensor, labels: Any, philox_state: Tensor | None, label_range: LabelRange = None) -> Tensor:
        """Attack a batch; with restarts, return for each image a success, or else the result with the highest loss.

        Args:
            images: float tensor [N, ...], the clean images.
            labels: second argument of the loss.
            philox_state: int64 tensor [2] on the device of the images, key and offset of the random start's generator.
                The offset is advanced in place past the numbers read, so that each restart, and each replay of a CUDA
                graph, reads new ones.
            label_range: range of the labels, which is compared with the number of the model's classes.
        """
        options = self.options
        with (
            torch.inference_mode(False),
            in_mode(self.model, options.bn_mode) as model,
            batch_gradients(model, images, options.engine) as gradients,
        ):
            if options.loss is kl_divergence:
                logits = gradients.logits(images)
                count_classes(logits, len(images))
                labels = F.log_softmax(logits, 1)
            elif isinstance(labels, Tensor) and labels.is_inference():
                labels = labels.clone()
            best = self._attack(gradients, images, labels, philox_state, label_range)
            if options.restarts == 1:
                return best
            best_loss, won = self._outcome(gradients, best, labels)
            for _ in range(options.restarts - 1):
                # Only the images without a success are attacked again, from the starts that they would have anyway.
                compacts = self._compacts(images) and options.graphs is None and won.any()
                index = (~won).nonzero().squeeze(1) if compacts else None
                if index is not None and not len(index):
                    break
                own = labels if index is None else labels[index]
                adv = self._attack(gradients, images, labels, philox_state, None, index)
                loss, fooled = self._outcome(gradients, adv, own)
                if index is not None:
                    adv = best.clone().index_copy_(0, index, adv)  # in the memory format of `best`
                    loss = best_loss.index_copy(0, index, loss)
                    fooled = won.index_copy(0, index, fooled)
                better = ~won & (fooled | (loss > best_loss))
                best = adv.where(per_image(better, images), best)
                best_loss, won = loss.where(better, best_loss), won | fooled
        return best

    def _attack(
        self,
        gradients: BatchGradients,
        images: Tensor,
        labels: Any,
        philox_state: Tensor | None,
        label_range: LabelRange,
        index: Tensor | None = None,
    ) -> Tensor:
        """One start and all steps, of the images at `index` alone if it is given."""
        options = self.options
        fooled: Tensor | None = None

        def loss(logits: Tensor) -> Tensor:
            nonlocal label_range, fooled
            if takes_classes(options.loss):
                self.classes = count_classes(logits, len(images))
                check_label_range(label_range, self.classes)
                label_range = None
            if options.early_stop:
                fooled = self._is_fooled(logits, labels)
            return self._loss(logits, labels, len(images))

        adv = self._start(images, philox_state)
        ball, alpha = options.ball.on(images), step_sizes(images, options.alpha)
        if index is not None:
            adv, images, labels, ball = adv[index], images[index], labels[index], ball.of(index)
            alpha = alpha[index] if isinstance(alpha, Tensor) else alpha
        result = adv.clone() if options.early_stop else adv
        robust = torch.arange(len(images), device=images.device)
        compacts = options.early_stop and self._compacts(images)
        captures = options.graphs is not None and options.graphs.cache.captures_on(images.device)
        # While a graph is captured, no value can be read.
        telling = index is None and not captures and is_telling(options.loss, options.targeted)
        for step in range(options.steps):
            grad = gradients.gradient(adv, loss)
            if step == 0 and telling:
                warn_if_zero(self.model, grad)
            if compacts and fooled is not None and fooled.any():
                result[robust[fooled]] = adv[fooled]
                robust, adv, grad, images, labels = (t[~fooled] for t in (robust, adv, grad, images, labels))
                if not len(adv):
                    return result
                ball, alpha = ball.of(~fooled), alpha[~fooled] if isinstance(alpha, Tensor) else alpha
                fooled = None
            moved = movement.step(adv, grad, images, alpha, ball)
            adv = moved if fooled is None else adv.where(per_image(fooled, images), moved)
        if len(adv) == len(result):
            return adv
        result[robust] = adv
        return result

    def _compacts(self, images: Tensor) -> bool:
        """Whether images that need no more steps leave the batch.

        On a GPU the host would wait for their count, and batch statistics would change without them.
        """
        return images.device.type == "cpu" and self.options.bn_mode == "eval"

    def _start(self, images: Tensor, philox_state: Tensor | None) -> Tensor:
        if self.options.start is None or philox_state is None:
            return images.detach().clone()
        adv = movement.start(images, self.options.start.on(images), philox_state)
        movement.advance(philox_state, images)
        return adv

    def _loss(self, logits: Tensor, labels: Any, images: int) -> Tensor:
        """The loss to maximise, a scalar or one number per image: the negative loss if targeted."""
        value = loss_values(self.options.loss, logits, labels, images)
        return -value if self.options.targeted else value

    def _is_fooled(self, logits: Tensor, labels: Any) -> Tensor:
        """Whether each image is a success, bool [N]; false if the labels are not classes."""
        if not (isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.shape == logits.shape[:1]):
            return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        return is_adversarial(logits, labels, self.options.targeted)

    @torch.no_grad()
    def _outcome(self, gradients: BatchGradients, adv: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
        """The loss of each image and whether it is a success, both [N]."""
        logits = gradients.logits(adv)
        loss = self._loss(logits, labels, len(adv))
        if loss.shape != logits.shape[:1]:
            of_images = isinstance(labels, Tensor) and labels.shape[:1] == logits.shape[:1]
            rows = labels.split(1) if of_images else [labels] * len(logits)
            loss = torch.cat([self._loss(z, row, 1).view(1) for z, row in zip(logits.split(1), rows, strict=True)])
        return loss, self._is_fooled(logits, labels)
