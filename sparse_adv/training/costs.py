"""What a training run executes, in multiply-adds, and what the model must be asked for it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparse_adv.attacks.checks import count_classes
from sparse_adv.attacks.loop import bn_mode
from sparse_adv.nn import count_macs, explain
from sparse_adv.training.evaluation import Accuracy
from sparse_adv.training.objectives import Passes


class Costs:
    """A model's passes for one image of such a batch; here the host waits for a GPU, so it is asked once a run.

    Args:
        model: left as it was.
        x: a batch on the model's device, of which only shape, dtype and layout count.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.work = count_macs(model, x.shape).per_image()
        blank = torch.zeros_like(x, dtype=x.dtype if x.is_floating_point() else torch.float32)
        with bn_mode(model, "eval"), torch.no_grad():
            self.classes = count_classes(model(blank), len(x))
            """How many classes the model tells apart."""

    def training(self, passes: Passes) -> tuple[int, int]:
        """Multiply-adds per image of attack and update."""
        work = self.work
        attack = passes.attack_forward * work.forward + passes.attack_backward * work.grad_input
        to_image = 0 if passes.to_image else work.first_grad_input
        return attack, passes.update * (work.forward + work.grad_weight + work.grad_input - to_image)

    def evaluation(self, found: Iterable[Accuracy]) -> int:
        """Multiply-adds that it took to find these."""
        return sum(each.forward * self.work.forward + each.backward * self.work.grad_input for each in found)


def densities(model: nn.Module, x: Tensor) -> dict[str, float | None]:
    """Densities of the model's weights and of its multiply-adds for such images, as a run records them."""
    layers = explain(model, (1, *x.shape[1:]))
    return {"density": layers.density, "multiply_add_density": layers.mac_density}
