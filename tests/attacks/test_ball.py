"""The ball of a batch: tensors of radii lose nothing but what the dtype of the images cannot hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_adv.attacks.ball import Ball

radii = st.lists(st.floats(0, 4).filter(lambda eps: eps == 0 or eps > 1e-6), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@given(radii)
def test_radii_are_rounded_down_and_never_up(dtype, radii):
    eps, images = torch.tensor(radii, dtype=torch.float64), torch.zeros(len(radii), 3, 2, 2, dtype=dtype)
    held = Ball(eps, "linf", 0.0, 1.0).on(images).eps
    assert held.dtype == dtype and held.shape == (len(radii), 1, 1, 1)
    held, unit = held.double().flatten(), torch.finfo(dtype).eps
    assert (held <= eps).all() and (held >= eps * (1 - 2 * unit) - torch.finfo(dtype).tiny).all()
