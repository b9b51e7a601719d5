"""Auto-PGD: points of the paper's algorithm, results in the ball without slack, optima, more budget is never worse."""

import math

import pytest
import torch
from helpers.attacked import batch, generator, make_model, philox_state, snapshot
from helpers.plain_apgd import ascend, checkpoints
from helpers.searched import Linear
from torch import nn

from sparse_adv.attacks import apgd, apgd_t, eotpgd, losses
from sparse_adv.attacks.apgd_ascent import _checkpoints
from sparse_adv.ops import random_start

RADII = {"linf": 0.03, "l2": 0.4}


def attacked(norm: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model, and images that it classifies as their labels."""
    model, (images, _) = make_model().eval(), batch(size=12)
    return model, images, model(images).argmax(1)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99] and checkpoints(1) == [1] * 8
    for steps in range(1, 200):
        assert list(_checkpoints(steps)) == checkpoints(steps)


@pytest.mark.parametrize(("rho", "steps", "decides"), [(0.0, 40, "stuck"), (1.0, 4, "tie"), (0.75, 100, "few")])
def test_the_points_are_those_of_algorithm_1_of_the_paper(rho, steps, decides):
    """One pixel x in [0.4, 0.6] and the loss -|x - peak|, for many peaks; no image falls."""
    peaks = torch.linspace(0.42, 0.58, 64, dtype=torch.float64)
    points, decided = [], set()

    def model(x):
        points.append(x.detach().clone())
        return torch.stack([torch.ones_like(peaks), -(x.flatten() - peaks).abs()], 1)

    images, labels = torch.full((64, 1, 1, 1), 0.5, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    apgd(model, images, labels, eps=0.1, steps=steps, rho=rho, loss=lambda logits, labels: logits[:, 1])
    taken = torch.stack(points[1:], 1)  # the first is the clean image
    for x, peak, path in zip(images, peaks, taken, strict=True):
        found = ascend(lambda z, peak=peak: -(z - peak).abs().sum(), x, path[0], 0.1, "linf", steps, rho)
        torch.testing.assert_close(path, torch.stack(found.points), rtol=0, atol=1e-12)
        decided |= found.decided
    assert decides in decided


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", [apgd, apgd_t])
def test_results_lie_in_ball_and_box_without_slack(attack, norm):
    model, images, labels = attacked(norm)
    adv = attack(model, images, labels, norm=norm, eps=RADII[norm], steps=12)
    order = math.inf if norm == "linf" else 2
    assert (adv - images).flatten(1).norm(dim=1, p=order).max() <= torch.tensor(RADII[norm])
    assert adv.min() >= 0 and adv.max() <= 1 and not adv.requires_grad
    assert (model(adv).argmax(1) != labels).any()


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_the_optimum_of_a_linear_model_is_reached(norm, loss):
    """With two classes the margin is linear: its maximum in the ball is w x + eps |w|_dual, far from the box."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    images, eps = torch.full((3, 3, 2, 2), 0.5, dtype=torch.float64), 0.1
    model[1].bias.data[0] += 5  # no image falls, so the attack uses all its steps
    labels = torch.zeros(3, dtype=torch.int64)
    weight = model[1].weight[1] - model[1].weight[0]
    gain = eps * weight.norm(p=1 if norm == "linf" else 2)
    adv = apgd(model, images, labels, norm=norm, eps=eps, steps=100, loss=loss)
    rise = losses.margin(model(adv), labels) - losses.margin(model(images), labels)
    torch.testing.assert_close(rise, gain.expand(3), rtol=1e-6 if norm == "linf" else 1e-4, atol=0)


def test_more_budget_never_gives_a_higher_robust_accuracy():
    model, images, labels = attacked("linf")

    def stands(attack, **budget):
        adv = attack(model, images, labels, eps=0.012, generator=generator(), **budget)
        return model(adv).argmax(1) == labels

    for attack, budgets in (
        (apgd, [{"restarts": n, "steps": 5} for n in (1, 2, 4)]),
        (apgd_t, [{"n_target_classes": n, "steps": 5} for n in (1, 2, 4)]),
    ):
        counts = [stands(attack, **budget).sum().item() for budget in budgets]
        assert counts == sorted(counts, reverse=True) and 0 < counts[0] < len(images)


def test_images_that_are_wrong_already_are_returned_as_they_are():
    model, images, labels = attacked("linf")
    wrong = labels.clone()
    wrong[::2] = (wrong[::2] + 1) % 5
    adv = apgd(model, images, wrong, eps=0.03, steps=3)
    assert torch.equal(adv[::2], images[::2]) and not torch.equal(adv[1::2], images[1::2])


def test_the_results_of_an_image_that_stands_have_the_highest_loss_found():
    model, images, labels = attacked("linf")
    for loss in ("ce", "dlr"):
        adv = apgd(model, images, labels, eps=1e-4, steps=10, loss=loss, generator=generator())
        assert (losses.LOSSES[loss](model(adv), labels) > losses.LOSSES[loss](model(images), labels)).all()


def test_a_target_is_reached():
    model, images, labels = attacked("linf")
    targets = (labels + 1) % 5
    adv = apgd(model, images, targets, eps=0.2, steps=30, targeted=True)
    assert (model(adv).argmax(1) == targets).float().mean() > 0.5


@pytest.mark.parametrize("attack", [apgd, apgd_t])
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_model_and_random_state_are_as_found_also_after_an_exception(attack, grad_mode):
    model, images, labels = make_model(), *batch()
    model[3][0].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    failing = nn.Sequential(model, nn.Linear(7, 7)).train()
    model[1].eval()
    before, random_state = snapshot(model), torch.get_rng_state()
    with grad_mode():
        attack(model, images, labels, steps=2, generator=generator())
        with pytest.raises(ValueError, match="labels must lie in"):
            attack(model, images, labels + 5, steps=2, generator=generator())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            attack(failing, images, labels, steps=2, generator=generator())
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), random_state)


def test_averaged_gradients_attack_a_model_that_draws_random_numbers():
    model, images, labels = attacked("linf")
    adv = apgd(lambda x: model(x + 0.01 * torch.randn_like(x)), images, labels, eps=0.1, steps=10, eot_iter=4)
    assert (model(adv).argmax(1) != labels).float().mean() > 0.5


class Noisy(nn.Module):
    """A linear model of two classes under noise, which misclassifies a clean image in 5 % of its passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.linspace(-1, 1, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x - 0.5).flatten(1) @ self.weight + 1.65 * 0.5
        noise = torch.randn(len(x), 1, device=x.device).mul(0.5)
        return torch.cat([score[:, None] + noise, torch.zeros_like(noise)], 1)

    def accuracy(self, x: torch.Tensor) -> float:
        """How often the images are classified as 0, over many passes."""
        with torch.no_grad():
            return torch.stack([self(x).argmax(1) == 0 for _ in range(500)]).double().mean().item()


@pytest.mark.parametrize(("eot_iter", "loss"), [(20, "ce"), (20, "margin"), (2, "ce")])
def test_misclassification_by_chance_does_not_end_the_ascent(eot_iter, loss):
    """At its optimum, the corner of the ball, the model errs in most passes; `eotpgd` goes there in any case."""
    model, images, labels = Noisy(), torch.full((32, 3, 2, 2), 0.5), torch.zeros(32, dtype=torch.int64)
    torch.manual_seed(0)
    options = {"eps": 0.15, "steps": 10, "eot_iter": eot_iter, "loss": loss}
    ours, plain = (
        model.accuracy(attack(model, images, labels, **options, **more))
        for attack, more in ((apgd, {}), (eotpgd, {"alpha": 0.05}))
    )
    assert model.accuracy(images) > 0.9 and plain < 0.45 and ours < plain + 0.02


def test_a_deterministic_model_falls_with_averaged_gradients_where_it_does_with_one():
    model, images, labels = attacked("linf")
    wrong = labels.clone()
    wrong[0] = (wrong[0] + 1) % 5
    fallen = [
        model(apgd(model, images, wrong, eps=0.012, steps=10, eot_iter=eot_iter, generator=generator())).argmax(1)
        != wrong
        for eot_iter in (1, 3)
    ]
    assert fallen[0].equal(fallen[1]) and fallen[0][0] and 1 < fallen[0].sum() < len(images)


def test_with_averaged_gradients_a_misclassified_point_outranks_a_later_one_of_higher_loss():
    """The loss leads away from class 1, where about half of the random starts are."""
    images, labels = torch.full((16, 1, 2, 2), 0.5), torch.zeros(16, dtype=torch.int64)
    fallen = torch.zeros(16, dtype=torch.bool)

    def model(x):
        over = x.flatten(1).mean(1, keepdim=True) - 0.501
        fallen.logical_or_(over.detach().squeeze(1) > 0)
        return torch.cat([torch.zeros_like(over), over], 1)

    def loss(logits, labels):
        return -losses.margin(logits, labels)

    adv = apgd(model, images, labels, eps=0.1, steps=3, eot_iter=2, loss=loss)
    assert fallen.any() and not fallen.all()
    logits = model(adv)
    assert torch.equal(logits.argmax(1) == 1, fallen)
    assert torch.allclose(logits[~fallen, 1], torch.tensor(-0.101))  # the highest loss in the ball


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("steep", [torch.nan, torch.inf])
def test_pixels_whose_gradients_are_not_finite_stay_and_the_others_move(norm, steep):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.cat([gradient[:, :1] * steep, gradient[:, 1:]], 1)

    def model(x):
        score = Steep.apply(x.flatten(1)).sum(1, keepdim=True)
        return torch.cat([score + 9, 2 * score], 1)  # no image falls

    images, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    start = (random_start(images, 0.1, norm=norm, seed=philox_state()) - images).flatten(1)
    moved = (apgd(model, images, labels, eps=0.1, norm=norm, steps=10, generator=generator()) - images).flatten(1)
    assert (moved[:, 0].abs() <= start[:, 0].abs() + 1e-6).all()  # a step of the others may be projected
    assert moved.norm(dim=1, p=math.inf if norm == "linf" else 2).max() <= 0.1
    assert (moved[:, 1:] > 0.05 if norm == "linf" else moved[:, 1:].sum(1) > 0.1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"restarts": 0}, "restarts must be an integer of at least 1, got 0"),
        ({"rho": 1.5}, "rho must lie in"),
        ({"eot_iter": 0}, "eot_iter must be an integer of at least 1, got 0"),
        ({"norm": "l1"}, 'norm must be "linf" or "l2"'),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    for attack in (apgd, apgd_t):
        with pytest.raises(ValueError, match=message):
            attack(make_model(), *batch(), **options)


@pytest.mark.parametrize(("attack", "options", "least"), [(apgd_t, {}, 4), (apgd, {"loss": "dlr"}, 3)])
@pytest.mark.parametrize("wrong", [0, 1])
def test_too_few_classes_for_the_loss_are_refused_whether_images_are_robust_or_not(attack, options, least, wrong):
    for classes in range(2, least + 1):
        model = Linear(classes, (3, 8, 8))
        images, _ = batch()
        labels = (model(images).argmax(1) + wrong) % classes
        if classes == least:
            assert attack(model, images, labels, steps=1, **options).shape == images.shape
            continue
        with pytest.raises(ValueError, match=f"needs logits of at least {least} classes, got {classes}"):
            attack(model, images, labels, **options)


def test_empty_batches_and_other_dtypes():
    model, images, labels = attacked("linf")
    assert apgd(model, images[:0], labels[:0]).shape == (0, 3, 8, 8)
    assert apgd(model.double(), images.double(), labels.int(), steps=2).dtype == torch.float64
