"""The attacks in torchattacks' call shape: `adv = PGD(model, eps=8/255)(images, labels)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

from torch import Tensor, nn

from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.functional import Options, fgsm, fgsm_rs, pgd, tpgd


class _Options(Options, total=False):
    graph: bool


class _Attack:
    """A function of this module with its settings bound, called with (images, labels).

    With `graph=True` it keeps itself as CUDA graphs (see `Graphs`); elsewhere than on CUDA that changes nothing.
    """

    def __init__(
        self, attack: Callable[..., Tensor], model: nn.Module, *, graph: bool = False, **settings: object
    ) -> None:
        if graph:
            settings["graphs"] = Graphs()
        self.attack, self.model, self.settings = attack, model, settings

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.attack(self.model, images, labels, **self.settings)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.settings.items())})"


class PGD(_Attack):
    """`pgd` in torchattacks' call shape: `PGD(model, eps, alpha, steps, random_start)(images, labels)`."""

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
        **options: Unpack[_Options],
    ) -> None:
        super().__init__(
            pgd,
            model,
            eps=eps,
            alpha=alpha,
            steps=steps,
            random_start=random_start,
            norm=norm,
            restarts=restarts,
            **options,
        )


class PGDL2(PGD):
    """`pgd` in the l2 ball, in torchattacks' call shape."""

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        *,
        restarts: int = 1,
        **options: Unpack[_Options],
    ) -> None:
        super().__init__(model, eps, alpha, steps, random_start, norm="l2", restarts=restarts, **options)


class FGSM(_Attack):
    """`fgsm` in torchattacks' call shape."""

    def __init__(self, model: nn.Module, eps: float = 8 / 255, **options: Unpack[_Options]) -> None:
        super().__init__(fgsm, model, eps=eps, **options)


class FFGSM(_Attack):
    """`fgsm_rs` in torchattacks' call shape."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 10 / 255, **options: Unpack[_Options]
    ) -> None:
        super().__init__(fgsm_rs, model, eps=eps, alpha=alpha, **options)


class TPGD(_Attack):
    """`tpgd` in torchattacks' call shape; the labels are not looked at."""

    def __init__(
        self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10, **options: Any
    ) -> None:
        super().__init__(tpgd, model, eps=eps, alpha=alpha, steps=steps, **options)

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.attack(self.model, images, **self.settings)
