"""Settings of devices: the memory layout that training takes on each."""

import torch

from sparse_adv.training import devices


def test_channels_last_is_chosen_for_tensor_cores_only():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = [
        devices.wants_channels_last(device, precision)
        for device in (cuda, cpu)
        for precision in ("float32", "bfloat16", "float16")
    ]
    assert chosen == [False, True, True, False, False, False]
