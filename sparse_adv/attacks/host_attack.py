"""`HostAttack`: what the attacks as objects share whose loop runs on the host."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.checks import Model
from sparse_adv.attacks.generators import seeded
from sparse_adv.attacks.options import BasicOptions, check_names


class HostAttack(Attack):
    """A function of `attacks` bound to a model, with the options lo, hi, check and engine of `attacks.pgd`.

    Its settings are attributes with the names of the function's parameters, and may be set between two calls. The
    function checks them when the object is called, and raises what it raises.

    Raises:
        TypeError: if a keyword is another one.
    """

    _function: ClassVar[Callable[..., Tensor]]

    lo: float | Tensor = 0.0
    hi: float | Tensor = 1.0
    check = True
    engine = True

    def __init__(self, model: Model, **options: Unpack[BasicOptions]) -> None:
        super().__init__(model)
        check_names(type(self).__name__, options, BasicOptions)
        vars(self).update(options)

    def forward(self, model: Model, images: Tensor, labels: Any, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        given, names = self._settings() | {"targeted": targeted}, inspect.signature(self._function).parameters
        settings = {name: value for name, value in given.items() if name in names}
        settings |= {name: getattr(self, name) for name in BasicOptions.__annotations__}
        return self._function(model, images, labels, **settings)

    def _settings(self) -> dict[str, Any]:
        """The settings by the names of the function's parameters; entries of other names are left out."""
        return dict(vars(self))


class SeededAttack(HostAttack):
    """A `HostAttack` with random starts, whose settings have the names of torchattacks."""

    n_restarts: int
    seed: int
    verbose = False
    """Accepted, and without effect."""

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"restarts": self.n_restarts, "generator": seeded(self.seed)}
