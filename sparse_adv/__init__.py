"""Masked sparse convolutions and a fused PGD step for PyTorch: fast adversarial training of sparse networks."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from sparse_adv import interruption  # noqa: F401  # before what takes time to import

# isort: split
from sparse_adv import attacks, engine, masks, nn, ops
from sparse_adv.memory import keep_freed_memory
from sparse_adv.nn import densify, explain, sparsify

if TYPE_CHECKING:
    from sparse_adv import config, data, methods, models, report, runs, tickets, training
else:

    def __getattr__(name: str) -> ModuleType:
        """These are imported at their first use."""
        if name in __all__:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = ops.build_facts()["version"]

__all__ = [
    "attacks",
    "config",
    "data",
    "densify",
    "engine",
    "explain",
    "keep_freed_memory",
    "masks",
    "methods",
    "models",
    "nn",
    "ops",
    "report",
    "runs",
    "sparsify",
    "tickets",
    "training",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
