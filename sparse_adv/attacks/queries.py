"""Runs the searches of attacks on the host, and answers their queries of the model: logits and gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_adv.attacks.as_module import Model, as_module
from sparse_adv.attacks.ball import Values
from sparse_adv.attacks.checks import (
    LabelRange,
    check_batch,
    check_images,
    check_label_range,
    check_labels,
    count_classes,
    int64_labels,
)
from sparse_adv.attacks.gradients import BatchGradients, batch_gradients
from sparse_adv.attacks.modes import in_mode
from sparse_adv.engine.gradients import LossOfLogits, image_gradient
from sparse_adv.nn import frozen_weights
from sparse_adv.ops.arguments import check_flags

_UNITS_OF_ROUNDING = 100
"""A margin exceeds rounding if it is more than this many units in the last place of the largest absolute logit."""


class Queries:
    """The logits and input gradients of a model in eval mode, for any part of a batch, with the labels checked once.

    16-bit logits are returned in float32, and losses are computed from them in float32, because searches compare their
    differences.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: BatchGradients,
        label_range: LabelRange,
        attacked: nn.Module,
    ) -> None:
        self._model, self._gradients, self._label_range = model, gradients, label_range
        self.attacked = attacked
        """The caller's model; a twin may run in its place."""
        self.unit = 0.0
        """A unit in the last place of the model's logits, as a share of the largest; 0 before the first query."""

    def logits(self, x: Tensor) -> Tensor:
        """The logits [N, classes] of images [N, ...]."""
        return self._checked(self._gradients.logits(x), len(x))

    def own_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits that the model itself returns, without the engine, and a bound on their rounding [N]."""
        with torch.no_grad():
            logits = self._checked(self._model(x), len(x))
        return logits, _UNITS_OF_ROUNDING * self.unit * largest_logit(logits)

    def gradient(self, x: Tensor, loss: LossOfLogits) -> Tensor:
        """The gradient of loss(logits), summed over the images, with respect to the images; 0 where it is not finite.

        So, as in PGD, a pixel without a finite gradient does not stop the attack on its image.
        """
        return _finite(self._gradients.gradient(x, lambda logits: loss(self._checked(logits, len(x)))))

    def values_and_gradient(self, x: Tensor, function: LossOfLogits) -> tuple[Tensor, Tensor]:
        """The values function(logits) [N], and the gradient of their sum with respect to the images, as `gradient`."""
        values: list[Tensor] = []

        def recorded(logits: Tensor) -> Tensor:
            value = function(self._checked(logits, len(x)))
            values.append(value.detach())
            return value

        gradient = self._gradients.gradient(x, recorded)
        return values[0], _finite(gradient)

    def logits_and_gradients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits [N, classes] and the gradient [N, classes, ...] of each: one pass forward, `classes` backward."""
        with torch.enable_grad(), frozen_weights(self._model):
            x = x.detach().requires_grad_()
            logits = self._checked(self._model(x), len(x))
            classes = logits.shape[1]
            gradients = [image_gradient(logits[:, k].sum(), x, retain_graph=k + 1 < classes) for k in range(classes)]
        return logits.detach(), torch.stack(gradients, 1)

    def _checked(self, logits: Tensor, images: int) -> Tensor:
        if self._label_range is not None:
            check_label_range(self._label_range, count_classes(logits, images))
            self._label_range = None
        self.unit = torch.finfo(logits.dtype).eps
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


Search = Callable[[Queries, Tensor, Tensor], Tensor]
"""search(queries, images, labels) -> the adversarial images."""


def run_search(
    search: Search, model: Model, images: Tensor, labels: Tensor, lo: Values, hi: Values, check: bool, engine: bool
) -> Tensor:
    """Check a batch and run a search on it with the model in eval mode; the model is left as it was.

    Args:
        search: finds the adversarial images; it is not called for an empty batch.
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...].
        labels: int64 tensor [N].
        lo, hi: range of pixel values, numbers or tensors [C].
        check: whether to check the values of images and labels.
        engine: whether the engine may compute logits and gradients.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`.

    Raises:
        TypeError, ValueError: as in `attacks.pgd`.
    """
    check_flags(check=check, engine=engine)
    module, traceable = as_module(model)
    labels = int64_labels(labels)
    check_images(images)
    check_labels(images, labels)
    label_range = check_batch(images, labels, lo=lo, hi=hi) if check else None
    # Autograd cannot use tensors made in inference mode, so both are copied outside of that mode.
    with torch.inference_mode(False), torch.no_grad(), in_mode(module, "eval") as model:
        images, labels = images.clone(), labels.clone()
        if not len(images):
            return images
        with batch_gradients(model, images, engine and traceable) as gradients, torch.no_grad():
            queries = Queries(model, gradients, label_range, attacked=module)
            return torch.empty_like(images).copy_(search(queries, images, labels))


def largest_logit(logits: Tensor) -> Tensor:
    """The largest absolute logit of each image [N], among the classes whose softmax probability is above 0.

    The others are often masked by -inf or a large negative number, and that says nothing about rounding.
    """
    return logits.abs().where(logits.softmax(1) > 0, 0).amax(1)


def _finite(gradient: Tensor) -> Tensor:
    return gradient.nan_to_num(0.0, 0.0, 0.0)
