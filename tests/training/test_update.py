"""The memory layout that updates take on each device."""

import torch

from sparse_adv.training.update import wants_channels_last


def test_channels_last_is_chosen_for_tensor_cores_only():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = [
        wants_channels_last(device, precision)
        for device in (cuda, cpu)
        for precision in ("float32", "bfloat16", "float16")
    ]
    assert chosen == [False, True, True, False, False, False]
