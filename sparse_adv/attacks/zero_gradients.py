"""A warning about a model whose gradient moves no image: it looks robust, but was not really attacked."""

from __future__ import annotations

import logging
from weakref import WeakSet

from torch import Tensor, nn

from sparse_adv.attacks.as_module import PlainFunction
from sparse_adv.attacks.checks import reads_at_once
from sparse_adv.attacks.losses import Loss, SmoothedCrossEntropy, cross_entropy, margin

log = logging.getLogger(__name__)

_warned: WeakSet[object] = WeakSet()
"""The models that were warned of; functions are kept by their code, other callables by their class."""


def zero_is_suspicious(loss: str | Loss, targeted: bool) -> bool:
    """Return whether a gradient of 0 shows that the attack cannot work, rather than that it has nothing left to gain.

    The gradient of "dlr" is also 0 for images whose label has the third highest logit. The gradient of the caller's own
    function may be 0 for all misclassified images, and with a target it is 0 where softmax has reached the target.
    """
    return not targeted and (isinstance(loss, SmoothedCrossEntropy) or loss in ("ce", "margin", cross_entropy, margin))


def warn_if_zero(model: nn.Module, gradient: Tensor) -> None:
    """Log a warning, once for each model, if the gradient is 0 for all images of a batch.

    On a GPU the gradient is not read: the host would wait for it, and a CUDA graph does not allow that.

    Args:
        model: the model under attack, or the module around a function, see `as_module`.
        gradient: float tensor [N, ...], where the attack starts.
    """
    if not reads_at_once(gradient.device) or not len(gradient) or gradient[0].any() or gradient.any():
        return
    model_or_code: object = model
    if isinstance(model, PlainFunction):
        # A lambda inside a loop is a new function in each turn, with the same code.
        model_or_code = getattr(model.function[0], "__code__", type(model.function[0]))
    if model_or_code not in _warned:
        _warned.add(model_or_code)
        log.warning(
            "the gradient of the loss is 0 for all images of a batch: the attack cannot move them, and they look "
            "robust. Either no path of weights is left from the images to the logits (leave small layers out of the "
            'masks), or the logits are so far apart that softmax is exactly 0 and 1 (take loss="margin")'
        )
