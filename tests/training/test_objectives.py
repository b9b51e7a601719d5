"""Objectives: each loss is compared with its formula, written out here."""

import pytest
import torch
import torch.nn.functional as F
from helpers.small_runs import TRAIN, network

from sparse_adv import attacks, data
from sparse_adv.training import TrainConfig, adversarial_loss, objectives

X, Y = data.to_unit(TRAIN.images[:16]), TRAIN.labels[:16]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def craft(objective: str, model: torch.nn.Module, **settings) -> torch.Tensor:
    built = objectives.build(TrainConfig(objective=objective, eps=0.1, **settings), check=True)
    return built.craft(model, X, Y, generator())


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("natural", lambda model: X),
        ("fgsm", lambda model: attacks.fgsm(model, X, Y, eps=0.1)),
        ("fgsm-rs", lambda model: attacks.fgsm_rs(model, X, Y, eps=0.1, alpha=0.125, generator=generator())),
        ("n-fgsm", lambda model: attacks.n_fgsm(model, X, Y, eps=0.1, alpha=0.1, generator=generator())),
        ("pgd", lambda model: attacks.pgd(model, X, Y, eps=0.1, alpha=0.025, steps=10, generator=generator())),
        ("trades", lambda model: attacks.tpgd(model, X, eps=0.1, alpha=0.025, steps=10, generator=generator())),
    ],
)
def test_the_images_are_those_of_the_attack_with_the_step_size_of_its_paper(objective, expected):
    model = network().train()
    assert craft(objective, model).equal(expected(model))


@pytest.mark.parametrize("objective", ["natural", "fgsm", "fgsm-rs", "n-fgsm", "pgd"])
def test_the_loss_is_cross_entropy_on_the_crafted_images(objective):
    model = network().eval()
    loss = adversarial_loss(model, X, Y, objective, eps=0.1, generator=generator())
    assert loss.item() == pytest.approx(F.cross_entropy(model(craft(objective, model)), Y).item(), rel=1e-6)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_loss_of_trades_follows_its_formula():
    model = network().eval()
    with torch.no_grad():
        model[-1].weight.mul_(20)  # confident: else the divergence is the same in both directions
    loss = adversarial_loss(model, X, Y, "trades", eps=0.1, beta=3.0, generator=generator())
    p, q = (model(images).double().softmax(1) for images in (X, craft("trades", model)))
    divergence, reverse = (p * (p / q).log()).sum(1).mean(), (q * (q / p).log()).sum(1).mean()
    assert abs(divergence - reverse) > 0.01 * divergence
    expected = -p[torch.arange(16), Y].log().mean() + 3.0 * (p * (p / q).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_attack_of_trades_raises_the_divergence_within_the_ball_and_leaves_the_model_alone():
    model = network().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adv = attacks.tpgd(model, X, eps=0.1, alpha=0.025, steps=10, generator=generator())
    assert (adv - X).abs().max() <= 0.1 + 1e-6 and adv.min() >= 0 and adv.max() <= 1
    assert model.training and all(value.equal(before[key]) for key, value in model.state_dict().items())
    model.eval()
    noise = attacks.tpgd(model, X, eps=0.1, alpha=0.0, steps=1, generator=generator())

    def divergence(images: torch.Tensor) -> torch.Tensor:
        return F.kl_div(model(images).log_softmax(1), model(X).log_softmax(1), reduction="sum", log_target=True)

    assert divergence(adv) > 10 * divergence(noise)


def test_free_updates_its_perturbation_with_the_gradient_of_the_update():
    config = TrainConfig(objective="free", eps=0.1, replays=3)
    free, model = objectives.build(config), network()
    delta = torch.zeros_like(X)
    for _ in range(3):
        expected = (X + delta).clamp(0, 1)
        adv = free.craft(model, X, Y, None)
        assert adv.equal(expected)
        free.loss(model, X, adv, Y).backward()
        delta = (delta + 0.1 * adv.grad.sign()).clamp(-0.1, 0.1)
        free.after_update()
    assert free.updates == 3 and free.state_dict()["delta"].equal(delta) and delta.abs().max() > 0
    assert free.craft(model, X[:5], Y[:5], None).equal((X[:5] + delta[:5]).clamp(0, 1))  # a smaller last batch


def test_free_has_no_loss_of_one_batch():
    with pytest.raises(ValueError, match="free"):
        adversarial_loss(network(), X, Y, "free")


def test_adversarial_loss_validates_batch_and_arguments():
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        adversarial_loss(network(), X + 1, Y, "natural")
    with pytest.raises(ValueError, match="eps must be finite"):
        adversarial_loss(network(), X, Y, "pgd", eps=-1.0)


@pytest.mark.parametrize(
    "change", [{"eps": 0.2}, {"norm": "l2"}, {"alpha": 0.01}, {"steps": 3}, {"beta": 2.0}], ids=str
)
def test_every_argument_of_an_adversarial_loss_reaches_its_objective(change):
    model, settings = network().eval(), {"objective": "mart", "eps": 0.1, "label_smoothing": 0.25} | change
    built = objectives.build(TrainConfig(**settings))
    expected = built.loss(model, X, built.craft(model, X, Y, generator()), Y)
    found = adversarial_loss(model, X, Y, generator=generator(), **settings)
    # Two equal calls may differ in the last bit: dense layers depend on the alignment of their memory.
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and found.requires_grad
    default = adversarial_loss(model, X, Y, "mart", generator=generator(), eps=0.1, label_smoothing=0.25)
    assert found.item() != pytest.approx(default.item(), rel=1e-5)


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_the_step_of_smooth_convergence_leaves_the_ball_around_the_clean_images(share):
    built = objectives.build(TrainConfig(objective="fgsm-rs-cs", eps=0.1, alpha=share * 0.1))
    model, x = network(), torch.rand(8, 1, 6, 6) * 0.4 + 0.3
    adv = built.craft(model, x, torch.arange(8) % 2, torch.Generator().manual_seed(0))
    moved = (adv - built.start).abs()
    assert (built.start - x).abs().max() <= 0.1 + 1e-6
    assert torch.allclose(moved[moved > 1e-6], torch.tensor(share * 0.1), atol=1e-6)
    assert (moved > 1e-6).float().mean() > 0.5 and (adv - x).abs().max() > share * 0.1


def test_smooth_convergence_smooths_its_labels_twice_as_the_benchmark_does():
    built = objectives.build(TrainConfig(objective="fgsm-rs-cs", label_smoothing=0.4))
    logits, y = torch.randn(8, 10, dtype=torch.float64), torch.arange(8)
    wanted = torch.full_like(logits, 0.2 / 3).scatter_(1, y[:, None], 0.4)
    expected = -(wanted * logits.log_softmax(1)).sum(1).mean()
    assert built.cross_entropy(logits, y).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.4])
def test_labels_of_fgsm_rs_cs_add_up_to_1_in_16_bits(smoothing):
    made = objectives.build(TrainConfig("fgsm-rs-cs", label_smoothing=smoothing, eps=0.1))
    logits, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    narrow = logits.bfloat16()
    assert made.cross_entropy(narrow, labels).item() == pytest.approx(made.cross_entropy(narrow.float(), labels).item())
