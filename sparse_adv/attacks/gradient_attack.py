"""`GradientAttack`: the base class of attack objects that are PGD with their own settings."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.base import Attack
from sparse_adv.attacks.cuda_graph import Graphs
from sparse_adv.attacks.options import AttackOptions
from sparse_adv.attacks.run_attack import run_attack
from sparse_adv.ops.arguments import check_flag


def _option(name: str) -> property:
    """A property that reads and replaces one of the attack's options; all options are then checked again."""

    def read(attack: GradientAttack) -> Any:
        return getattr(attack.options, name)

    def write(attack: GradientAttack, value: Any) -> None:
        attack.options = attack._with(**{name: value})

    return property(read, write, doc=f"`{name}` of `attacks.AttackOptions`.")


class GradientAttack(Attack):
    """A model and the options of an attack on it.

    Args:
        model: maps images to logits.
        options: the settings of the attack.
        graph: on CUDA, capture the attack as CUDA graphs in its own cache, see `Graphs`; no effect on other devices.
    """

    def __init__(self, model: Model, options: AttackOptions, graph: bool) -> None:
        super().__init__(model)
        check_flag("graph", graph)
        self.targeted = options.targeted
        self.options = replace(options, graphs=Graphs()) if graph and options.graphs is None else options

    def forward(self, model: Model, images: Tensor, labels: Tensor | None, targeted: bool) -> Tensor:
        """Return adversarial images for a batch."""
        return run_attack(model, images, labels, replace(self.options, targeted=targeted))

    # The caller may set these between two calls.
    eps = _option("eps")
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

    def _with(self, **changes: Any) -> AttackOptions:
        """The options with some changes, and with the changes of other options that follow from them."""
        return replace(self.options, **changes)

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
