"""Errors of `pgd_step_normalized`; test_devices.py and test_cuda_on_host.py test its values."""

import pytest
import torch

from sparse_adv.ops import pgd_step_normalized

IMAGES = torch.rand(2, 3, 4, 5)
STATISTICS = torch.rand(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adv": IMAGES.double(), "clean": IMAGES.double()}, TypeError, "adv must be float32, got torch.float64"),
        ({"mean": STATISTICS[0].double()}, TypeError, "mean must be float32, got torch.float64"),
        ({"std": torch.ones(1)}, ValueError, r"std must have shape \[3\], got \(1,\)"),
        ({"std": STATISTICS[1].to("meta")}, ValueError, "std is on meta, adv on cpu"),
        ({"clean": IMAGES[:1]}, ValueError, r"clean has shape \(1, 3, 4, 5\), adv \(2, 3, 4, 5\)"),
        (
            {name: IMAGES[0] for name in ("adv", "grad", "clean")},
            ValueError,
            r"adv must be \[N, C, H, W\], got shape \(3",
        ),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ],
)
def test_bad_input_is_reported_by_name_and_value(change, error, message):
    arguments = {"adv": IMAGES, "grad": IMAGES, "clean": IMAGES, "mean": STATISTICS[0], "std": STATISTICS[1]}
    with pytest.raises(error, match=message):
        pgd_step_normalized(**{**arguments, "alpha": 0.1, "eps": 0.2, **change})


def test_the_input_of_the_network_is_channels_last_whatever_the_images_are():
    for format in (torch.contiguous_format, torch.channels_last):
        images = IMAGES.contiguous(memory_format=format)
        _, normalized = pgd_step_normalized(images, images, images, *STATISTICS, alpha=0.1, eps=0.2)
        assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_it_compiles_as_one_graph():
    tensors, numbers = (IMAGES, IMAGES - 0.5, IMAGES, *STATISTICS), {"alpha": 0.1, "eps": 0.2}
    compiled = torch.compile(pgd_step_normalized, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*tensors, **numbers), pgd_step_normalized(*tensors, **numbers), strict=True):
        assert torch.equal(actual, expected)


def test_an_empty_batch():
    moved, normalized = pgd_step_normalized(*[IMAGES[:0]] * 3, *STATISTICS, alpha=0.1, eps=0.2)
    assert moved.shape == normalized.shape == (0, 3, 4, 5)
