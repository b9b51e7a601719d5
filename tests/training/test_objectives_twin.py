"""Each objective trains as a plain loop of PyTorch that follows its paper or its authors' code, written out here."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.small_runs import QUICK, TEST, TRAIN, WITH_ENGINE, batches, network
from torch import Generator, Tensor, nn

from sparse_adv import data, masks, ops, training
from sparse_adv.nn import sparsify
from sparse_adv.nn.masked_layer import MaskedLayer
from sparse_adv.training import distributed, objectives
from sparse_adv.training.objectives.nuclear_norm import nuclear_norm
from sparse_adv.training.random_numbers import Stream

EPS = 0.05
CONFIG = replace(
    QUICK,
    eps=EPS,
    alpha=None,
    epochs=5,
    schedule="onecycle",
    label_smoothing=0.2,
    ema_decay=0.3,
    weight_decay=0.01,
    overfitting_monitor=False,
)
BATCHES = [(data.to_unit(TRAIN.images[i : i + 32]).double(), TRAIN.labels[i : i + 32]) for i in (0, 32, 64)]


def input_gradient(model: nn.Module, x: Tensor, loss) -> Tensor:
    model.eval()
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x)), x)
    model.train()
    return gradient


def project(adv: Tensor, x: Tensor) -> Tensor:
    return (adv.clamp(x - EPS, x + EPS)).clamp(0, 1)


def random_signs(x: Tensor, noise: Generator) -> Tensor:
    return ops.random_start(torch.zeros_like(x), 1.0, norm="linf", seed=noise, lo=-1, hi=1).sign()


class Twin:
    """What the loss of an update needs of those before it."""

    def __init__(self, smoothing: float = 0.2, epochs: int = 5) -> None:
        self.smoothing, self.epochs = smoothing, epochs
        self.epoch = self.update = 0

    def begin_epoch(self, epoch: int) -> None:
        self.epoch, self.update = epoch, 0

    def ce(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.smoothing)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        return self.ce(model(adv), y)


class FGSMRS(Twin):
    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator) -> Tensor:
        start = ops.random_start(x, EPS, norm="linf", seed=noise)
        gradient = input_gradient(model, start, lambda logits: self.ce(logits, y))
        return project(start + 1.25 * EPS * gradient.sign(), x)


class FGSMRSCS(Twin):
    previous = None

    def begin_epoch(self, epoch: int) -> None:
        self.previous = torch.stack(self.losses).mean() if epoch else None
        self.losses = []
        super().begin_epoch(epoch)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator) -> Tensor:
        self.start = ops.random_start(x, EPS, norm="linf", seed=noise)
        gradient = input_gradient(model, self.start, lambda logits: self.ce(logits, y))
        return (self.start + EPS * gradient.sign()).clamp(0, 1)

    def soft_ce(self, logits: Tensor, y: Tensor) -> Tensor:
        eye, classes = torch.eye(2, dtype=logits.dtype)[y], 2
        wanted = eye * (1 - self.smoothing) + (1 - eye) * self.smoothing / (classes - 1)
        wanted = (1 - self.smoothing) * wanted + self.smoothing / classes  # by PyTorch
        return -(wanted * logits.log_softmax(1)).sum(1).mean()

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        loss, start_loss = self.soft_ce(model(adv), y), self.soft_ce(model(self.start), y)
        self.losses.append(start_loss.detach())
        if 1 < self.epoch < self.epochs - 1 and (start_loss - self.previous).abs() > 0.03:
            loss = loss + start_loss if start_loss > self.previous else loss - start_loss
        return loss


class FGSMUAP(Twin):
    prior = None

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator) -> Tensor:
        if self.prior is None:
            self.prior, self.momentum = 1.25 * EPS * random_signs(x[:1], noise)[0], torch.zeros_like(x[0])
        self.start = (x + self.prior.clamp(-EPS, EPS)).clamp(0, 1)
        gradient = input_gradient(model, self.start, lambda logits: self.ce(logits, y))
        self.momentum = (gradient / gradient.abs().sum()).mean(0) + 0.3 * self.momentum
        self.prior = (self.prior + 1.25 * EPS * self.momentum.sign()).clamp(-1.25 * EPS, 1.25 * EPS)
        return project(self.start + EPS * gradient.sign(), x)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        attacked = model(adv)
        return self.ce(attacked, y) + 10 * (attacked - model(self.start)).square().mean()


class NuAT(Twin):
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        weight = 4 * self.epoch / self.epochs
        return weight * torch.linalg.matrix_norm(first - second, "nuc") / len(first)

    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator) -> Tensor:
        start = (x + EPS / 2 * random_signs(x, noise)).clamp(0, 1)
        clean = model.eval()(x).detach()

        def raised(logits: Tensor) -> Tensor:
            return self.ce(logits, y) + (self.distance(clean, logits) if self.update % 2 else 0)

        gradient = input_gradient(model, start, raised)
        self.update += 1
        return project(start + EPS * gradient.sign(), x)

    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        attacked, clean = model(adv), model(x)
        return self.ce(clean, y) + self.distance(clean, attacked)


class PGD(Twin):
    def craft(self, model: nn.Module, x: Tensor, y: Tensor, noise: Generator) -> Tensor:
        adv = ops.random_start(x, EPS, norm="linf", seed=noise)
        for _ in range(CONFIG.steps):
            gradient = input_gradient(model, adv, lambda logits: F.cross_entropy(logits, y))
            adv = project(adv + EPS / 4 * gradient.sign(), x)
        return adv


class MART(PGD):
    def loss(self, model: nn.Module, x: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        p, logits = model(x).softmax(1), model(adv)
        q = logits.softmax(1)
        ranked = q.argsort(1)
        wrong = torch.where(ranked[:, -1] == y, ranked[:, -2], ranked[:, -1])
        margin = F.nll_loss((1.0001 - q).log(), wrong)
        divergence = (p * (p.log() - q.log())).sum(1) * (1 - p[torch.arange(len(y)), y])
        return self.ce(logits, y) + margin + 5 * divergence.mean()


TWINS = {
    "fgsm-rs": FGSMRS,
    "fgsm-rs-cs": FGSMRSCS,
    "fgsm-uap": FGSMUAP,
    "nu-at": NuAT,
    "pgd": PGD,
    "mart": MART,
}


def weight_perturbation(model: nn.Module, loss) -> dict[str, Tensor]:
    """That of the authors' code of AWP: a step of a proxy, scaled to the norm of the weights."""
    proxy = copy.deepcopy(model)
    optimizer = torch.optim.SGD(proxy.parameters(), 0.01)
    (-loss(proxy)).backward()
    optimizer.step()
    change = {}
    for name, weight in model.state_dict().items():
        if weight.dim() > 1 and "weight" in name:
            moved = proxy.state_dict()[name] - weight
            change[name] = weight.norm() / (moved.norm() + 1e-20) * moved
    return change


def add(model: nn.Module, change: dict[str, Tensor], scale: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in change:
                parameter.add_(change[name], alpha=scale)


@pytest.mark.parametrize(("awp_gamma", "warmup"), [(0.0, 0.0), (0.05, 0.0), (0.05, 1.5)])
@pytest.mark.parametrize("objective", TWINS)
def test_training_is_a_plain_loop_with_onecycle_label_smoothing_and_average(objective, awp_gamma, warmup):
    config = replace(CONFIG, objective=objective, awp_gamma=awp_gamma, awp_warmup_epochs=warmup)
    trained = network().double()
    run = training.Training(trained, BATCHES, config)
    list(run.epochs())

    plain, twin = network().double(), TWINS[objective]()
    optimizer = torch.optim.SGD(plain.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=len(BATCHES) * config.epochs)
    average, updates = {}, 0
    for epoch in range(config.epochs):
        noise = Generator().manual_seed(distributed.own_seed(config.seed, Stream.ATTACKS, epoch))
        twin.begin_epoch(epoch)
        for x, y in BATCHES:
            adv = twin.craft(plain.train(), x, y, noise)
            plain.train()
            gamma = awp_gamma if updates >= warmup * len(BATCHES) else 0.0

            def loss(model, x=x, adv=adv, y=y):
                return twin.loss(model, x, adv, y)

            change = weight_perturbation(plain, loss) if gamma else {}
            if gamma and objective == "fgsm-rs-cs":
                twin.losses.pop()  # that of the proxy
            add(plain, change, gamma)
            optimizer.zero_grad()
            loss(plain).backward()
            add(plain, change, -gamma)
            optimizer.step()
            if updates + 1 < len(BATCHES) * config.epochs:
                schedule.step()
            decay = min(config.ema_decay, updates / (updates + 9))
            for name, value in plain.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * value if updates else value.clone()
            updates += 1
    for name, value in plain.state_dict().items():
        assert torch.allclose(trained.state_dict()[name], value, rtol=1e-7, atol=1e-9), name
        if value.is_floating_point():
            assert torch.allclose(run.evaluated.state_dict()[name], average[name], rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("objective", ["fgsm-rs-cs", "fgsm-uap", "nu-at", "mart"])
def test_every_setting_of_an_objective_reaches_its_update(objective):
    weights = []
    for change in ({}, {"label_smoothing": 0.0}, {"awp_gamma": 0.02}, {"beta": 0.5}, {"seed": 1}):
        model = network().double()
        training.train(model, BATCHES, replace(CONFIG, objective=objective, **change))
        weights.append(model[0].weight.detach())
        assert not change or not torch.allclose(weights[0], weights[-1], rtol=1e-6), change


@pytest.mark.parametrize("objective", [name for name in training.OBJECTIVES if name != "natural"])
def test_every_objective_makes_a_network_robust(objective):
    config = replace(
        WITH_ENGINE,
        objective=objective,
        alpha=None,
        epochs=12,
        lr=0.03,
        eps=0.1,
        replays=2,
        label_smoothing=0.1,
        ema_decay=0.9,
    )
    records = training.train(network(), batches(), replace(config, awp_gamma=0.005), validation=TEST)
    assert records[-1].robust_accuracy > 0.9


@pytest.mark.parametrize("shape", [(128, 10), (7, 10), (16, 100), (3, 3)])
@pytest.mark.parametrize("least", [1.0, 1e-4, 0.0])
def test_the_nuclear_norm_is_that_of_the_singular_values(shape, least):
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1, least, min(shape), dtype=torch.float64)
    matrix = (left * values @ right).requires_grad_()
    norm = nuclear_norm(matrix)
    norm.backward()
    assert norm.item() == pytest.approx(values.sum().item(), rel=1e-9)
    kept = left[:, values > 0] @ right[values > 0]
    assert torch.allclose(matrix.grad, kept, atol=1e-8)


def test_the_nuclear_norm_of_zeros_is_zero_and_of_nan_nan():
    zeros = torch.zeros(4, 3, requires_grad=True)
    nuclear_norm(zeros).backward()
    assert zeros.grad.equal(torch.zeros(4, 3)) and nuclear_norm(torch.full((4, 3), torch.nan)).isnan()


@pytest.mark.parametrize("schedule", ["onecycle", "piecewise"])
def test_smooth_convergence_rests_where_the_learning_rate_changes(schedule):
    config = replace(CONFIG, objective="fgsm-rs-cs", epochs=12, schedule=schedule, milestones=(0.5, 0.75))
    built, active = objectives.build(config), []
    for epoch in range(12):
        built.begin_epoch(epoch)
        built.total = torch.tensor([10.0, 5.0])
        active.append(built.compares)
        assert not built.compares or built.level.like(built.total) == 2
        assert built.passes == ((1, 1, 2, 0, 0) if active[-1] else (2, 1, 1, 0, 0))
    expected = [2, 3, 4, 5, 6, 7, 8, 9, 10] if schedule == "onecycle" else [2, 3, 4]
    assert [epoch for epoch in range(12) if active[epoch]] == expected


@pytest.mark.parametrize("objective", ["fgsm-rs", "fgsm-uap", "trades"])
def test_pruned_weights_stay_zero_under_adversarial_weights_and_averaging(objective):
    model = network()
    sparsify(model, masks.prune(model, density=0.5))
    config = replace(CONFIG, objective=objective, awp_gamma=0.1, engine=True)
    run = training.Training(model, batches(), config)
    list(run.epochs())
    for trained in (model, run.evaluated):
        layers = [module for module in trained.modules() if isinstance(module, MaskedLayer)]
        assert len(layers) >= 2
        for layer in layers:
            assert layer.weight[~layer.weight_mask].count_nonzero() == 0
            assert layer.weight[layer.weight_mask].count_nonzero() > 0
