"""`run_attack`: checks a batch, and runs PGD, or an attack that is PGD with settings of its own, on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import check_shapes, into_ball
from sparse_adv.attacks.captured import run_captured
from sparse_adv.attacks.checks import check_batch, check_images, check_labels, int64_labels
from sparse_adv.attacks.loop import PGDLoop
from sparse_adv.attacks.losses import takes_classes
from sparse_adv.attacks.options import AttackOptions
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
            adv = run_captured(options.graphs, loop, images, labels, philox_state, label_range)
        if options.check and options.project:
            adv = into_ball(adv, images.detach(), options.ball.on(images))
        return adv
