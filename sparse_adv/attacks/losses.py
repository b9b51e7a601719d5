"""The losses that attacks maximise, by name: functions (logits [N, classes], labels [N]) -> loss of each image [N]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.attacks.geometry import divisor
from sparse_adv.ops.arguments import check_floating, check_number, check_tensors

Loss = Callable[[Tensor, Tensor], Tensor]
"""loss(logits, labels) -> the loss of the batch (a scalar) or of each image [N]."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy log(sum_i exp(z_i)) - z_y of each image.

    Args:
        logits: float tensor z [N, classes].
        labels: int64 tensor y [N].

    Returns:
        float tensor [N].

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks" (ICLR 2018), section 2.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    _check_logits("cross_entropy", logits, 1, labels=labels)
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True, eq=False)
class SmoothedCrossEntropy:
    """The cross-entropy of each image [N] with smoothed labels: a part of each is spread evenly over all classes.

    Args:
        label_smoothing: that part, in [0, 1].

    Source: Szegedy et al., "Rethinking the Inception architecture for computer vision" (CVPR 2016), section 7.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.SmoothedCrossEntropy(0.5)(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([0]))
        tensor([1.0908])
    """

    label_smoothing: float

    def __post_init__(self) -> None:
        check_number("label_smoothing", self.label_smoothing)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {self.label_smoothing}")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin max_{i != y} z_i - z_y of each image: positive where the image is misclassified.

    Args:
        logits: float tensor z [N, classes], of at least 2 classes.
        labels: int64 tensor y [N].

    Returns:
        float tensor [N].

    Raises:
        ValueError: if there are fewer than 2 classes.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks" (S&P 2017), section V.A, f_6.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.margin(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-1.])
    """
    _check_logits("margin", logits, 2, labels=labels)
    return _highest_wrong(logits, labels) - _of_class(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The difference of logits ratio, (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), of each image.

    z_(k) is the k-th highest logit. The loss depends neither on a shift nor on a positive scale of the logits. The
    denominator is at least 1e-12 (6e-5 in float16), so that equal logits give 0. If so many classes are masked by -inf
    that it is not finite, it is 1: the loss is the margin.

    Args:
        logits: float tensor z [N, classes], of at least 3 classes.
        labels: int64 tensor y [N].

    Returns:
        float tensor [N], in [-1, 1] except for margins.

    Raises:
        ValueError: if there are fewer than 3 classes.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (ICML 2020), equation 6.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.dlr(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])
    """
    _check_logits("dlr", logits, 3, labels=labels)
    highest = logits.topk(3, dim=1).values
    return margin(logits, labels) / _scale(highest[:, 0] - highest[:, 2])


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), of each image.

    z_(k) is the k-th highest logit; an attack maximises the loss. The denominator is bounded as in `dlr`.

    Args:
        logits: float tensor z [N, classes], of at least 4 classes.
        labels: int64 tensor y [N], the true classes.
        targets: int64 tensor t [N], the classes to reach.

    Returns:
        float tensor [N].

    Raises:
        ValueError: if there are fewer than 4 classes.

    Source: Croce and Hein (ICML 2020), as for `dlr`, equation 7.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.targeted_dlr(torch.tensor([[4.0, 2.0, 1.0, 1.0]]), torch.tensor([0]), torch.tensor([1]))
        tensor([-0.6667])
    """
    _check_logits("targeted_dlr", logits, 4, labels=labels, targets=targets)
    highest = logits.topk(4, dim=1).values
    scale = highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2
    return (_of_class(logits, targets) - _of_class(logits, labels)) / _scale(scale)


def kl_divergence(logits: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(q || p) of each image [N], with p = softmax(logits) and log q given; a class with q = 0 adds nothing.

    With this loss the attack loop passes the model's log-probabilities of the clean images instead of labels.

    Args:
        logits: float tensor [N, classes], of the adversarial images.
        log_probabilities: float tensor [N, classes], log q.

    Returns:
        float tensor [N].

    Source: the second term of TRADES, Zhang et al. (ICML 2019), algorithm 1.

    Examples:
        >>> import torch
        >>> from sparse_adv.attacks import losses
        >>> losses.kl_divergence(torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]).log())
        tensor([0.])
    """
    _check_logits("kl_divergence", logits, 1)
    check_floating("log_probabilities", log_probabilities)
    if log_probabilities.shape != logits.shape:
        shapes = f"{list(logits.shape)}, got {list(log_probabilities.shape)}"
        raise ValueError(f"log_probabilities must have the shape of the logits, {shapes}")
    # `F.kl_div` is NaN if a class is masked by -inf in both.
    apart = (log_probabilities - F.log_softmax(logits, 1)).masked_fill(log_probabilities == -torch.inf, 0)
    return (log_probabilities.exp() * apart).sum(1)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}
"""The losses that can be chosen by name."""


def takes_classes(loss: str | Loss) -> bool:
    """Return whether the labels of a loss are known to be classes; labels for the caller's own function may be
    anything.

    Args:
        loss: a name of `LOSSES`, or a function (logits, labels) -> loss.

    Examples:
        >>> from sparse_adv.attacks import losses
        >>> losses.takes_classes("ce"), losses.takes_classes(lambda logits, labels: logits.sum(1))
        (True, False)
    """
    return isinstance(loss, str | SmoothedCrossEntropy)


def loss_function(loss: str | Loss) -> Loss:
    """Return the loss of a name, or the callable itself.

    Args:
        loss: a name of `LOSSES`, or a function (logits, labels) -> loss.

    Raises:
        ValueError: if it is neither.

    Examples:
        >>> from sparse_adv.attacks import losses
        >>> losses.loss_function("margin") is losses.margin
        True
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        names = ", ".join(f'"{name}"' for name in LOSSES)
        raise ValueError(f"loss must be {names} or a callable, got {shortened(loss)}")
    return LOSSES[loss]


def loss_values(loss: str | Loss, logits: Tensor, labels: Any, images: int, of_each: bool = False) -> Tensor:
    """Return the values of a loss: one number for each image, [N] or [N, 1], or one number for all.

    Args:
        loss: a name of `LOSSES`, or a function (logits, labels) -> loss.
        logits, labels: its arguments; labels for the caller's own function may be anything.
        images: the number of images N.
        of_each: whether only shape [N] is accepted.

    Raises:
        TypeError: if the loss does not return a tensor.
        ValueError: if the tensor has another shape.
    """
    values = loss_function(loss)(logits, labels)
    if not isinstance(values, Tensor):
        raise TypeError(f"loss must return a tensor, got {shortened(values)}")
    others = not of_each and (values.numel() == 1 or values.shape == (images, 1))
    if not others and values.shape != (images,):
        raise ValueError(f"loss must return one number for each image, [{images}], got {list(values.shape)}")
    return values


def _scale(difference: Tensor) -> Tensor:
    """The denominator of a ratio of logits, see `dlr`."""
    return divisor(difference.where(difference.isfinite(), 1))


def _of_class(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _highest_wrong(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -float("inf")).amax(1)


def _check_logits(name: str, logits: Tensor, least: int, **classes: Tensor) -> None:
    """Raise TypeError or ValueError unless these are logits of enough classes, and one class for each image."""
    check_floating("logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, classes], got shape {tuple(logits.shape)}")
    for which, of_images in classes.items():
        check_tensors(**{which: of_images})
        if of_images.dtype != torch.int64 or of_images.shape != logits.shape[:1]:
            raise ValueError(
                f"{which} must be an int64 tensor [{len(logits)}], got {of_images.dtype} {list(of_images.shape)}"
            )
    if logits.shape[1] < least:
        raise ValueError(f"the loss {name} needs logits of at least {least} classes, got {logits.shape[1]}")


def loss_to_raise(
    loss: str | Loss, labels: Tensor, targeted: bool, of_each: bool = False
) -> Callable[[Tensor], Tensor]:
    """The function of the logits that an attack raises: `loss_values`, or their negative if targeted."""
    sign = -1 if targeted else 1
    return lambda logits: sign * loss_values(loss, logits, labels, len(labels), of_each)
