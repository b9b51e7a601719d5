"""The start and the steps of PGD with tensors of radii, step sizes and ranges are those with numbers."""

import pytest
import torch

from sparse_adv.attacks import movement
from sparse_adv.attacks.ball import Ball

IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
NUMBERS = {"alpha": 0.2, "eps": 0.25, "lo": 0.1, "hi": 0.9}
TENSORS = {"alpha": (6, 1, 1, 1), "eps": (6, 1, 1, 1), "lo": (3, 1, 1), "hi": (3, 1, 1)}


def steps(norm, **values):
    """Images after the start, and after each of five steps, which lead out of the ball."""
    ball, alpha = Ball(values["eps"], norm, values["lo"], values["hi"]), values["alpha"]
    images = IMAGES.clamp(NUMBERS["lo"], NUMBERS["hi"])
    directions = torch.randn(5, *images.shape, generator=torch.Generator().manual_seed(1)).double()
    made = [movement.start(images, ball, torch.tensor([3, 0]))]
    for grad in directions:
        made.append(movement.step(made[-1], grad, images, alpha, ball))
    return torch.stack(made), images


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_tensor_of_one_value_moves_images_as_the_number(norm, name):
    with_numbers, images = steps(norm, **NUMBERS)
    tensor = torch.full(TENSORS[name], NUMBERS[name], dtype=torch.float64)
    with_tensor, _ = steps(norm, **NUMBERS | {name: tensor})
    torch.testing.assert_close(with_tensor, with_numbers, rtol=0, atol=1e-12)
    lengths = (with_tensor - images).flatten(2).norm(p=float("inf") if norm == "linf" else 2, dim=2)
    assert (lengths <= NUMBERS["eps"] + 1e-9).all() and (lengths[1:] > 0.2 * NUMBERS["eps"]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_each_image_moves_as_it_does_alone(norm):
    eps = torch.linspace(0.05, 0.6, 6).double().view(6, 1, 1, 1)
    together, _ = steps(norm, **NUMBERS | {"eps": eps})
    for i in range(6):
        alone, _ = steps(norm, **NUMBERS | {"eps": eps[i].item()})
        torch.testing.assert_close(together[:, i], alone[:, i], rtol=0, atol=1e-12)
