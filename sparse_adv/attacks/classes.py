"""The attacks as objects with the interface of torchattacks: `adv = PGD(model, eps=8/255)(images, labels)`."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any, Unpack

from torch import Tensor

from sparse_adv.attacks.apgd import apgd, apgd_t
from sparse_adv.attacks.base import Attack, HostAttack
from sparse_adv.attacks.checks import Model
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.loop import run_attack
from sparse_adv.attacks.losses import Loss
from sparse_adv.attacks.options import AttackOptions, BasicOptions, CommonOptions, LossOptions, check_count, tpgd_start
from sparse_adv.attacks.queries import seeded
from sparse_adv.ops.arguments import check_flag


def _option(name: str) -> property:
    """A property that reads and replaces one of the attack's options, which are then all checked again."""

    def read(attack: _GradientAttack) -> Any:
        return getattr(attack.options, name)

    def write(attack: _GradientAttack, value: Any) -> None:
        attack.options = replace(attack.options, **{name: value})

    return property(read, write, doc=f"`{name}` of `attacks.AttackOptions`.")


class _GradientAttack(Attack):
    """A model and the options of an attack on it.

    Args:
        model: maps images to logits.
        options: the settings of the attack.
        graph: on CUDA, capture the attack as CUDA graphs in a cache of its own, see `Graphs`; on other devices this
            has no effect.
    """

    def __init__(self, model: Model, options: AttackOptions, graph: bool) -> None:
        super().__init__(model)
        check_flag("graph", graph)
        self.targeted = options.targeted
        self.options = replace(options, graphs=Graphs()) if graph and options.graphs is None else options

    def forward(self, model: Model, images: Tensor, labels: Tensor | None, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return run_attack(model, images, labels, replace(self.options, targeted=targeted))

    @property
    def eps(self) -> float | Tensor:
        """Radius of the ball; like the options below, it may be set between two calls."""
        return self.options.eps

    @eps.setter
    def eps(self, eps: float | Tensor) -> None:
        self.options = self._with_eps(eps)

    alpha = _option("alpha")
    steps = _option("steps")
    random_start = _option("random_start")
    norm = _option("norm")
    loss = _option("loss")
    restarts = _option("restarts")
    lo = _option("lo")
    hi = _option("hi")
    generator = _option("generator")
    bn_mode = _option("bn_mode")
    check = _option("check")
    graphs = _option("graphs")
    engine = _option("engine")
    early_stop = _option("early_stop")

    def _with_eps(self, eps: float | Tensor) -> AttackOptions:
        return replace(self.options, eps=eps)

    def for_images(self, index: Tensor) -> Attack:
        """This attack for some images of a batch, see `Attack.for_images`."""
        names = ("eps", "alpha", "start_eps")
        values = {name: getattr(self.options, name) for name in names}
        own: dict[str, Any] = {
            name: value[index.to(value.device)] for name, value in values.items() if isinstance(value, Tensor)
        }
        attack = copy.copy(self)
        attack.options = replace(self.options, **own)
        return attack

    def __repr__(self) -> str:
        options = replace(self.options, targeted=self.targeted)
        values = [
            f"{field.name}={getattr(options, field.name)}"
            for field in fields(options)
            if field.name in ("eps", "alpha", "steps") or _differs(getattr(options, field.name), field.default)
        ]
        return f"{type(self).__name__}({', '.join(values)})"


def _differs(value: object, default: object) -> bool:
    return isinstance(value, Tensor) or value != default


class PGD(_GradientAttack):
    """`attacks.pgd` bound to a model; positional arguments are in the order of torchattacks.PGD.

    Args:
        model, eps, alpha, steps, random_start, norm, restarts, options: as in `attacks.pgd`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.PGD(models.build("digits_cnn", width=8), eps=0.25, alpha=0.125, steps=4)
        >>> attack
        PGD(eps=0.25, alpha=0.125, steps=4)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: str = "linf",
        restarts: int = 1,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        settings = AttackOptions(
            eps=eps, alpha=alpha, steps=steps, random_start=random_start, norm=norm, restarts=restarts, **options
        )
        super().__init__(model, settings, graph)


class PGDL2(PGD):
    """`attacks.pgd` in the l2 ball, bound to a model; positional arguments are in the order of torchattacks.PGDL2.

    Args:
        model, eps, alpha, steps, random_start, restarts, options: as in `attacks.pgd`.
        eps_for_division: accepted, and without effect: a gradient of zero does not move an image.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.PGDL2(models.build("digits_cnn", width=8), eps=0.5, alpha=0.125, steps=4)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> adv = attack(images, torch.tensor([0, 1]))
        >>> bool(((adv - images).flatten(1).norm(dim=1) <= 0.5 + 1e-5).all())
        True
    """

    eps_for_division = 1e-10
    """Accepted, and without effect."""

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 1.0,
        alpha: float | Tensor = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        *,
        restarts: int = 1,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm="l2", restarts=restarts, graph=graph, **options)


class FGSM(_GradientAttack):
    """`attacks.fgsm` bound to a model, with the interface of torchattacks.FGSM.

    Args:
        model, eps, norm, options: as in `attacks.fgsm`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FGSM(models.build("digits_cnn", width=8), eps=0.25)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, AttackOptions.fgsm(eps, norm, **options), graph)

    def _with_eps(self, eps: float | Tensor) -> AttackOptions:
        return replace(self.options, eps=eps, alpha=eps)


class FFGSM(_GradientAttack):
    """`attacks.fgsm_rs` bound to a model, with the interface of torchattacks.FFGSM.

    Args:
        model, eps, alpha, norm, options: as in `attacks.fgsm_rs`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.FFGSM(models.build("digits_cnn", width=8), eps=0.25, alpha=0.3)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 10 / 255,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, AttackOptions.fgsm_rs(eps, alpha, norm, **options), graph)


class TPGD(_GradientAttack):
    """`attacks.tpgd` bound to a model, with the interface of torchattacks.TPGD; labels are accepted and not used.

    Args:
        model, eps, alpha, steps, norm, options: as in `attacks.tpgd`.
        graph: on CUDA, capture the attack as CUDA graphs, see `Graphs`.

    Raises:
        ValueError: if an option is out of range.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.TPGD(models.build("digits_cnn", width=8), eps=0.25, alpha=0.125, steps=4)
        >>> attack(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False
    needs_labels = False

    def __init__(
        self,
        model: Model,
        eps: float | Tensor = 8 / 255,
        alpha: float | Tensor = 2 / 255,
        steps: int = 10,
        *,
        norm: str = "linf",
        graph: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, AttackOptions.tpgd(eps, alpha, steps, norm, **options), graph)

    def _with_eps(self, eps: float | Tensor) -> AttackOptions:
        return replace(self.options, eps=eps, start_eps=tpgd_start(eps, self.options.norm))

    def forward(self, model: Model, images: Tensor, labels: Tensor | None, targeted: bool) -> Tensor:
        """Return adversarial images for a batch; the labels are not used."""
        return run_attack(model, images, None, self.options)


class APGD(HostAttack):
    """`attacks.apgd` bound to a model, with the interface of torchattacks.APGD.

    Args:
        model, norm, eps, steps, loss, eot_iter, rho: as in `attacks.apgd`.
        n_restarts: number of random starts.
        seed: of the random starts; each call draws the same ones.
        verbose: accepted, and without effect.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGD(models.build("digits_cnn", width=8), eps=0.1, steps=5, loss="dlr")
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    verbose = False
    """Accepted, and without effect."""

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

    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return apgd(
            model,
            images,
            labels,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.n_restarts,
            loss=self.loss,
            targeted=targeted,
            eot_iter=self.eot_iter,
            rho=self.rho,
            generator=seeded(self.seed),
            **self._options,
        )


class APGDT(HostAttack):
    """`attacks.apgd_t` bound to a model, with the interface of torchattacks.APGDT.

    Args:
        model, norm, eps, steps, eot_iter, rho: as in `attacks.apgd`.
        n_restarts, seed, verbose: as in `APGD`.
        n_classes: number of classes; all wrong ones are targets.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.APGDT(models.build("digits_cnn", width=8), eps=0.1, steps=5)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    supports_targets = False
    verbose = False
    """Accepted, and without effect."""

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
        check_count("n_classes", n_classes, least=2)
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.eot_iter, self.rho, self.n_classes = eot_iter, rho, n_classes

    def forward(self, model: Model, images: Tensor, labels: Tensor, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return apgd_t(
            model,
            images,
            labels,
            norm=self.norm,
            eps=self.eps,
            steps=self.steps,
            restarts=self.n_restarts,
            n_target_classes=self.n_classes - 1,
            eot_iter=self.eot_iter,
            rho=self.rho,
            generator=seeded(self.seed),
            **self._options,
        )
