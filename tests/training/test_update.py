"""The memory layout and the precision that updates take on each device."""

import torch

from sparse_adv.config import TrainConfig
from sparse_adv.training import train
from sparse_adv.training.update import wants_channels_last


def test_channels_last_is_chosen_for_tensor_cores_only():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    chosen = [
        wants_channels_last(device, precision)
        for device in (cuda, cpu)
        for precision in ("float32", "bfloat16", "float16")
    ]
    assert chosen == [False, True, True, False, False, False]


def test_float16_on_a_cpu_is_told_to_be_slow(caplog):
    batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))]
    for precision in ("float32", "float16"):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        train(model, batches, TrainConfig("natural", epochs=1, precision=precision))
    assert [message for message in caplog.messages if "float16" in message] == [
        "precision 'float16' is slow on a CPU: 6 to 60 times as long as float32, as measured"
    ]
