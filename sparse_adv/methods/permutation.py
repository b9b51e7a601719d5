"""A channel permutation in the middle of training: momentum, BatchNorm and moving average move with the weights."""

from __future__ import annotations

import logging

import torch

from sparse_adv import masks
from sparse_adv.config import MethodConfig
from sparse_adv.masks import ChannelPermutation
from sparse_adv.training import distributed
from sparse_adv.training.update import Updater

log = logging.getLogger(__name__)


def permute_before_pruning(updater: Updater, config: MethodConfig) -> tuple[float, float]:
    """Permute channels so that the blocks that pruning will keep hold more of the weights.

    The functions of the network and of its moving average stay the same. All processes take the permutation of rank 0.
    `masks.permute_channels` finds it.

    Args:
        updater: of the run; its model has no masks, or masks that keep everything.
        config: gives density, block, scope and `linear` of the pruning; with gmp, of its last change.

    Returns:
        Fraction of the squared weights in the blocks that the pruning would keep, before and after.

    Raises:
        ValueError: if torch.fx cannot trace the model.
    """
    config = config.resolved()
    assert config.scope is not None and updater.image_shape is not None
    found = masks.permute_channels(
        updater.model, config.density, config.block, updater.image_shape, scope=config.scope, linear=config.linear
    )
    orders = [order.to(updater.device) for order in found.channels.values()]
    distributed.broadcast(orders)
    channels = {group: order.cpu() for group, order in zip(found.channels, orders, strict=True)}
    apply(updater, ChannelPermutation(channels, found.retained))
    log.info("channels permuted: the blocks kept hold %.3f of the squared weights, not %.3f", *reversed(found.retained))
    return found.retained


def apply(updater: Updater, permutation: ChannelPermutation) -> None:
    """Permute the model of a run, the optimiser's momentum and the moving average in place."""
    momentum = {}
    for name, parameter in updater.model.named_parameters():
        buffer = updater.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            momentum[name] = buffer
    permuted = permutation.permute_state_dict(updater.model.state_dict() | momentum)
    with torch.no_grad():
        for name, buffer in momentum.items():
            buffer.copy_(permuted[name])
    permutation.apply(updater.model)
    if updater.ema is not None:
        permutation.apply(updater.ema.module)
