"""The loop of PGD, and of the attacks that are PGD with settings of their own, on checked arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv.attacks import movement
from sparse_adv.attacks.ball import step_sizes
from sparse_adv.attacks.checks import LabelRange, check_label_range, count_classes
from sparse_adv.attacks.geometry import per_image
from sparse_adv.attacks.gradients import BatchGradients, batch_gradients
from sparse_adv.attacks.losses import kl_divergence, loss_values, takes_classes
from sparse_adv.attacks.modes import in_mode
from sparse_adv.attacks.options import AttackOptions
from sparse_adv.attacks.success import is_adversarial
from sparse_adv.attacks.zero_gradients import warn_if_zero, zero_is_suspicious


@dataclass(eq=False)
class PGDLoop:
    """The loop of an attack on a model. It never synchronises with a GPU, so that a CUDA graph can capture it."""

    model: nn.Module
    options: AttackOptions
    classes: int | None = None
    """Number of classes of the model; known after a run with a label range."""

    def run(self, images: Tensor, labels: Any, philox_state: Tensor | None, label_range: LabelRange = None) -> Tensor:
        """Attack a batch; with restarts, return for each image a success, else the result with the highest loss.

        Args:
            images: float tensor [N, ...], the clean images.
            labels: second argument of the loss.
            philox_state: int64 tensor [2] on the device of the images: key and offset of the random start's generator.
                The offset is advanced in place past the numbers read, so that each restart and each replay of a CUDA
                graph reads new numbers.
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
                # Attack only the images without a success again, from the same starts as in the whole batch.
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
        """One start and all steps; only for the images at `index` if it is given."""
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
        # No value can be read while a graph is captured.
        warns_of_zero = index is None and not captures and zero_is_suspicious(options.loss, options.targeted)
        for step in range(options.steps):
            grad = gradients.gradient(adv, loss)
            if step == 0 and warns_of_zero:
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

        Not on a GPU, where the host would wait for their count, and not if batch statistics would change without them.
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
