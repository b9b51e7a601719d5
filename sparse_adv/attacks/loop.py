"""The PGD loop that all attacks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from sparse_adv import ops
from sparse_adv.attacks.checks import LabelRange, check_batch, check_label_range, count_classes
from sparse_adv.attacks.losses import kl_divergence, loss_function
from sparse_adv.attacks.options import AttackOptions
from sparse_adv.engine import InputGradients, input_gradients
from sparse_adv.ops.random_start import seed_words


def run_attack(model: nn.Module, images: Tensor, labels: Any, options: AttackOptions) -> Tensor:
    """Run the attack that the options describe; all other attack functions and classes call this one.

    Args:
        model: maps images to logits [N, classes].
        images: float tensor [N, ...].
        labels: int64 tensor [N]; with a callable loss, whatever it takes.
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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    label_range = None
    if options.check:
        label_range = check_batch(images, labels, not callable(options.loss), options.lo, options.hi)
    # Tensors made in inference mode could not be written to later; a CUDA graph does that in every replay.
    with torch.inference_mode(False):
        philox_state = None
        if options.random_start:
            # With non_blocking=False the host would wait until the GPU has finished all earlier work.
            on_gpu = images.device.type == "cuda"
            philox_state = seed_words(options.generator).to(images.device, non_blocking=on_gpu)
        if not len(images):
            return images.detach().clone()
        if isinstance(model, DistributedDataParallel):
            model = model.module  # the wrapper's forward would prepare an all-reduce that is never run
        loop = PGDLoop(model, options)
        if options.graphs is None:
            return loop.run(images, labels, philox_state, label_range)
        return options.graphs.run(loop, images, labels, philox_state, label_range)


@dataclass(eq=False)
class PGDLoop:
    """The loop of an attack on a model. It never synchronises with a GPU, so that a CUDA graph can capture it."""

    model: nn.Module
    options: AttackOptions
    classes: int | None = None
    """Number of classes of the model; known after a run with a label range."""
    gradients: InputGradients | None = None
    """What formed the gradients of the last run; a CUDA graph of that run uses its memory."""

    def run(self, images: Tensor, labels: Any, philox_state: Tensor | None, label_range: LabelRange = None) -> Tensor:
        """Attack a batch; with restarts, return for each image the result with the highest loss.

        Args:
            images: float tensor [N, ...], the clean images.
            labels: second argument of the loss.
            philox_state: int64 tensor [2] on the device of the images, key and offset of the random start's generator.
                The offset is advanced in place past the numbers read, so that each restart, and each replay of a CUDA
                graph, reads new ones.
            label_range: range of the labels, which is compared with the number of the model's classes.
        """
        options = self.options
        # Autograd cannot use tensors made in inference mode.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            bn_mode(self.model, options.bn_mode),
            input_gradients(self.model, images.detach(), options.engine) as gradients,
        ):
            self.gradients = gradients
            if options.loss is kl_divergence:
                labels = F.log_softmax(gradients.logits(images), 1)
            elif isinstance(labels, Tensor) and labels.is_inference():
                labels = labels.clone()
            best = self._attack(gradients, images, labels, philox_state, label_range)
            if options.restarts == 1:
                return best
            best_loss = self._loss_per_image(gradients, best, labels)
            for _ in range(options.restarts - 1):
                adv = self._attack(gradients, images, labels, philox_state, None)
                loss = self._loss_per_image(gradients, adv, labels)
                better = loss > best_loss
                best = adv.where(better.view(-1, *[1] * (images.dim() - 1)), best)
                best_loss = loss.where(better, best_loss)
        return best

    def _attack(
        self,
        gradients: InputGradients,
        images: Tensor,
        labels: Any,
        philox_state: Tensor | None,
        label_range: LabelRange,
    ) -> Tensor:
        """One start and all steps."""
        options = self.options

        def loss(logits: Tensor) -> Tensor:
            nonlocal label_range
            if label_range is not None:
                self.classes = count_classes(logits, len(images))
                check_label_range(label_range, self.classes)
                label_range = None
            return self._loss(logits, labels)

        adv = self._start(images, philox_state)
        for _ in range(options.steps):
            grad = gradients.gradient(adv, loss)
            adv = ops.pgd_step(adv, grad, images, options.alpha, *options.ball)
        return adv

    def _start(self, images: Tensor, philox_state: Tensor | None) -> Tensor:
        if self.options.start is None or philox_state is None:
            return images.detach().clone()
        eps, norm, lo, hi = self.options.start
        adv = ops.random_start(images, eps, norm, philox_state, lo, hi)
        philox_state[1:].add_((images.numel() + 3) // 4)  # one Philox block gives four numbers
        return adv

    def _loss(self, logits: Tensor, labels: Any) -> Tensor:
        """The loss to maximise, a scalar or one number per image: the negative loss if targeted."""
        value = loss_function(self.options.loss)(logits, labels)
        return -value if self.options.targeted else value

    @torch.no_grad()
    def _loss_per_image(self, gradients: InputGradients, adv: Tensor, labels: Any) -> Tensor:
        logits = gradients.logits(adv)
        loss = self._loss(logits, labels)
        if loss.shape == logits.shape[:1]:
            return loss
        return torch.cat([self._loss(logits[i : i + 1], labels[i : i + 1]).view(1) for i in range(len(logits))])


@contextmanager
def bn_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Put a model in eval mode, except for its BatchNorm layers, and restore all flags at the end.

    Args:
        model: any model.
        mode: mode of BatchNorm layers: "eval" uses the running statistics, "train" the statistics of the batch and
            updates the running ones, "batch" the statistics of the batch without updating the running ones.
    """
    # Flags are saved and set for each module: model.train() at the end would unfreeze layers frozen in eval mode.
    training = [(module, module.training) for module in model.modules()]
    norms = [module for module, _ in training if isinstance(module, _BatchNorm)]
    tracking = [(module, module.track_running_stats) for module in norms]
    try:
        for module, _ in training:
            module.training = mode != "eval" and isinstance(module, _BatchNorm)
        for module in norms if mode == "batch" else ():
            module.track_running_stats = False
        yield
    finally:
        for module, flag in training:
            module.training = flag
        for module, flag in tracking:
            module.track_running_stats = flag
