"""Random number generators for one attack."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_adv.ops.arguments import check_integer
from sparse_adv.ops.random_start import as_philox_state


def private_generator(generator: torch.Generator | None, images: Tensor) -> torch.Generator:
    """A generator on the images' device, seeded with one number from a generator; None for PyTorch's global one."""
    seed = int(as_philox_state(generator, "generator")[0]) & (2**63 - 1)
    # `run_search` refuses images of a wrong type and images on the meta device.
    device = images.device if isinstance(images, Tensor) and not images.is_meta else "cpu"
    return torch.Generator(device).manual_seed(seed)


def seeded_generator(seed: int) -> torch.Generator:
    """A new generator with the user's seed."""
    check_integer("seed", seed)
    return torch.Generator().manual_seed(int(seed))
