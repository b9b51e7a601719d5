"""Auto-PGD: projected gradient ascent with momentum whose step size follows the progress of each image."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.apgd_ascent import AscentSettings, Attacker
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import ball_around
from sparse_adv.attacks.host_attack import SeededAttack, count_setting
from sparse_adv.attacks.losses import Loss, loss_function, loss_to_raise, takes_classes, targeted_dlr
from sparse_adv.attacks.options import BasicOptions
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.attacks.zero_gradients import zero_is_suspicious
from sparse_adv.ops.arguments import check_flag


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor = 8 / 255,
    steps: int = 100,
    restarts: int = 1,
    loss: str | Loss = "ce",
    targeted: bool = False,
    rho: float = 0.75,
    eot_iter: int = 1,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """Auto-PGD: gradient ascent with momentum that halves the step size of an image when it makes no progress.

    With P the projection onto the ball and d the direction of the gradient, sign(g) for linf and g / |g| for l2::

        z = P(x_k + step * d_k)
        x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    The step starts at 2 eps. Checkpoints are ceil(p_j steps) with p = 0, 0.22, then p_{j+1} = p_j + max(p_j - p_{j-1} -
    0.03, 0.06). There the step is halved, and the ascent goes on from the point of highest loss, if the loss rose in
    fewer than rho of the steps since the last checkpoint, or if neither the step nor the highest loss has changed since
    then. This is the paper's rule. The authors' code differs in three details: it also halves if the loss rose in
    exactly rho of the steps, it compares the first loss with 0 instead of the loss at the start, and it applies the
    second condition only from the second checkpoint on.

    Args:
        model: maps images in [lo, hi] to logits [N, classes]; a module, or a plain function, which autograd
            differentiates.
        images: float tensor [N, ...], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        norm: "linf" or "l2", also written "Linf" or "L2".
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        steps: number of steps; each is one forward and one backward pass of the images that are still robust.
        restarts: number of random starts; a restart attacks the images that are still robust.
        loss: "ce", "dlr", "margin", see `attacks.losses`, or a function (logits, labels) -> loss of each image [N].
        targeted: minimise the loss instead of maximising it.
        rho: fraction of the steps that must raise the loss, in [0, 1].
        eot_iter: number of gradients averaged for each step, for models that draw random numbers. With more than one, a
            single misclassification may be chance, so every image is attacked in all steps and restarts.
        generator: one number is drawn from it; None for PyTorch's global generator.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels; on a GPU this synchronises once.
        engine: whether the engine may compute the gradients, see `sparse_adv.engine`.

    Returns:
        For each image the first adversarial example found, else the point of highest loss; images that are
        misclassified without an attack are returned unchanged. With eot_iter > 1: the point with the largest number of
        misclassifying passes, of its eot_iter passes; among equals the latest. Detached, with shape, dtype and memory
        format of `images`, in the ball and in [lo, hi] without slack.

    Raises:
        TypeError, ValueError: as in `attacks.pgd`, and if steps, restarts, rho or eot_iter is out of range, or the
            model has fewer classes than the named loss needs, 3 for "dlr".

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (ICML 2020), algorithm 1.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.apgd(model, images, labels, eps=0.1, steps=10, loss="dlr")
        >>> bool((adv - images).abs().max() <= 0.1)
        True
    """
    check_flag("targeted", targeted)
    loss_function(loss)
    ball, suspicious = ball_around(images, eps, norm, lo, hi), zero_is_suspicious(loss, targeted)
    settings = AscentSettings(ball, steps, rho, eot_iter, targeted, suspicious)
    check_count("restarts", restarts, least=1)

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        return loss_to_raise(loss, labels, targeted, of_each=True)(logits)

    def search(queries: Queries, images: Tensor, labels: Tensor) -> Tensor:
        attacker = Attacker(queries, images, labels, settings, generator)
        if takes_classes(loss):
            objective(attacker.logits, labels)  # raises if there are too few classes, even if no image is robust
        for _ in range(restarts):
            attacker.ascend(objective)
        return attacker.result

    return run_search(search, model, images, labels, lo, hi, check, engine)


def apgd_t(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor = 8 / 255,
    steps: int = 100,
    restarts: int = 1,
    n_target_classes: int = 9,
    rho: float = 0.75,
    eot_iter: int = 1,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """Auto-PGD on the targeted DLR loss, once for each of the nearest wrong classes of the clean image.

    Any misclassification counts as a success, not only one as the target.

    Args:
        labels: integer tensor [N], the true classes.
        n_target_classes: number of wrong classes to try, those with the highest logits at the clean image first; all of
            them if there are fewer.
        model, images, norm, eps, steps, restarts, rho, eot_iter, generator, lo, hi, check, engine: as in `apgd`.

    Returns:
        As in `apgd`.

    Raises:
        TypeError, ValueError: as in `apgd`, and if n_target_classes is less than 1 or the model has fewer than 4
            classes.

    Source: Croce and Hein (ICML 2020), as for `apgd`, section 4.2 and equation 7.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> attacks.apgd_t(model, images, labels, eps=0.1, steps=5, n_target_classes=3).shape
        torch.Size([4, 1, 8, 8])
    """
    settings = AscentSettings(ball_around(images, eps, norm, lo, hi), steps, rho, eot_iter, False)
    check_count("restarts", restarts, least=1)
    check_count("n_target_classes", n_target_classes, least=1)

    def search(queries: Queries, images: Tensor, labels: Tensor) -> Tensor:
        attacker = Attacker(queries, images, labels, settings, generator)
        targeted_dlr(attacker.logits, labels, labels)  # raises if there are too few classes, as above
        for _ in range(restarts):
            for rank in range(min(n_target_classes, attacker.wrong_classes.shape[1])):
                attacker.ascend(targeted_dlr, rank)
        return attacker.result

    return run_search(search, model, images, labels, lo, hi, check, engine)


class APGD(SeededAttack):
    """`attacks.apgd` bound to a model, with the interface and the defaults of torchattacks.APGD.

    Args:
        model, norm, eps, steps, loss, eot_iter, rho: as in `attacks.apgd`.
        n_restarts: number of random starts.
        seed: of the random starts; each call draws the same ones.
        verbose: accepted, and without effect.

    Raises:
        TypeError, ValueError: if n_restarts is out of range; when called, as `attacks.apgd`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGD(models.build("digits_cnn", width=8), eps=0.1, steps=5, loss="dlr")
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(apgd)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str | Loss = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.loss, self.eot_iter, self.rho = loss, eot_iter, rho


class APGDT(SeededAttack):
    """`attacks.apgd_t` bound to a model, with the interface and the defaults of torchattacks.APGDT.

    Args:
        model, norm, eps, steps, eot_iter, rho: as in `attacks.apgd`.
        n_restarts, seed, verbose: as in `APGD`.
        n_classes: number of classes; all wrong ones are targets.

    Raises:
        TypeError, ValueError: if n_restarts or n_classes is out of range; when called, as `attacks.apgd_t`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGDT(models.build("digits_cnn", width=8), eps=0.1, steps=5)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(apgd_t)
    n_classes = count_setting("n_classes", least=2)
    supports_targets = False

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        n_classes: int = 10,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.eot_iter, self.rho, self.n_classes = eot_iter, rho, n_classes

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"n_target_classes": self.n_classes - 1}
