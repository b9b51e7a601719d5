"""The comparisons behind the thresholds of `sparse_adv/engine/fastest_kernel.py`, on this machine; it must be quiet.

    python benchmarks/winograd_thresholds.py [--threads 1] [--out FILE.csv]

A line for each constant: values of the quantity that it limits, and how many times as long an input gradient takes
without the kernel that the constant selects. A threshold fits the machine if this ratio passes 1 near it. Weights are
transformed once for all gradients, as in an attack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import harness
import torch
from harness import Case, Record, Value
from torch import Tensor, nn

from sparse_adv import engine, masks, models, sparsify
from sparse_adv.engine import fastest_kernel

NEVER, ALWAYS = ((4, 0.0), (2, 0.0), (1, 0.0)), ((4, 1.0), (2, 1.0), (1, 1.0))
DIRECT = {"_SPARSE_UP_TO": ALWAYS, "_LIVE_UP_TO": NEVER}
DENSE_WINOGRAD = {"_SPARSE_UP_TO": NEVER, "_LIVE_UP_TO": NEVER}
LIVE_FILTERS = {
    **{"_SPARSE_UP_TO": ALWAYS, "_LIVE_UP_TO": ALWAYS, "_LEAST_KEPT_OF_LIVE": 0.0, "_MOST_MULTIPLICATIONS": 9.0},
    **{"_LEAST_CHANNELS_OF_LIVE_FILTERS": 1, "_LEAST_TILES_OF_LIVE_FILTERS": 1},
}
WINOGRAD = {"_LEAST_CHANNELS": 1, "_LEAST_TILES": {2: 1, 4: 1}}
ONEDNN = {"_LEAST_CHANNELS": 1 << 30}
FILTERS = (4, 4, 3, 3)
Comparison = tuple[str, float, Callable[[], nn.Module], Tensor, dict[str, object], dict[str, object]]
"""A constant, a value, a network, images, and the constants with and without the kernel that it selects."""


def layers(channels: int) -> nn.Module:
    """Four dense 3 x 3 layers."""
    four = [layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, channels, 1), *four, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def masked(model: nn.Module, block: Sequence[int], density: float) -> nn.Module:
    """Random blocks of the model's layers, except those that read the images."""
    kept = masks.prune(model, density, block, scope="uniform", score=lambda name, weight: torch.rand(weight.shape))
    return sparsify(model, {name: mask for name, mask in kept.items() if mask.shape[1] > 3})


def comparisons(quick: bool) -> Iterator[Comparison]:
    def images(count: int, rows: int, cols: int) -> Tensor:
        return torch.rand(2 if quick else count, 3, rows, cols)

    def filters(channels: int, density: float) -> Callable[[], nn.Module]:
        return lambda: masked(layers(channels), FILTERS, density)

    def resnet(block: Sequence[int], density: float) -> Callable[[], nn.Module]:
        return lambda: masked(models.build("resnet18", width=8 if quick else 64), block, density)

    few, wide = (8, 8) if quick else (16, 128)
    for channels in (8,) if quick else (8, 16, 32, 64):
        yield "_LEAST_CHANNELS", channels, lambda n=channels: layers(n), images(64, 16, 16), WINOGRAD, ONEDNN
        least = "_LEAST_CHANNELS_OF_LIVE_FILTERS"
        yield least, channels, filters(channels, 0.25), images(64, few, few), LIVE_FILTERS, DIRECT
    for tiles in (32, 64, 128, 256):
        for size in (2, 4):  # a tile an image
            least = f"_LEAST_TILES of {size} x {size}"
            yield least, tiles, lambda: layers(wide), images(tiles, size, size), WINOGRAD, ONEDNN
        least = "_LEAST_TILES_OF_LIVE_FILTERS"
        yield least, tiles, filters(wide, 0.1), images(tiles, 4, 4), LIVE_FILTERS, DIRECT
    for rows, cols in ((4, 4), (5, 5), (2, 5), (2, 2)):
        part = 4 * -(-rows // 4) * -(-cols // 4) / (rows * cols)
        yield "_MOST_MULTIPLICATIONS", part, filters(wide, 0.1), images(64, rows, cols), LIVE_FILTERS, DIRECT
    pictures = images(64, 32, 32)
    for width, densities in ((4, (0.3, 0.4, 0.5)), (2, (0.3, 0.35, 0.4)), (1, (0.2, 0.25, 0.3))):
        for density in densities:
            network = resnet((width, width), density)
            yield f"_SPARSE_UP_TO of {width}", density, network, pictures, DIRECT, DENSE_WINOGRAD
    for width, densities in ((4, (0.6, 0.7, 0.8, 0.9)), (2, (0.4, 0.5, 0.6, 0.7)), (1, (0.3, 0.4, 0.5, 0.6))):
        for density in densities:
            network = resnet((width, width, 3, 3), density)
            yield f"_LIVE_UP_TO of {width}", density, network, pictures, LIVE_FILTERS, DENSE_WINOGRAD
    for density in (0.2, 0.3, 0.4):  # almost all filters are live
        yield "_LEAST_KEPT_OF_LIVE", density, resnet((1, 1), density), pictures, LIVE_FILTERS, DIRECT


def gradient(make: Callable[[], nn.Module], x: Tensor, constants: dict[str, object]) -> Callable[[], Tensor]:
    """The input gradient of a network whose kernels were chosen by these constants."""
    torch.manual_seed(0)
    model = make().eval()
    with mock.patch.multiple(fastest_kernel, **constants):
        program = engine.Program(model, x)
        program.fold()
    return lambda model=model: program.gradient(x, lambda logits: logits.square().sum(1))  # keeps the model alive


def cases(device: str, quick: bool) -> Iterator[Case]:
    for constant, value, make, x, with_it, without in comparisons(quick):
        sides = {"ours": gradient(make, x, with_it), "without": gradient(make, x, without)}
        labels = {"op": "input gradient", "constant": constant, "value": value, "images": harness.label_of(x.shape)}
        yield Case(labels, sides)


def summary(records: Sequence[Record]) -> str:
    ratios: dict[str, dict[Value, Value]] = {}
    for record in records:
        ratios.setdefault(str(record["constant"]), {})[record["value"]] = record["ratio"]
    lines = []
    for constant, by_value in ratios.items():
        cells = ", ".join(f"{value:.3g}: {ratio:.2f}" for value, ratio in by_value.items())
        lines.append(
            f"{constant}, now {getattr(fastest_kernel, constant.split()[0])}; times as long without at {cells}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.start(harness.argument_parser(__doc__), arguments)
    print(f"\n{summary(harness.measure(cases(options.device, options.quick), options))}")


if __name__ == "__main__":
    main()
