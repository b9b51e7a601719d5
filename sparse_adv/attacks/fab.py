"""FAB, the fast adaptive boundary attack: steps to the linearised boundary, for the least distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import Ball, ball_around
from sparse_adv.attacks.confirmation import confirmed
from sparse_adv.attacks.generators import private_generator
from sparse_adv.attacks.geometry import distance, divisor, per_image
from sparse_adv.attacks.host_attack import SeededAttack, count_setting
from sparse_adv.attacks.hyperplane import nearest_boundary, onto_hyperplane
from sparse_adv.attacks.options import BasicOptions, FABTOptions, check_names, check_settings
from sparse_adv.attacks.queries import Queries, largest_logit, run_search
from sparse_adv.attacks.success import advantage
from sparse_adv.ops.arguments import check_flag

Boundary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""boundary(x, index) -> the lead z_y - z_k [n] and its gradient; each image moves to the boundary of class k."""

_FINAL_STEPS = 3
_CROSSING = 2
"""A lead counts as at least this many units in the last place of the largest logit."""


def fab(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    targeted: bool = False,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """FAB: x = box((1 - a)(x + eta d(x)) + a (x_0 + eta d(x_0))), d = the way to the nearest linearised boundary.

    The boundary is that of the class k with the least |z_y - z_k| / |gradient of z_y - z_k|_dual at x; d is the least
    change, in the norm and within [lo, hi], that reaches its hyperplane, and a = min(alpha_max, |d(x)| / (|d(x)| +
    |d(x_0)|)). When x is adversarial, the nearest such x is kept and x is pulled back to x_0 + beta (x - x_0). The
    attack ends with three steps of a search between the nearest x and x_0. If an example is so near to the boundary
    that rounding decides, it is moved further by up to 1 % of its distance.

    Args:
        model: maps images in [lo, hi] to logits [N, classes].
        images: float tensor [N, ...], the clean images x_0.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        norm: "linf" or "l2", also written "Linf" or "L2".
        eps: None: return the example at the least distance found, however far. A number, or a float tensor [N] of one
            for each image: only examples inside this ball count, and an image with such an example is attacked no
            further.
        steps: number of steps; each is two forward passes and, untargeted, one backward pass for every class.
        restarts: number of starts: x_0, then random points at half of the distance found so far, at most eps / 2.
        alpha_max: greatest weight a of the step from the clean image.
        eta: factor by which each step overshoots the boundary; at least 1.
        beta: how much of the perturbation is kept after a success, in (0, 1).
        targeted: go to the class `labels` from any predicted class.
        generator: one number is drawn from it; None for PyTorch's global generator.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute logits and, if targeted, gradients, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, in [lo, hi] and, with eps, in
        the ball without slack; the clean image if none was found or the clean image is adversarial.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range.

    Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack" (ICML 2020),
    algorithm 1 and equations 3 to 10.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> attacks.fab(model, images, labels, norm="l2", steps=5).shape
        torch.Size([4, 1, 8, 8])
    """
    settings = _Settings(_ball(images, eps, norm, lo, hi), steps, restarts, alpha_max, eta, beta, targeted)
    draw = private_generator(generator, images)

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        attack = _Fab(model, images, labels, settings, draw)

        def nearest(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return nearest_boundary(model, x, labels[index], settings.ball.norm)

        def to_target(x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return model.values_and_gradient(x, lambda logits: -advantage(logits, labels[index], True))

        attack.run(to_target if targeted else nearest)
        return attack.result()

    return run_search(search, model, images, labels, lo, hi, check, engine)


def fab_t(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor | None = None,
    steps: int = 100,
    restarts: int = 1,
    n_target_classes: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """FAB-T: `fab` towards the boundary of one class at a time; the nearest example of all classes is kept.

    The classes are those with the highest logits at the clean image, except the label's. A step takes one backward
    pass; `fab` takes one for every class.

    Args:
        model, images, labels, norm, eps, steps, restarts, alpha_max, eta, beta, generator, lo, hi, check, engine: as in
            `fab`; steps and restarts are those of each class.
        n_target_classes: number of classes; all of them if the model has fewer.

    Returns:
        The adversarial images, as in `fab`: an image that is classified as any class but its label counts.

    Raises:
        TypeError, ValueError: as in `fab`.

    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks" (ICML 2020), section 4.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.fab_t(model, images, labels, eps=0.3, steps=5, n_target_classes=3)
        >>> bool((adv - images).abs().max() <= 0.3)
        True
    """
    settings = _Settings(_ball(images, eps, norm, lo, hi), steps, restarts, alpha_max, eta, beta, False)
    check_count("n_target_classes", n_target_classes, least=1)
    draw = private_generator(generator, images)

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        attack = _Fab(model, images, labels, settings, draw)
        others = attack.logits.scatter(1, labels[:, None], -torch.inf)
        targets = others.topk(min(n_target_classes, others.shape[1] - 1), dim=1).indices
        for target in targets.unbind(1):

            def boundary(x: Tensor, index: Tensor, target: Tensor = target) -> tuple[Tensor, Tensor]:
                pair = torch.stack([labels[index], target[index]], 1)
                return model.values_and_gradient(x, lambda logits: torch.sub(*logits.gather(1, pair).unbind(1)))

            attack.run(boundary)
        return attack.result()

    return run_search(search, model, images, labels, lo, hi, check, engine)


class FAB(SeededAttack):
    """`attacks.fab` or `attacks.fab_t` bound to a model, with the interface and the defaults of torchattacks.FAB.

    Args:
        model, norm, eps, steps, alpha_max, eta, beta, options: as in `attacks.fab`.
        n_restarts: `restarts` of `attacks.fab`.
        verbose: accepted, and without effect.
        seed: of the random starts; each call draws the same numbers.
        multi_targeted: run `attacks.fab_t` towards n_classes - 1 classes; while it is True there is no targeted mode.
        n_classes: number of classes, used if multi_targeted.

    Raises:
        TypeError, ValueError: if n_restarts or n_classes is out of range; when called, as `attacks.fab`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FAB(models.build("digits_cnn", width=8), eps=0.2, steps=3, multi_targeted=True)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    n_classes = count_setting("n_classes", least=2)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor | None = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        verbose: bool = False,
        seed: int = 0,
        multi_targeted: bool = False,
        n_classes: int = 10,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        check_flag("multi_targeted", multi_targeted)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.alpha_max, self.eta, self.beta = alpha_max, eta, beta
        self.multi_targeted, self.n_classes = multi_targeted, n_classes

    @property
    def supports_targets(self) -> bool:  # type: ignore[override]
        """Whether labels may be classes to reach: not while multi_targeted is True; it may be set between two calls."""
        return not self.multi_targeted

    @property
    def _function(self) -> Callable[..., Tensor]:  # type: ignore[override]
        return fab_t if self.multi_targeted else fab

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"n_target_classes": self.n_classes - 1}


class FABT(FAB):
    """`attacks.fab_t` bound to a model: `FAB` with multi_targeted=True.

    Args:
        model, norm, eps, steps: as in `FAB`.
        options: the other arguments of `FAB`, by name.

    Raises:
        TypeError, ValueError: when called, as `attacks.fab_t`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FABT(models.build("digits_cnn", width=8), eps=0.2, steps=3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor | None = 8 / 255,
        steps: int = 10,
        **options: Unpack[FABTOptions],
    ) -> None:
        check_names(type(self).__name__, options, FABTOptions)
        super().__init__(model, norm, eps, steps, multi_targeted=True, **options)


@dataclass(frozen=True)
class _Settings:
    """The checked settings of an attack; `fab` documents them."""

    ball: Ball
    steps: int
    restarts: int
    alpha_max: float
    eta: float
    beta: float
    targeted: bool

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=1)
        check_count("restarts", self.restarts, least=1)
        check_settings(alpha_max=self.alpha_max, eta=self.eta, beta=self.beta)
        check_flag("targeted", self.targeted)


def _ball(images: Tensor, eps: float | Tensor | None, norm: str, lo: float | Tensor, hi: float | Tensor) -> Ball:
    """The ball of radius eps around the images, an unbounded one for None."""
    return ball_around(images, torch.inf if eps is None else eps, norm, lo, hi)


class _Fab:
    """The attack on one batch: the clean images, and for each the nearest adversarial image found so far."""

    def __init__(
        self, model: Queries, images: Tensor, labels: Tensor, settings: _Settings, draw: torch.Generator
    ) -> None:
        self._model, self._images, self._labels, self._settings, self._draw = model, images, labels, settings, draw
        self.logits = model.logits(images)
        self._best = images.clone()
        is_adversarial = advantage(self.logits, labels, settings.targeted) > 0
        self._least = images.new_full(labels.shape, torch.inf, dtype=torch.float64).where(~is_adversarial, 0)
        self._eps = torch.zeros_like(self._least) + settings.ball.radii

    def run(self, boundary: Boundary) -> None:
        """All starts and steps towards one kind of boundary."""
        settings, before = self._settings, self._least.clone()
        for restart in range(settings.restarts):
            index = self._unfinished(torch.arange(len(self._images), device=self._images.device))
            x = self._images[index] if restart == 0 else self._random_start(index)
            for _ in range(settings.steps):
                if not len(index):
                    break
                x = self._step(x, index, boundary)
                left = self._unfinished(index)
                x, index = x[torch.isin(index, left)], left
        self._search_back(self._least < before)

    def result(self) -> Tensor:
        """The nearest adversarial images inside the ball, else the clean ones."""
        inside, settings = self._least <= self._eps, self._settings
        found = self._best.where(per_image(inside, self._best), self._images)
        return confirmed(self._model, found, self._images, self._labels, settings.ball, settings.targeted)

    def _unfinished(self, index: Tensor) -> Tensor:
        """Return the images of `index` to attack further: with eps, those without an example in the ball; else all."""
        eps = self._eps[index]
        return index[self._least[index] > eps.where(eps < torch.inf, 0)]

    def _step(self, x: Tensor, index: Tensor, boundary: Boundary) -> Tensor:
        settings, dtype = self._settings, torch.promote_types(x.dtype, torch.float32)
        lead, slope = (tensor.to(dtype) for tensor in boundary(x, index))
        # 16-bit logits are often equal. At such a tie the step to the boundary is 0, so the lead is made larger.
        least = (_CROSSING * self._model.unit * largest_logit(self.logits[index])).to(dtype)
        lead = lead.where(lead.abs() >= least, least.where(lead >= 0, -least))
        x, clean = x.to(dtype), self._images[index].to(dtype)
        # The hyperplane is lead + <slope, z - x> = 0, so the lead of the clean image is the value of this at z = x_0.
        lead_of_clean = lead + ((clean - x) * slope).flatten(1).sum(1)
        from_x = onto_hyperplane(x, lead, slope, settings.ball)
        from_clean = onto_hyperplane(clean, lead_of_clean, slope, settings.ball)
        zero = torch.zeros_like(x)
        lengths = [distance(offset, zero, settings.ball.norm) for offset in (from_x, from_clean)]
        alpha = (lengths[0] / divisor(lengths[0] + lengths[1])).clamp(max=settings.alpha_max)
        alpha = per_image(alpha, x)
        x = (1 - alpha) * (x + settings.eta * from_x) + alpha * (clean + settings.eta * from_clean)
        x = settings.ball.clamp(x).to(self._images.dtype)
        is_adversarial, clean = per_image(self._keep(x, index) < 0, x), self._images[index]
        return (clean + settings.beta * (x - clean)).where(is_adversarial, x)

    def _keep(self, x: Tensor, index: Tensor) -> Tensor:
        """Keep the images that are adversarial and nearer than earlier ones; return the lead of the labels [n]."""
        lead = self._lead(x, index)
        length = distance(x, self._images[index], self._settings.ball.norm).double()
        better = (lead < 0) & (length < self._least[index])
        self._best[index[better]], self._least[index[better]] = x[better], length[better]
        return lead

    def _random_start(self, index: Tensor) -> Tensor:
        """A point at half of the least distance, or half of eps, in a random direction."""
        ball, clean = self._settings.ball, self._images[index]
        radius = (self._least[index].minimum(self._eps[index]) / 2).to(clean.dtype)
        direction = torch.randn(clean.shape, generator=self._draw, dtype=clean.dtype, device=clean.device)
        if ball.norm == "linf":
            direction = torch.rand(clean.shape, generator=self._draw, dtype=clean.dtype, device=clean.device) * 2 - 1
        length = distance(direction, torch.zeros_like(direction), ball.norm)
        # If nothing was found and there is no eps, the start is the clean image again.
        scale = (radius / length).where(radius.isfinite(), 0)
        return ball.clamp(clean + direction * per_image(scale, clean))

    def _search_back(self, found: Tensor) -> None:
        """Move the examples of a run towards the clean images by false position; `found`, bool [N], says which have
        one.

        With the leads z_y - z_k at the clean image and at the example, the next point is the zero of the straight line
        through both; it replaces one end, according to whether it is adversarial.
        """
        index = self._unfinished(found.nonzero().squeeze(1))
        if not len(index):
            return
        near, far = self._images[index].clone(), self._best[index].clone()
        lead_near, lead_far = self._lead(near, index), self._lead(far, index)
        for _ in range(_FINAL_STEPS):
            share = (lead_near / divisor(lead_near - lead_far)).clamp(0, 1)
            middle = near + per_image(share, near).to(near.dtype) * (far - near)
            lead = self._keep(middle, index)
            beyond = per_image(lead < 0, near)
            near, far = middle.where(~beyond, near), middle.where(beyond, far)
            lead_near, lead_far = lead.where(lead >= 0, lead_near), lead.where(lead < 0, lead_far)

    def _lead(self, x: Tensor, index: Tensor) -> Tensor:
        """The lead z_y - z_k of each label, negative where the image is adversarial."""
        return -advantage(self._model.logits(x), self._labels[index], self._settings.targeted)
