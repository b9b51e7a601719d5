"""The versions of AutoAttack: which attacks they run, with which budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from sparse_adv.attacks.apgd import apgd, apgd_t
from sparse_adv.attacks.fab import fab, fab_t
from sparse_adv.attacks.square import square


@dataclass(frozen=True)
class Member:
    """One attack of the sequence, its budget in words, and whether that contains the restarts of the version."""

    budget: str
    attack: Callable[..., Tensor]
    restarts: bool = False


MEMBERS = {
    "apgd-ce": Member("100 steps", partial(apgd, steps=100, loss="ce"), restarts=True),
    "apgd-dlr": Member("100 steps", partial(apgd, steps=100, loss="dlr"), restarts=True),
    "apgd-t": Member("100 steps, 9 targets", partial(apgd_t, steps=100, targets=9)),
    "fab": Member("100 steps", partial(fab, steps=100), restarts=True),
    "fab-t": Member("100 steps, 9 targets", partial(fab_t, steps=100, n_target_classes=9)),
    "square": Member("5000 queries", partial(square, queries=5000)),
}
"""The attacks by the reference's names."""


@dataclass(frozen=True)
class Version:
    """Names of the attacks, how many gradients each step averages, and the restarts of attacks without targets."""

    attacks: tuple[str, ...]
    eot_iter: int = 1
    restarts: int = 1

    def budget(self, name: str) -> str:
        member = MEMBERS[name]
        restarts = f", {self.restarts} restart{'s' * (self.restarts > 1)}" if member.restarts else ""
        averaged = f", gradients averaged over {self.eot_iter}" if self.eot_iter > 1 else ""
        return f"{name} ({member.budget}{restarts}{averaged})"

    def options(self, name: str) -> dict[str, int]:
        averaged = {"eot_iter": self.eot_iter} if self.eot_iter > 1 else {}
        return averaged | ({"restarts": self.restarts} if MEMBERS[name].restarts else {})


VERSIONS = {
    "standard": Version(("apgd-ce", "apgd-t", "fab-t", "square")),
    "plus": Version(("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"), restarts=5),
    "rand": Version(("apgd-ce", "apgd-dlr"), eot_iter=20),
    "custom": Version(()),
}
