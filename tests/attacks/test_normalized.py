"""Normalised images: their range is that of the attack, wrong ones are refused, a changed model is attacked."""

import copy
import math

import pytest
import torch
from helpers.attacked import batch, make_model
from torch import nn

from sparse_adv import attacks, engine, models
from sparse_adv.attacks.normalized import Normalized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pixels_may_have_any_range(dtype):
    model, (images, labels) = make_model().eval().to(dtype), batch()
    unit = attacks.PGD(model, eps=0.1, alpha=0.025, steps=3, random_start=False)
    wide = attacks.PGD(
        lambda z: model((z * 127.5 + 127.5) / 255), eps=25.5, alpha=6.375, steps=3, random_start=False, lo=0.0, hi=255.0
    )
    wide.set_normalization_used([127.5], [127.5])
    images = images.to(dtype)
    found = (wide((images * 255 - 127.5) / 127.5, labels) * 127.5 + 127.5) / 255
    assert ((found - images).abs() <= 0.101).all() and found.min() >= -1e-3 and found.max() <= 1.001
    if dtype == torch.float32:
        torch.testing.assert_close(found, unit(images, labels), rtol=0, atol=1e-5)


def test_images_that_were_normalised_otherwise_are_refused():
    images, labels = batch()
    atk = attacks.PGD(make_model(), eps=0.0, steps=1)
    atk.set_normalization_used([0.5] * 3, [0.25] * 3)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got values from"):
        atk((images - 0.5) / 0.05, labels)
    for pixels in (images, images.round()):  # rounding at the ends of the range is no error
        assert atk((pixels - 0.5) / 0.25, labels).isfinite().all()


def test_the_model_that_is_set_is_the_one_under_attack():
    first, second = make_model().eval(), nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).eval()
    images, labels = batch()
    normal = (images - 0.5) / 0.25

    def attack(model):
        atk = attacks.PGD(model, eps=0.1, steps=2, random_start=False)
        atk.set_normalization_used([0.5] * 3, [0.25] * 3)
        return atk

    changed = attack(first)
    changed.model = second
    assert changed.model is second and changed(normal, labels).equal(attack(second)(normal, labels))
    both = attacks.MultiAttack([attacks.FGSM(first), attacks.PGD(first, steps=1)])
    both.model = second
    assert all(member.model is second for member in both.attacks)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or a function of the images, got int"):
        both.model = 3
    assert copy.deepcopy(changed).model is not second


def test_an_evaluation_does_not_ignore_a_normalisation_or_a_mode():
    images, labels = batch()
    for change in (
        lambda atk: atk.set_normalization_used([0.5] * 3, [0.25] * 3),
        lambda atk: atk.set_model_training_mode(True),
    ):
        evaluator = attacks.AutoAttack(
            make_model(), eps=0.05, version="custom", attacks_to_run=["apgd-ce"], verbose=False, seed=0
        )
        evaluator.apgd.n_iter = evaluator.apgd.n_restarts = 1
        change(evaluator)
        for run in (evaluator.run_standard_evaluation, evaluator.run_standard_evaluation_individual):
            with pytest.raises(ValueError, match=r"set_\w+ is for calls of the attack"):
                run(images, labels)
        assert (
            evaluator((images - 0.5) / 0.25 if evaluator.normalization_used else images, labels).shape == images.shape
        )


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize(("lo", "hi"), [(0.0, math.inf), (-math.inf, 1.0)])
def test_a_range_with_one_end_is_a_range(lo, hi, tensors):
    images, labels = batch()
    low, high = (torch.full((3,), bound) if tensors else bound for bound in (lo, hi))
    atk = attacks.PGD(make_model(), eps=0.1, steps=1, lo=low, hi=high)
    assert (atk(images, labels) - images).abs().max() <= 0.1 + 1e-6
    for offset in (-5.0, 5.0):
        outside = images + offset
        if ((outside < lo) | (outside > hi)).any():
            with pytest.raises(ValueError, match="images must lie in"):
                atk(outside, labels)
    atk.set_normalization_used([0.5] * 3, [0.25] * 3)
    with pytest.raises(ValueError, match="images must lie in"):
        atk(torch.where(torch.rand(images.shape) < 0.5, images * 40 - 20, 20 - images * 40), labels)


def test_a_subclass_may_set_its_model_before_its_constructor_ends():
    class Own(attacks.PGD):
        def __init__(self, model):
            self.model = model
            super().__init__(model, eps=0.1)

    model = make_model()
    assert Own(model).model is model


def test_statistics_are_those_of_the_second_dimension(tmp_path):
    torch.manual_seed(0)
    model, features, labels = nn.Linear(6, 3), torch.rand(4, 6), torch.tensor([0, 1, 2, 0])
    for mean in ([0.5], [0.5] * 6):
        attack = attacks.PGD(lambda x: model(x * 0.25 + 0.5), eps=0.1, alpha=0.05, steps=3, random_start=False)
        attack.set_normalization_used(mean, [0.25])
        plain = attacks.PGD(model, eps=0.1, alpha=0.05, steps=3, random_start=False)(features, labels)
        torch.testing.assert_close(attack((features - 0.5) / 0.25, labels), (plain - 0.5) / 0.25)
    attack = attacks.FGSM(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    attack.save([(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))], tmp_path / "adv.pt", verbose=False)
    ((images, _),) = attack.load(tmp_path / "adv.pt", normalize={"mean": [0.5], "std": [0.25]})
    assert images.shape == (2, 1, 2, 2)
    with pytest.raises(
        ValueError, match=r"images must have 3 channels, as mean and std have, got shape \(2, 1, 2, 2\)"
    ):
        attack.load(tmp_path / "adv.pt", normalize={"mean": [0.5] * 3, "std": [0.25] * 3})
    with pytest.raises(ValueError, match="data_loader must hold at least one image, got none"):
        attack.save([(torch.rand(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64))], tmp_path / "none.pt")
    assert not (tmp_path / "none.pt").exists()


def test_the_engine_does_not_try_to_trace_a_normalised_function(caplog):
    images, labels = batch()
    attack = attacks.PGD(lambda x: x.flatten(1), steps=1)
    attack.set_normalization_used([0.5] * 3, [0.25] * 3)
    with caplog.at_level("INFO"):
        attack((images - 0.5) / 0.25, labels)
    assert "the engine" not in caplog.text


@pytest.mark.parametrize("mean", [[0.5, 0.4, 0.3], [0.5]])
def test_the_engine_fuses_a_model_of_normalised_images(mean):
    model = models.build("resnet18", width=8).eval()
    used = Normalized(model, torch.tensor(mean), torch.full((len(mean),), 0.2)).eval()
    assert sum("convolution" in line for line in engine.explain(used, (2, 3, 32, 32))) == 20
    images, labels = (torch.rand(4, 3, 32, 32) - 0.5) / 0.2, torch.arange(4)
    found = []
    for with_engine in (True, False):
        attack = attacks.PGD(model, eps=0.05, steps=2, random_start=False, engine=with_engine)
        attack.set_normalization_used([0.5], [0.2])
        found.append(attack(images, labels))
    differing = (found[0] - found[1]).abs() > 1e-5
    assert differing.double().mean() < 0.01
