"""The collapse guard: single-step adversarial training can lose all robustness within an epoch, and not notice.

"Catastrophic overfitting": the model learns to fool the one step it is trained on (Wong et al. 2020, section 5.4).
After each epoch a cheap PGD attack on held-out images looks for it. A collapsed epoch is undone and trained again with
PGD (the remedy of Li et al. 2020, "Towards understanding fast adversarial training"), then the cheap objective goes on;
each further collapse doubles the number of epochs that PGD takes over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparse_adv.attacks import Graphs
from sparse_adv.config import TrainConfig
from sparse_adv.data import Split
from sparse_adv.training.evaluation import Accuracy, Images, batches_of, robust_accuracy

PROBE_IMAGES = 256
PROBE_STEPS = 5
LARGEST_FALL = 0.1
"""No fall of less counts, nor one to more than half of the best: 256 images scatter by 3 points."""


class CatastrophicOverfittingError(ArithmeticError):
    """Robustness is gone, and PGD training could not keep it either."""


@dataclass
class OverfittingMonitor:
    """Remembers the best probe, and for how many epochs PGD still has to take over."""

    probe: list[tuple[Tensor, Tensor]]
    config: TrainConfig
    best: float = 0.0
    collapses: int = 0
    pgd_epochs: int = 0
    graphs: Graphs | None = None
    """Where the probes' attack is kept."""

    @classmethod
    def over(cls, images: Images, config: TrainConfig, graphs: Graphs | None = None) -> OverfittingMonitor:
        """A monitor that probes with the first held-out images."""
        if isinstance(images, Split):
            images = Split(images.images[:PROBE_IMAGES], images.labels[:PROBE_IMAGES])
        probe: list[tuple[Tensor, Tensor]] = []
        for x, y in batches_of(images, PROBE_IMAGES):
            probe.append((x, y))
            if sum(len(y) for _, y in probe) >= PROBE_IMAGES:
                break
        return cls(probe, config, graphs=graphs)

    def measure(self, model: nn.Module) -> Accuracy:
        """Accuracy of the probe under PGD-5 of step size eps / 4."""
        config = self.config
        return robust_accuracy(
            model,
            self.probe,
            eps=config.eps,
            norm=config.norm,
            steps=PROBE_STEPS,
            seed=config.seed,
            graphs=self.graphs,
        )

    def collapsed(self, accuracy: float) -> bool:
        """Whether an epoch that ends with this probe is to be undone; a healthy one is remembered."""
        if math.isfinite(accuracy) and (accuracy >= self.best / 2 or accuracy > self.best - LARGEST_FALL):
            self.best = max(self.best, float(accuracy))
            self.pgd_epochs = max(0, self.pgd_epochs - 1)
            return False
        if self.pgd_epochs or self.config.objective in ("pgd", "trades"):
            raise CatastrophicOverfittingError(
                f"robustness collapsed: accuracy under PGD-{PROBE_STEPS} fell from {self.best:.1%} to {accuracy:.1%} "
                f"in an epoch of {'PGD' if self.pgd_epochs else self.config.objective} training: lower lr or eps"
            )
        self.collapses += 1
        self.pgd_epochs = 2 ** (self.collapses - 1)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "collapses": self.collapses, "pgd_epochs": self.pgd_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.collapses, self.pgd_epochs = state["best"], state["collapses"], state["pgd_epochs"]
