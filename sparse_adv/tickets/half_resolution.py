"""Half resolution for ticket searches: images averaged over squares of 2 x 2 pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sparse_adv.data import Split, to_unit
from sparse_adv.masks.layers import run_once
from sparse_adv.training.checks import pairs_of
from sparse_adv.training.evaluation import Images


class Halved:
    """The batches of another iterable, with images at half resolution.

    This object also has all other attributes of the original batches, such as `set_epoch` and a DataLoader's
    generators.

    Args:
        batches: (images [N, C, H, W], uint8 or float in [0, 1]; labels), with a length.

    Examples:
        >>> import torch
        >>> batches = Halved([(torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]]), torch.tensor([3]))])
        >>> len(batches), [(images.tolist(), labels.tolist()) for images, labels in batches]
        (1, [([[[[0.5]]]], [3])])
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((half(images), labels) for images, labels in pairs_of(self.batches))

    def __getattr__(self, name: str) -> Any:
        if name == "batches" or name.startswith("__"):  # asked of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self.batches, name)


def half(images: Tensor) -> Tensor:
    """Average images over squares of 2 x 2 pixels; a last odd row or column is left out.

    Args:
        images: [N, C, H, W], uint8 or float in [0, 1].

    Returns:
        float32 [N, C, H // 2, W // 2] in [0, 1].

    Examples:
        >>> import torch
        >>> half(torch.tensor([[[[0, 255, 7], [0, 255, 7]]]], dtype=torch.uint8))
        tensor([[[[0.5000]]]])
    """
    return F.avg_pool2d(to_unit(images), 2)


def halved(images: Images | None) -> Images | None:
    """Return validation images at half resolution."""
    if images is None:
        return None
    return Split(half(images.images), images.labels) if isinstance(images, Split) else Halved(images)


def check_takes(model: nn.Module, shape: Sequence[int]) -> None:
    """Check that a model accepts images of half the resolution.

    Args:
        model: runs one forward pass in eval mode and stays as it was.
        shape: [1, C, H, W] of an image of half the resolution.

    Raises:
        ValueError: if it does not, naming the linear layer whose number of inputs depends on the size of the images.

    Examples:
        >>> check_takes(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), (1, 1, 2, 2))
        Traceback (most recent call last):
        ...
        ValueError: half_resolution does not fit the model: its linear layer '1' takes 16 inputs, but gets 4 from \
images of 2 x 2 pixels
    """
    size = " x ".join(map(str, shape[2:]))
    if not all(shape[2:]):
        raise ValueError("half_resolution needs images of at least 2 x 2 pixels")
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):

            def check(layer: nn.Linear, inputs: tuple[Tensor, ...], name: str = name) -> None:
                got = inputs[0].shape[-1] if inputs else layer.in_features
                if got != layer.in_features:
                    raise ValueError(
                        f"half_resolution does not fit the model: its linear layer {name!r} takes {layer.in_features} "
                        f"inputs, but gets {got} from images of {size} pixels"
                    )

            handles.append(layer.register_forward_pre_hook(check))
    try:
        run_once(model, shape)
    except RuntimeError as error:
        raise ValueError(f"half_resolution does not fit the model for images of {size} pixels: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
