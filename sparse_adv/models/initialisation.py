"""Weights before the first update."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module, gamma: float = 1.0, linear_std: float | None = None) -> None:
    """Draw the weights anew, in place: convolutions from N(0, 2 / (K R S)) (He, fan-out), biases 0.

    Args:
        model: any network.
        gamma: scale of every BatchNorm2d.
        linear_std: Linear weights come from N(0, linear_std^2); None leaves them as PyTorch drew them.

    Source: He et al., "Delving deep into rectifiers" (ICCV 2015), section 2.2, backward case.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, gamma)
        elif isinstance(module, nn.Linear):
            if linear_std is not None:
                nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
