"""The attack functions: what they compute, and that they change nothing else."""

import copy
import inspect
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.attacked import ALPHA, EPS, batch, generator, losses, make_model, philox_state, snapshot, textbook_pgd
from helpers.tolerances import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_adv import attacks, masks, sparsify
from sparse_adv.attacks import AttackOptions, fgsm, fgsm_rs, movement, n_fgsm, pgd, tpgd
from sparse_adv.ops import random_start

ATTACKS = {
    "pgd": pgd,
    "fgsm": fgsm,
    "fgsm_rs": fgsm_rs,
    "n_fgsm": n_fgsm,
    "restarts": lambda *args, **options: pgd(*args, steps=2, restarts=3, **options),
    "early_stop": lambda *args, **options: pgd(*args, loss="margin", early_stop=True, restarts=2, **options),
    "l2": lambda *args, **options: pgd(*args, eps=0.5, alpha=0.1, norm="l2", **options),
}


@pytest.fixture
def model() -> nn.Sequential:
    return make_model()


@pytest.fixture
def images() -> torch.Tensor:
    return batch()[0]


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_pgd_equals_the_textbook_loop(model, images, labels, start, targeted):
    # check=False: without the last step that takes rounding out of the distance.
    options = {"random_start": start, "targeted": targeted, "generator": generator(), "check": False}
    adv = pgd(model, images, labels, steps=3, **options)
    begin = random_start(images, EPS, seed=philox_state()) if start else images
    sign = -1 if targeted else 1
    assert torch.equal(adv, textbook_pgd(model.eval(), begin, images, labels, 3, sign, alpha=ALPHA, eps=EPS))


def test_fgsm_is_one_step_from_the_clean_images(model, images, labels):
    expected = textbook_pgd(model.eval(), images, images, labels, 1, alpha=EPS, eps=EPS)
    assert torch.equal(fgsm(model, images, labels, check=False), expected)


def test_fgsm_rs_is_one_step_of_1_25_eps_from_a_random_start(model, images, labels):
    begin = random_start(images, EPS, seed=generator())
    expected = textbook_pgd(model.eval(), begin, images, labels, 1, alpha=1.25 * EPS, eps=EPS)
    assert torch.equal(fgsm_rs(model, images, labels, generator=generator(), check=False), expected)


def test_n_fgsm_is_one_step_from_noise_of_2_eps_without_projection(model, images, labels):
    begin = random_start(images, 2 * EPS, seed=generator(), lo=-math.inf, hi=math.inf)
    expected = textbook_pgd(model.eval(), begin, images, labels, 1, alpha=EPS, eps=math.inf)
    adv = n_fgsm(model, images, labels, generator=generator())
    assert torch.equal(adv, expected) and (adv - images).abs().max() > 2 * EPS


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_result_is_in_the_ball_and_has_a_higher_loss(model, images, labels, norm):
    eps, alpha = (EPS, ALPHA) if norm == "linf" else (0.5, 0.1)
    adv = pgd(model, images, labels, eps=eps, alpha=alpha, norm=norm)
    distance = (adv - images).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert (distance.double() <= eps).all()
    assert adv.min() >= 0 and adv.max() <= 1
    assert (losses(model, adv, labels) > losses(model, images, labels)).all()


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_optimum_of_a_linear_model_is_reached(norm, loss):
    """The margin of two classes is w x + b; its greatest rise in the ball is eps |w| in the dual norm."""
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    linear[1].bias.data[0] += 5
    images, labels, eps = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64), torch.tensor([0, 0]), 0.1
    weight = linear[1].weight[1] - linear[1].weight[0]
    adv = pgd(linear, images, labels, eps=eps, alpha=0.05, steps=60, norm=norm, loss=loss)
    rise = attacks.losses.margin(linear(adv), labels) - attacks.losses.margin(linear(images), labels)
    torch.testing.assert_close(rise, (eps * weight.norm(p=1 if norm == "linf" else 2)).expand(2), rtol=1e-6, atol=0)


def test_a_targeted_attack_decreases_the_loss_of_the_target(model, images, labels):
    adv = pgd(model, images, labels, targeted=True)
    assert (losses(model, adv, labels) < losses(model, images, labels)).all()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_model_images_and_global_random_state_do_not_change(model, images, labels, attack, grad_mode):
    model.train()
    model[1].eval()  # a BatchNorm frozen on purpose
    model[3][0].weight.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = snapshot(model)
    random_state = torch.get_rng_state()
    with grad_mode():
        copied = images.clone()
        adv = ATTACKS[attack](model, copied, labels.clone(), generator=generator())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(copied, images) and not torch.equal(adv, images)
    assert not adv.requires_grad and not adv.is_inference()
    assert snapshot(model) == before


def test_images_that_require_grad_get_no_grad(model, images, labels):
    adv = pgd(model, images.requires_grad_(), labels, steps=2)
    assert images.grad is None and images.requires_grad and not adv.requires_grad


def test_bn_mode_batch_uses_batch_statistics_and_keeps_the_running_ones(model, images, labels):
    model.train()
    before = snapshot(model)
    adv = pgd(model, images, labels, steps=2, random_start=False, bn_mode="batch")
    assert snapshot(model) == before
    reference = copy.deepcopy(model)
    reference[4].eval()  # dropout is off in every mode
    assert torch.equal(adv, textbook_pgd(reference, images, images, labels, 2, alpha=ALPHA, eps=EPS))
    assert not torch.equal(adv, pgd(model, images, labels, steps=2, random_start=False))


def test_bn_mode_train_updates_the_running_statistics_once_per_step(model, images, labels):
    adv = pgd(model.eval(), images, labels, steps=2, random_start=False, bn_mode="train")
    assert torch.equal(adv, pgd(model, images, labels, steps=2, random_start=False, bn_mode="batch"))
    assert model[1].num_batches_tracked == 3 + 2 and not model.training
    assert not torch.equal(model[1].running_mean, make_model()[1].running_mean)


@pytest.mark.parametrize("mode", attacks.BN_MODES)
def test_a_frozen_batch_norm_stays_frozen_in_every_mode(model, images, labels, mode):
    model.train()
    model[1].eval()
    before = copy.deepcopy(model[1].state_dict())
    pgd(model, images, labels, steps=2, bn_mode=mode)
    assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert (model[3][1].num_batches_tracked > 3) == (mode == "train")


def shallow(images: torch.Tensor) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 5), nn.Tanh(), nn.Linear(5, 5)).eval()


@pytest.mark.parametrize("mode", ["eval", "batch"])  # with "batch" images that are finished stay in the batch
def test_restarts_return_a_success_or_else_the_result_of_highest_loss_for_each_image(images, mode):
    model = shallow(images)
    labels = model(images).argmax(1)
    options = {"eps": EPS / 4, "alpha": EPS / 4}
    blocks = torch.tensor([0, (images.numel() + 3) // 4])
    ends = []
    for restart in range(4):
        begin = random_start(images, EPS / 4, seed=philox_state() + restart * blocks)
        ends.append(textbook_pgd(model, begin, images, labels, 1, **options))
    wrong = torch.stack([model(end).argmax(1) != labels for end in ends])
    # The first success, else the highest loss: a success outranks any loss.
    rank = torch.stack([losses(model, end, labels) for end in ends]).where(~wrong, 100 - torch.arange(4.0)[:, None])
    assert 0 < wrong.any(0).sum() < len(images) and len(rank.argmax(0).unique()) > 1
    adv = pgd(model, images, labels, steps=1, restarts=4, generator=generator(), check=False, bn_mode=mode, **options)
    assert torch.equal(adv, torch.stack(ends)[rank.argmax(0), torch.arange(len(images))])


def test_with_restarts_targets_that_are_reached_are_kept(model, images):
    targets = (model.eval()(images).argmax(1) + 1) % 5
    options = {"targeted": True, "steps": 1, "alpha": EPS}
    reached = [
        model(pgd(model, images, targets, **options, restarts=n, generator=generator())).argmax(1) == targets
        for n in (1, 2, 8)
    ]
    assert all((more >= fewer).all() for fewer, more in pairwise(reached))


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("targeted", [True, False])
def test_early_stop_returns_the_first_success_of_the_same_path(model, images, engine, targeted):
    """Eight images, so that the batch is halved; images that fall early, late and never."""
    images = torch.cat([images, batch(seed=2)[0][:2]])
    right = model.eval()(images).argmax(1)
    labels = (right + 1) % 5 if targeted else right
    options = {"eps": EPS / 2, "alpha": EPS / 16, "random_start": False, "targeted": targeted, "engine": engine}
    path = [pgd(model, images, labels, steps=n, **options) for n in range(9)]
    success = [(model(adv).argmax(1) == labels) == targeted for adv in path]
    adv = pgd(model, images, labels, steps=8, early_stop=True, **options)
    first = [next((k for k in range(9) if success[k][i]), 8) for i in range(len(images))]
    assert len(set(first)) > 2
    assert_close(adv, torch.stack([path[k][i] for i, k in enumerate(first)]))


def test_early_stop_keeps_images_that_stand_still_in_the_batch_statistics(model, images):
    model[4].eval()
    labels, step = model(images).argmax(1), {"eps": 0.2, "alpha": 0.003}
    adv = images
    for _ in range(8):
        moves = model(adv).argmax(1) == labels
        adv = textbook_pgd(model, adv, images, labels, 1, **step).where(moves[:, None, None, None], adv)
    assert moves.any() and not moves.all()
    options = {"bn_mode": "batch", "random_start": False, "early_stop": True, "check": False} | step
    assert torch.equal(pgd(model, images, labels, steps=8, **options), adv)


def test_a_plain_function_is_attacked_like_a_module(model, images, labels):
    model.eval()
    adv = pgd(lambda x: model(x), images, labels, generator=generator())
    assert torch.equal(adv, pgd(model, images, labels, engine=False, generator=generator()))
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_have_any_integer_dtype(model, images, labels, dtype):
    adv = pgd(model, images, labels.to(dtype), generator=generator())
    assert torch.equal(adv, pgd(model, images, labels, generator=generator()))


def test_exactly_one_number_is_drawn_from_the_global_generator(model, images, labels):
    torch.manual_seed(3)
    torch.randint(-(2**63), 2**63 - 1, (1,))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    adv = pgd(model, images, labels, steps=1, restarts=3)
    assert torch.equal(torch.get_rng_state(), expected)
    torch.manual_seed(3)
    assert torch.equal(pgd(model, images, labels, steps=1, restarts=3), adv)


@pytest.mark.parametrize(
    "loss",
    [F.cross_entropy, lambda logits, y: F.cross_entropy(logits, y, reduction="none")],
    ids=["scalar", "per_image"],
)
def test_cross_entropy_as_a_function_gives_the_same_attack(images, loss):
    model = shallow(images)
    options = {"eps": EPS / 4, "alpha": EPS / 8, "steps": 2, "restarts": 4}
    labels = model(images).argmax(1)  # some stay right, and each has its highest loss in another restart
    adv = pgd(model, images, labels, loss=loss, generator=generator(), **options)
    assert torch.equal(adv, pgd(model, images, labels, generator=generator(), **options))


def test_a_loss_function_may_take_other_labels_than_int64(model, images):
    soft = torch.full((len(images), 5), 0.2)
    adv = pgd(model, images, soft, steps=1, loss=lambda logits, y: F.kl_div(logits.log_softmax(1), y, reduction="sum"))
    assert not torch.equal(adv, images)


@pytest.mark.parametrize("attack", ATTACKS)
def test_memory_format_dtype_and_empty_batches(model, images, labels, attack):
    channels_last = images.to(memory_format=torch.channels_last)
    adv = ATTACKS[attack](model, channels_last, labels)
    assert adv.is_contiguous(memory_format=torch.channels_last)
    assert ATTACKS[attack](copy.deepcopy(model).double(), images.double(), labels).dtype == torch.float64
    assert ATTACKS[attack](copy.deepcopy(model).bfloat16(), images.bfloat16(), labels).dtype == torch.bfloat16
    assert ATTACKS[attack](model, images[:0], labels[:0]).shape == (0, 3, 8, 8)


def test_zero_steps_return_the_start(model, images, labels):
    assert torch.equal(pgd(model, images, labels, steps=0, random_start=False), images)


def test_a_model_in_distributed_data_parallel_is_attacked_like_its_module(model, images, labels):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        adv = pgd(wrapped, images, labels, steps=2, generator=generator())
        assert torch.equal(adv, pgd(model, images, labels, steps=2, generator=generator()))
        wrapped(images).sum().backward()  # the next training step finds its reducer ready
        del wrapped  # its destructor needs the process group: without, it waits for threads while it holds the GIL
    finally:
        torch.distributed.destroy_process_group()


class CountOps(TorchDispatchMode):
    """Counts the calls of each op of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func.name().partition("::")
        if namespace == "sparse_adv":
            self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_attacks_compute_no_weight_gradients(model, images, labels, training):
    sparsify(model, masks.prune(model, density=0.5)).train(training)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    for engine, suffix in ((False, ""), (True, "_out")):
        pgd(model, images, labels, engine=engine)  # the engine compares its gradients with autograd's once
        with CountOps() as count:
            pgd(model, images, labels, steps=3, engine=engine)
        assert count.calls["masked_conv2d" + suffix] == 3 * len(convolutions)
        assert count.calls["masked_conv2d_grad_input" + suffix] == 3 * len(convolutions)
        assert "masked_conv2d_grad_weight" not in count.calls
        assert count.calls["pgd_step"] == 3 and count.calls["random_start"] == 1
    with CountOps() as count:  # a training step does compute them, and they are counted
        F.cross_entropy(model(images), labels).backward()
    assert count.calls["masked_conv2d_grad_weight"] == len(convolutions)


def test_a_sparse_model_is_attacked_like_the_dense_model_with_zeros(model, images, labels):
    kept = masks.prune(model, density=0.5)
    dense = copy.deepcopy(model).eval()
    for name, mask in kept.items():
        dense.get_submodule(name).weight.data *= mask
    sparsify(model, kept)
    options = {"eps": 0.5, "alpha": 0.1, "steps": 3, "norm": "l2"}
    sparse_adv, dense_adv = (pgd(net, images, labels, **options, generator=generator()) for net in (model, dense))
    assert_close(sparse_adv, dense_adv)


@pytest.mark.parametrize("attack", [pgd, fgsm, fgsm_rs, n_fgsm, tpgd])
def test_default_values_are_those_of_the_options(attack):
    parameters = inspect.signature(attack).parameters.values()
    expected = AttackOptions()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not None}
    assert defaults == {name: getattr(expected, name) for name in defaults} and "eps" in defaults


def test_pgd_has_a_parameter_for_every_option_but_those_of_other_attacks():
    parameters = set(inspect.signature(pgd).parameters) - {"model", "images", "labels"}
    assert parameters == set(vars(AttackOptions())) - {"start_eps", "project"}


@pytest.mark.parametrize("mode", attacks.BN_MODES)
def test_an_exception_in_the_model_leaves_its_flags_as_they_were(model, images, labels, mode):
    model.train()
    model[1].eval()
    model[3][1].track_running_stats = False
    before = snapshot(model)
    failing = nn.Sequential(model, nn.Linear(7, 7))  # a wrong shape: fails after the forward pass of `model`
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        pgd(failing, images, labels, bn_mode=mode)
    assert snapshot(model)[0] == before[0]


def test_each_restart_reads_random_numbers_of_its_own(monkeypatch):
    """Of 15 pixels: four blocks of four numbers each."""
    start, states = movement.start, []
    monkeypatch.setattr(movement, "start", lambda *args: (states.append(args[-1].tolist()), start(*args))[1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    pgd(model, torch.rand(3, 1, 1, 5), torch.tensor([0, 1, 2]), steps=1, restarts=3, generator=generator())
    assert states == [[int(philox_state()[0]), offset] for offset in (0, 4, 8)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [1e-4, 5e-4, 0.02, 0.5])
def test_the_noise_of_tpgd_stays_within_eps(norm, eps):
    model, (images, _) = make_model().eval(), batch()
    images = images * 0.5 + 0.25
    start = tpgd(model, images, eps=eps, steps=0, norm=norm, generator=generator())
    length = (start.double() - images.double()).flatten(1).norm(dim=1, p=torch.inf if norm == "linf" else 2)
    noise = 0.001 if norm == "linf" else 0.05
    assert length.max() <= min(eps, noise) + 1e-7 and length.max() >= 0.3 * min(eps, noise)
    of_each = tpgd(model, images, eps=torch.full((6,), eps), steps=0, norm=norm, generator=generator())
    assert torch.allclose(start, of_each, rtol=0, atol=1e-7)
