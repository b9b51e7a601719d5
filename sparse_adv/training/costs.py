"""The costs of training: seconds of each phase, and multiply-adds (MACs) from the passes through the network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_adv.attacks.checks import count_classes
from sparse_adv.nn import count_macs, explain
from sparse_adv.runs import Density
from sparse_adv.training import distributed
from sparse_adv.training.evaluation import Accuracy
from sparse_adv.training.objectives import Passes


class Stopwatch:
    """Adds up the seconds of named phases. On CUDA it records events and waits for the GPU only when it is read.

    Examples:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> for _ in range(2):
        ...     with watch.phase("attack"):
        ...         time.sleep(0.01)
        >>> watch.seconds("attack") >= 0.02, watch.seconds("update")
        (True, 0.0)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time until the end of the block to this phase."""
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self._device))  # this device may not be the current one
            yield
            end.record(torch.cuda.current_stream(self._device))
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase so far, 0 if it never ran; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for phase, begin, end in self._events:
            self._add(phase, begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return self._seconds.get(name, 0.0)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


class Tally:
    """Counts the images of an epoch's updates, separately for each cost of an update, and their MACs."""

    def __init__(self) -> None:
        self._images: dict[tuple[NetworkCosts, Passes], int] = {}

    def add(self, images: int, costs: NetworkCosts, passes: Passes) -> None:
        """Count the images of an update of this process."""
        key = costs, passes
        self._images[key] = self._images.get(key, 0) + images

    def summed(self, sums: Sequence[float], device: torch.device) -> tuple[list[float], int]:
        """Add up the images and other sums over all processes; return these sums and the number of images.

        The costs change at the same updates on all processes.
        """
        if not self._images:
            raise ValueError("batches must have images in each epoch, got none: can they be iterated only once?")
        totals = distributed.all_reduce_sum([*sums, *map(float, self._images.values())], device)
        images = totals[len(sums) :]
        self._images = {key: int(count) for key, count in zip(self._images, images, strict=True)}
        return totals[: len(sums)], sum(self._images.values())

    def attack(self) -> int:
        """Return the MACs of the attacks."""
        return sum(count * costs.attack(passes) for (costs, passes), count in self._images.items())

    def update(self) -> int:
        """Return the MACs of the updates."""
        return sum(count * costs.update(passes) for (costs, passes), count in self._images.items())


class NetworkCosts:
    """The MACs of a network's passes, its densities and its number of classes, measured in one forward pass.

    Args:
        model: left as it was.
        x: a batch on the model's device; only its shape, dtype and memory layout matter.

    Attributes:
        density: of weights and MACs; None for a model without convolutions and linear layers.
        classes: number of classes, from the shape of the logits.

    Raises:
        ValueError: if the model does not return logits [N, classes].
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        outputs: list[Tensor] = []
        hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        images = torch.zeros_like(x, dtype=x.dtype if x.is_floating_point() else torch.float32)
        try:
            macs = count_macs(model, images)
        finally:
            hook.remove()
        self.classes = count_classes(outputs[0], len(x))
        self._per_image = macs.per_image()
        weights = explain(model).density
        self.density = None if weights is None or not macs.dense else Density(weights, macs.kept / macs.dense)

    def attack(self, passes: Passes) -> int:
        """Return the MACs per image of the attack of an update.

        They are counted with the kernels of the network itself. But the engine computes the gradients of most attacks,
        and on a CPU it may use other kernels: dense ones in channels_last instead of sparse ones, with up to 1.2 times
        the MACs at batch 100 and 1.6 times at batch 4 (measured for densities of 0.05 to 0.45), or Winograd's
        filtering, with 2.25 or 4 times fewer multiplications than a dense layer's MACs.
        """
        return passes.attack_forward * self._per_image.forward + passes.attack_backward * self._per_image.grad_input

    def update(self, passes: Passes) -> int:
        """Return the MACs per image of an update: forward, weight gradient, and input gradient.

        The input gradient of the first layer counts only if the update differentiates down to the image.
        """
        macs = self._per_image
        without_weight = macs.forward + macs.grad_input - macs.first_grad_input
        sparse = passes.update - passes.dense_gradients
        weights = sparse * macs.grad_weight + passes.dense_gradients * macs.dense
        return passes.update * without_weight + weights + passes.to_image * macs.first_grad_input

    def evaluation(self, accuracies: Iterable[Accuracy]) -> int:
        """Return the MACs that it took to measure these accuracies."""
        macs = self._per_image
        return sum(each.forward * macs.forward + each.backward * macs.grad_input for each in accuracies)
