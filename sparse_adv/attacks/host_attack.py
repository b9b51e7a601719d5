"""`HostAttack`: the base class of attack objects whose loop runs on the host."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor

from sparse_adv.argument_types import check_count
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.generators import seeded_generator
from sparse_adv.attacks.options import BasicOptions, check_names


def count_setting(name: str, least: int) -> property:
    """A setting that is checked when it is set; the function's own error would name the function's parameter."""

    def read(attack: HostAttack) -> Any:
        return vars(attack)[name]

    def write(attack: HostAttack, value: Any) -> None:
        check_count(name, value, least)
        vars(attack)[name] = value

    return property(read, write, doc=f"`{name}`, an integer of at least {least}.")


class HostAttack(Attack):
    """A function of `attacks` bound to a model, with the options lo, hi, check and engine of `attacks.pgd`.

    Its settings are attributes with the names of the function's parameters, and may be set between two calls. The
    function checks them when the object is called, and its errors reach the caller. A number whose name differs from
    the function's parameter is a `count_setting`.

    Raises:
        TypeError: for any other keyword.
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

    n_restarts = count_setting("n_restarts", least=1)
    seed: int
    verbose = False
    """Accepted, and without effect."""

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"restarts": self.n_restarts, "generator": seeded_generator(self.seed)}
