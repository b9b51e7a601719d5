"""Runs on few digits: flags of commands, what the commands print, and a network that they read."""

import json

from torch import Tensor

from sparse_adv import masks, models

NETWORK = ("--arch", "digits_cnn", "--width", "8", "--limit", "200")
QUICK = ("--epochs", "2", "--eps", "0.1", "--objective", "fgsm-rs", "--evaluation-steps", "2")


def lines(capsys) -> list[dict]:
    """The JSON lines that were printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def pruned_state(width: int) -> dict[str, Tensor]:
    """The state dict of a dense network of the digits with 90 % of its weights at zero in every layer."""
    model = models.build("digits_cnn", width=width)
    for name, mask in masks.prune(model, 0.1, scope="uniform", linear=True).items():
        model.get_submodule(name).weight.data.mul_(mask)
    return model.state_dict()
