"""The attacks as objects with the interface of torchattacks: `adv = PGD(model, eps=8/255)(images, labels)`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Unpack

from torch import Tensor, nn

from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.loop import run_attack
from sparse_adv.attacks.options import AttackOptions, CommonOptions, LossOptions


class _Attack:
    """A model and the options of an attack on it.

    Args:
        model: maps images to logits.
        options: the settings of the attack.
        graph: on CUDA, capture the attack as CUDA graphs in a cache of its own, see `Graphs`; on other devices this
            has no effect.
    """

    def __init__(self, model: nn.Module, options: AttackOptions, graph: bool) -> None:
        self.model = model
        self.options = replace(options, graphs=Graphs()) if graph and options.graphs is None else options

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images for a batch: images float [N, ...], labels int64 [N]."""
        return run_attack(self.model, images, labels, self.options)

    def __repr__(self) -> str:
        values = [
            f"{field.name}={getattr(self.options, field.name)}"
            for field in fields(self.options)
            if field.name in ("eps", "alpha", "steps") or getattr(self.options, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(values)})"


class PGD(_Attack):
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
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
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

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        *,
        restarts: int = 1,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm="l2", restarts=restarts, graph=graph, **options)


class FGSM(_Attack):
    """`attacks.fgsm` bound to a model, with the interface of torchattacks.FGSM.

    Args:
        model, eps, options: as in `attacks.fgsm`.
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
        self, model: nn.Module, eps: float = 8 / 255, *, graph: bool = False, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(model, AttackOptions.fgsm(eps, **options), graph)


class FFGSM(_Attack):
    """`attacks.fgsm_rs` bound to a model, with the interface of torchattacks.FFGSM.

    Args:
        model, eps, alpha, options: as in `attacks.fgsm_rs`.
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
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 10 / 255,
        *,
        graph: bool = False,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(model, AttackOptions.fgsm_rs(eps, alpha, **options), graph)


class TPGD(_Attack):
    """`attacks.tpgd` bound to a model, with the interface of torchattacks.TPGD; labels are accepted and not used.

    Args:
        model, eps, alpha, steps, options: as in `attacks.tpgd`.
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

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        *,
        graph: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(model, AttackOptions.tpgd(eps, alpha, steps, **options), graph)

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return adversarial images for a batch of images, float [N, ...]."""
        return run_attack(self.model, images, None, self.options)
