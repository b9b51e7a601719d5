"""The attacks: what they compute, and that they leave everything else alone."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import attacks, masks, sparsify
from sparse_adv.attacks import FFGSM, FGSM, PGD, PGDL2, fgsm, fgsm_rs, n_fgsm, pgd
from sparse_adv.ops import random_start, reference

EPS, ALPHA = 8 / 255, 2 / 255
ALL = {
    "pgd": pgd,
    "fgsm": fgsm,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "restarts": lambda *args, **options: pgd(*args, steps=2, restarts=3, **options),
    "l2": lambda *args, **options: pgd(*args, eps=0.5, alpha=0.1, norm="l2", **options),
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(16 * 9, 5),
    )
    for _ in range(3):  # running statistics that differ from a batch's
        model(torch.rand(16, 3, 8, 8) * 2)
    return model


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y() -> Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def key() -> Tensor:
    """The Philox key that an attack draws from `generator()`."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator())


def plain_pgd(
    model: nn.Module, start: Tensor, x: Tensor, y: Tensor, steps: int, sign: int = 1, **ball: float
) -> Tensor:
    """The attack as a tutorial writes it."""
    adv = start.clone()
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (sign * F.cross_entropy(model(adv), y)).backward()
        adv = reference.pgd_step(adv.detach(), adv.grad, x, **ball)
    return adv


def losses(model: nn.Module, adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(model.eval()(adv), y, reduction="none")


def snapshot(model: nn.Module) -> list[object]:
    """All that an attack must leave alone, in a form that == compares."""
    modules = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    parameters = [
        (parameter.requires_grad, parameter.grad if parameter.grad is None else parameter.grad.tolist())
        for parameter in model.parameters()
    ]
    return [modules, parameters, {name: value.tolist() for name, value in model.state_dict().items()}]


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_pgd_is_the_plain_loop(model, x, y, start, targeted):
    adv = pgd(model, x, y, steps=3, random_start=start, targeted=targeted, generator=generator())
    begin = random_start(x, EPS, seed=torch.cat([key(), torch.zeros(1).long()])) if start else x
    assert torch.equal(adv, plain_pgd(model.eval(), begin, x, y, 3, -1 if targeted else 1, alpha=ALPHA, eps=EPS))


def test_fgsm_is_one_step_from_the_image(model, x, y):
    assert torch.equal(fgsm(model, x, y), plain_pgd(model.eval(), x, x, y, 1, alpha=EPS, eps=EPS))


def test_fgsm_rs_is_one_long_step_from_a_random_start(model, x, y):
    begin = random_start(x, EPS, seed=generator())
    expected = plain_pgd(model.eval(), begin, x, y, 1, alpha=1.25 * EPS, eps=EPS)
    assert torch.equal(fgsm_rs(model, x, y, generator=generator()), expected)


def test_n_fgsm_is_one_step_from_wide_noise_without_projection(model, x, y):
    begin = random_start(x, 2 * EPS, seed=generator(), lo=-math.inf, hi=math.inf)
    expected = plain_pgd(model.eval(), begin, x, y, 1, alpha=EPS, eps=math.inf)
    adv = n_fgsm(model, x, y, generator=generator())
    assert torch.equal(adv, expected) and (adv - x).abs().max() > 2 * EPS


def test_classes_are_the_functions(model, x, y):
    options = {"generator": generator()}
    assert torch.equal(
        PGD(model, EPS, ALPHA, 3, True, **options)(x, y), pgd(model, x, y, steps=3, generator=generator())
    )
    assert torch.equal(
        PGDL2(model, steps=2, generator=generator())(x, y),
        pgd(model, x, y, 1.0, 0.2, 2, norm="l2", generator=generator()),
    )
    assert torch.equal(FGSM(model, eps=EPS)(x, y), fgsm(model, x, y, EPS))
    assert torch.equal(
        FFGSM(model, generator=generator())(x, y), fgsm_rs(model, x, y, EPS, 10 / 255, generator=generator())
    )
    assert repr(FGSM(model, eps=0.5)) == "FGSM(eps=0.5)"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_result_raises_the_loss_within_the_ball(model, x, y, norm):
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (0.5, 0.1)
    adv = pgd(model, x, y, eps, alpha, norm=norm)
    size = (adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert_close((size - eps).clamp(min=0), torch.zeros_like(size))
    assert adv.min() >= 0 and adv.max() <= 1
    assert (losses(model, adv, y) > losses(model, x, y)).all()


def test_targeted_attack_approaches_the_target(model, x, y):
    assert (losses(model, pgd(model, x, y, targeted=True), y) < losses(model, x, y)).all()


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_everything_else_is_left_as_found(model, x, y, attack, grad_mode):
    model.train()
    model[1].eval()  # a BatchNorm frozen on purpose
    model[3][0].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    global_state = torch.get_rng_state()
    with grad_mode():
        images = x.clone()
        adv = ALL[attack](model, images, y.clone(), generator=generator())
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(images, x) and not torch.equal(adv, x)
    assert not adv.requires_grad and not adv.is_inference()
    assert snapshot(model) == before


@pytest.mark.parametrize("mode", attacks.MODES)
def test_an_exception_leaves_the_model_as_found(model, x, y, mode):
    model.train()
    model[1].eval()
    model[3][1].track_running_stats = False
    before = snapshot(model)
    failing = nn.Sequential(model, nn.Linear(7, 7))  # wrong shape: fails after the model's own forward
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pgd(failing, x, y, mode=mode)
    assert snapshot(model)[0] == before[0]


def test_input_that_requires_grad_is_left_alone(model, x, y):
    adv = pgd(model, x.requires_grad_(), y, steps=2)
    assert x.grad is None and x.requires_grad and not adv.requires_grad


def test_batch_mode_uses_batch_statistics_and_keeps_the_running_ones(model, x, y):
    model.train()
    before = snapshot(model)
    adv = pgd(model, x, y, steps=2, random_start=False, mode="batch")
    assert snapshot(model) == before
    trained = copy.deepcopy(model)
    trained[4].eval()  # dropout is off in every mode
    assert torch.equal(adv, plain_pgd(trained, x, x, y, 2, alpha=ALPHA, eps=EPS))
    assert not torch.equal(adv, pgd(model, x, y, steps=2, random_start=False))


def test_train_mode_updates_the_running_statistics_once_a_step(model, x, y):
    adv = pgd(model.eval(), x, y, steps=2, random_start=False, mode="train")
    assert torch.equal(adv, pgd(model, x, y, steps=2, random_start=False, mode="batch"))
    assert model[1].num_batches_tracked == 3 + 2 and not model.training
    assert not torch.equal(model[1].running_mean, make_model()[1].running_mean)


def test_restarts_keep_the_highest_loss_of_each_image(model, x, y):
    model.eval()
    blocks = torch.tensor([0, (x.numel() + 3) // 4])
    first = torch.cat([key(), torch.zeros(1).long()])
    ends = torch.stack(
        [
            plain_pgd(model, random_start(x, EPS, seed=first + restart * blocks), x, y, 1, alpha=ALPHA, eps=EPS)
            for restart in range(4)
        ]
    )
    values = torch.stack([losses(model, end, y) for end in ends])
    winners = values.argmax(0)
    assert len(winners.unique()) > 1
    adv = pgd(model, x, y, steps=1, restarts=4, generator=generator())
    assert torch.equal(adv, ends[winners, torch.arange(len(x))])


def test_exactly_one_global_number_is_drawn(model, x, y):
    torch.manual_seed(3)
    torch.randint(-(2**63), 2**63 - 1, (1,))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    adv = pgd(model, x, y, steps=1, restarts=3)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(3)
    assert torch.equal(pgd(model, x, y, steps=1, restarts=3), adv)


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, lambda logits, y: F.cross_entropy(logits, y, reduction="none")],
    ids=["scalar", "per_image"],
)
def test_a_callable_loss_attacks_like_the_named_one(model, x, y, loss):
    adv = pgd(model, x, y, steps=2, restarts=3, loss=loss, generator=generator())
    assert torch.equal(adv, pgd(model, x, y, steps=2, restarts=3, generator=generator()))


def test_a_callable_loss_takes_its_own_labels(model, x):
    soft = torch.full((len(x), 5), 0.2)
    adv = pgd(model, x, soft, steps=1, loss=lambda logits, y: F.kl_div(logits.log_softmax(1), y, reduction="sum"))
    assert not torch.equal(adv, x)


@pytest.mark.parametrize("attack", ALL)
def test_memory_format_dtype_and_empty_batches(model, x, y, attack):
    channels_last = x.to(memory_format=torch.channels_last)
    adv = ALL[attack](model, channels_last, y)
    assert adv.is_contiguous(memory_format=torch.channels_last)
    assert ALL[attack](copy.deepcopy(model).double(), x.double(), y).dtype == torch.float64
    assert ALL[attack](copy.deepcopy(model).bfloat16(), x.bfloat16(), y).dtype == torch.bfloat16
    assert ALL[attack](model, x[:0], y[:0]).shape == (0, 3, 8, 8)


def test_no_steps_give_the_start(model, x, y):
    assert torch.equal(pgd(model, x, y, steps=0, random_start=False), x)


def test_distributed_models_are_attacked_like_their_module(model, x, y):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert torch.equal(
            pgd(wrapped, x, y, steps=2, generator=generator()), pgd(model, x, y, steps=2, generator=generator())
        )
        wrapped(x).sum().backward()  # the next training step finds its reducer ready
        del wrapped  # freed after its group it would wait, with the GIL held, for threads that may want the GIL
    finally:
        torch.distributed.destroy_process_group()


class OpCount(TorchDispatchMode):
    """How often each op of this library runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "sparse_adv":
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_step_forms_no_weight_gradient(model, x, y, training):
    sparsify(model, masks.prune(model, density=0.5)).train(training)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    with OpCount() as count:
        pgd(model, x, y, steps=3)
    assert count.calls["masked_conv2d"] == 3 * len(convolutions)
    assert count.calls["masked_conv2d_grad_input"] == 3 * len(convolutions)
    assert "masked_conv2d_grad_weight" not in count.calls
    assert count.calls["pgd_step"] == 3 and count.calls["random_start"] == 1
    with OpCount() as count:  # the count sees weight gradients where there are some
        F.cross_entropy(model(x), y).backward()
    assert count.calls["masked_conv2d_grad_weight"] == len(convolutions)


def test_a_sparsified_model_is_attacked_like_a_dense_one_with_zeros(model, x, y):
    chosen = masks.prune(model, density=0.5)
    dense = copy.deepcopy(model).eval()
    for name, mask in chosen.items():
        module = dense.get_submodule(name)
        module.weight.data *= mask
    sparsify(model, chosen)
    sparse_adv, dense_adv = (pgd(net, x, y, 0.5, 0.1, 3, norm="l2", generator=generator()) for net in (model, dense))
    assert_close(sparse_adv, dense_adv)


X, Y = torch.rand(2, 3, 8, 8), torch.tensor([0, 4])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": X * 2 - 1},
            ValueError,
            r"x must lie in \[0, 1\], got values from -.*: put the normalisation inside the",
        ),
        ({"x": X.log() * 0 / 0}, ValueError, "x must be finite"),
        ({"x": X / 0}, ValueError, "x must be finite"),
        ({"x": (X * 255).byte()}, TypeError, "x must be a floating point tensor, got torch.uint8"),
        ({"x": X[0, 0, 0]}, ValueError, r"x must be a batch of images \[N, ...\], got shape \(8,\)"),
        ({"y": torch.tensor([0, 5])}, ValueError, r"y must lie in \[0, 4\], the model's classes, got 0 to 5"),
        ({"y": torch.tensor([-100, 1])}, ValueError, r"y must lie in \[0, 4\], the model's classes, got -100 to 1"),
        ({"y": torch.tensor([0])}, ValueError, r"y must have one label per image, shape \[2\], got \(1,\)"),
        ({"y": torch.tensor([0.0, 1.0])}, TypeError, "y must be an int64 tensor, got torch.float32"),
        ({"y": [0, 1]}, TypeError, "y must be an int64 tensor, got list"),
        (
            {"model": nn.Conv2d(3, 5, 8)},
            ValueError,
            r"model must return logits \[2, classes\], got shape \(2, 5, 1, 1\)",
        ),
        ({"model": torch.sin}, TypeError, "model must be an nn.Module"),
        ({"loss": "dlr"}, ValueError, "loss must be \"ce\" or a callable, got 'dlr'"),
        ({"mode": "bn"}, ValueError, 'mode must be "eval", "train" or "batch", got \'bn\''),
        ({"eps": -1.0}, ValueError, "eps must not be negative or NaN, got -1.0"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
    ],
)
@pytest.mark.parametrize("attack", [pgd, n_fgsm])
def test_bad_input_is_named(model, attack, change, error, message):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        attack(**{"model": model, "x": X, "y": Y, **change})
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps must be an integer that is not negative, got -1"),
        ({"steps": 1.5}, "steps must be an integer that is not negative, got 1.5"),
        ({"restarts": 0}, "restarts must be 1, or more with random_start=True, got 0"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1, or more with random_start=True, got 2"),
        ({"norm": "l1"}, 'norm must be "linf" or "l2", got \'l1\''),
    ],
)
def test_bad_settings_are_named(model, change, message):
    with pytest.raises(ValueError, match=message):
        pgd(model, X, Y, **change)


def test_values_go_unchecked_on_request(model):
    assert pgd(model, X * 2 - 1, Y, steps=1, check=False).min() >= 0


def test_a_setting_that_an_attack_does_not_have_is_refused(model):
    for attack, settings in ((n_fgsm, {"norm": "l2"}), (n_fgsm, {"restarts": 2}), (attacks.tpgd, {"targeted": True})):
        with pytest.raises(TypeError, match=next(iter(settings))):
            attack(model, x=X, **settings, **({} if attack is attacks.tpgd else {"y": Y}))
