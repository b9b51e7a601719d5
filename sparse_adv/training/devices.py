"""What training does differently on a GPU."""

from __future__ import annotations

import torch


def reads_at_once(device: torch.device) -> bool:
    """Whether reading a number there is free; a GPU would have to finish first all that it was given."""
    return device.type != "cuda"


def wants_channels_last(device: torch.device, precision: str) -> bool:
    """Whether convolutions run on tensor cores, which take 16-bit images with their channels last."""
    return device.type == "cuda" and precision != "float32"
