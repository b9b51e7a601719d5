"""Searches on models and images of 16 bits, and on models whose logits have another dtype than the images."""

import pytest
import torch
from torch import Tensor, nn

from sparse_adv import attacks
from sparse_adv.attacks import losses

SEARCHES = {
    "apgd": lambda *batch, norm: attacks.apgd(*batch, eps=0.2, steps=5, norm=norm),
    "apgd_t": lambda *batch, norm: attacks.apgd_t(*batch, eps=0.2, steps=3, norm=norm, n_target_classes=2),
    "square": lambda *batch, norm: attacks.square(*batch, eps=0.2, queries=20, norm=norm),
    "fab": lambda *batch, norm: attacks.fab(*batch, steps=4, restarts=2, norm=norm),
    "fab_t": lambda *batch, norm: attacks.fab_t(*batch, steps=3, norm=norm, n_target_classes=2),
    "fmn": lambda *batch, norm: attacks.fmn(*batch, steps=20, norm=norm),
    "deepfool": lambda *batch, norm: attacks.deepfool(*batch, steps=8),
    "cw": lambda *batch, norm: attacks.cw(*batch, c=10.0, steps=20, lr=0.05),
}
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def tiny_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()


class Inside(nn.Module):
    """A model that computes in another dtype than that of the images, and returns it."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.dtype))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    images = torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return images.to(dtype), tiny_cnn()(images).argmax(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("images_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_may_have_any_dtype(name, norm, images_dtype, dtype):
    images, labels = batch(images_dtype)
    adv = SEARCHES[name](Inside(tiny_cnn(), dtype), images, labels, norm=norm)
    assert adv.dtype == images.dtype and adv.shape == images.shape
    assert bool(((adv >= 0) & (adv <= 1)).all())


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_run_under_autocast(name):
    with torch.autocast("cpu", torch.bfloat16):
        adv = SEARCHES[name](tiny_cnn(), *batch(), norm="linf")
    assert adv.dtype == torch.float32 and bool(adv.isfinite().all())


def test_a_loss_may_have_another_dtype_than_the_logits():
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(logits.double(), labels)

    expected = attacks.apgd(tiny_cnn(), *batch(), steps=5, loss="ce", generator=torch.Generator().manual_seed(1))
    actual = attacks.apgd(tiny_cnn(), *batch(), steps=5, loss=loss, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("scale", [0.0, 1e-7])
def test_gradients_that_16_bits_cannot_hold_move_no_image_out_of_the_numbers(dtype, scale):
    """They are 0, or their squares are."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).to(dtype)
    with torch.no_grad():
        model[1].weight.mul_(scale)
        model[1].bias.copy_(torch.arange(5))
    images, labels = batch(dtype)[0], torch.full((12,), 4)
    for name in ("apgd", "apgd_t", "fab", "fmn", "deepfool"):
        assert SEARCHES[name](model, images, labels, norm="l2").isfinite().all(), name
    evaluator = attacks.AutoAttack(
        model, norm="l2", eps=0.1, version="custom", attacks_to_run=["apgd-ce", "fab-t"], verbose=False, seed=0
    )
    evaluator.apgd.n_iter = evaluator.fab.n_iter = 3
    evaluator.run_standard_evaluation(images, labels)
    assert set(evaluator.result.accuracy.values()) == {1.0}


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_equal_logits_have_the_loss_zero(dtype):
    logits, labels = torch.zeros(2, 5, dtype=dtype), torch.tensor([0, 1])
    assert losses.dlr(logits, labels).eq(0).all() and losses.targeted_dlr(logits, labels, 1 - labels).eq(0).all()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("name", ["fab", "fmn", "deepfool", "cw"])
def test_16_bits_lose_few_of_the_examples(name, dtype):
    model, (images, labels) = tiny_cnn(), batch()
    wrong = []
    for kind in (torch.float32, dtype):
        x = images.round(decimals=1).to(kind)  # with pixels at both ends of the range
        adv = SEARCHES[name](model.to(kind), x, labels, norm="l2")
        wrong.append((model(adv).argmax(1) != labels).float().mean())
    assert wrong[0] == 1 and wrong[1] >= 0.9
