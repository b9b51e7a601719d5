"""Masks and optimisers in several threads: pruned weights stay zero, and no step is lost."""

import sys
from threading import Thread

import torch

from sparse_adv.nn import MaskedLinear


def test_masks_change_while_optimisers_make_their_first_steps_in_another_thread():
    layers = [MaskedLinear(2, 2) for _ in range(2)]
    layers[0].weight.data.zero_()
    layers[0].weight.grad = torch.ones(2, 2)
    kept, before = torch.eye(2, dtype=torch.bool), layers[1].weight.detach().clone()
    optimizers = [torch.optim.SGD(layers[0].parameters(), lr=0.125) for _ in range(500)]

    def make_steps():
        for optimizer in optimizers:
            optimizer.step()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = Thread(target=make_steps)
        thread.start()
        while thread.is_alive():
            layers[1].set_mask(torch.ones_like(kept))
            layers[1].set_mask(kept)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert layers[0].weight.eq(-0.125 * len(optimizers)).all()
    assert layers[1].weight.equal(before * kept) and layers[1].weight_mask.equal(kept)
