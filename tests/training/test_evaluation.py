"""Evaluation: accuracies are those of the images, attacked or not, and the model stays as it was."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.cpu_graphs import CpuGraphs, no_synchronisation, waiting_is_an_error
from helpers.small_runs import QUICK, TRAIN, VALIDATION, batches, equal_states, network
from torch import nn

from sparse_adv import attacks, data, tickets, training
from sparse_adv.training import evaluation
from sparse_adv.training.random_numbers import Stream


@pytest.fixture
def model() -> nn.Module:
    """A network that attacks fool on some images and not on others."""
    trained = network()
    training.train(trained, batches(), replace(QUICK, epochs=1))
    return trained


@pytest.fixture
def gpu(monkeypatch) -> None:
    """Evaluation does on the CPU what it does on a GPU."""
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: False)


def test_evaluation_changes_neither_mode_nor_weights():
    model = network().train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    training.robust_accuracy(model, VALIDATION, steps=2)
    assert model.training and model[0].training and not model[1].training
    assert equal_states(before, model.state_dict())


def test_accuracies_are_those_of_the_images_and_of_the_attacked_images():
    model = network()
    training.train(model, batches(), QUICK)
    images, labels = data.to_unit(VALIDATION.images), VALIDATION.labels
    right = model(images).argmax(1) == labels
    assert training.clean_accuracy(model, VALIDATION, batch_size=7).fraction == right.float().mean().item()
    for norm, eps in (("linf", 0.2), ("l2", 0.9)):
        fgsm = attacks.fgsm(model, images, labels, eps=eps, norm=norm)
        expected = (right & (model(fgsm).argmax(1) == labels)).float().mean().item()
        assert 0 < expected < right.float().mean()
        assert training.fgsm_accuracy(model, VALIDATION, eps=eps, norm=norm).fraction == pytest.approx(expected)


def test_restarts_lower_the_accuracy_and_count_their_passes():
    model = network()
    training.train(model, batches(), replace(QUICK, epochs=1))
    attack = {"eps": 0.12, "alpha": 0.04, "steps": 3, "seed": 9}
    one, five = (training.robust_accuracy(model, VALIDATION, **attack, restarts=n) for n in (1, 5))
    assert 0 < five.fraction <= one.fraction < 1
    assert one.images == 40 and five.backward > one.backward
    # The first attack is made on the images that are right, the second on those that stand; each ends with a check.
    right, robust = (round(40 * each.fraction) for each in (training.clean_accuracy(model, VALIDATION), one))
    two = training.robust_accuracy(model, VALIDATION, **attack, restarts=2)
    assert (one.forward, one.backward) == (40 + 4 * right, 3 * right)
    assert (two.forward, two.backward) == (one.forward + 4 * robust, one.backward + 3 * robust)


@pytest.mark.parametrize("at_once", [True, False])
def test_the_images_that_withstand_one_attack_are_given_to_the_next(model, monkeypatch, at_once):
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: at_once)
    options = {"eps": 0.12, "batch_size": 7}
    first = training.fgsm_accuracy(model, VALIDATION, **options)
    alone = training.robust_accuracy(model, VALIDATION, steps=3, **options)
    both = training.robust_accuracy(model, VALIDATION, steps=3, **options, among=first.robust)
    right = model(data.to_unit(VALIDATION.images)).argmax(1) == VALIDATION.labels
    assert torch.equal(training.clean_accuracy(model, VALIDATION).robust, right)
    for accuracy in (first, alone, both):
        assert accuracy.fraction == accuracy.robust.double().mean().item() and not (accuracy.robust & ~right).any()
    assert 0 < both.fraction <= min(first.fraction, alone.fraction) and not (both.robust & ~first.robust).any()
    assert (both.backward < alone.backward) == at_once
    none = training.robust_accuracy(model, VALIDATION, steps=1, among=torch.zeros(40, dtype=torch.bool))
    assert none.fraction == 0
    for count in (39, 41, 1):
        with pytest.raises(ValueError, match=f"among must have one value for each of 40 images, got {count}"):
            training.robust_accuracy(model, VALIDATION, steps=1, among=torch.ones(count, dtype=torch.bool))


def test_an_accuracy_without_images_is_refused():
    with pytest.raises(ValueError, match="images must hold"):
        training.clean_accuracy(network(), data.Split(torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64)))


class ShapeLog(nn.Module):
    """A model that notes the shapes of its inputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.shapes = model, set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shapes.add(tuple(x.shape))
        return self.model(x)


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu_the_host_waits_at_the_end_only_and_batches_keep_their_shape(model):
    logged = ShapeLog(model)

    def watched():
        with no_synchronisation():
            yield from data.Batches(VALIDATION, 16, shuffle=False)

    accuracy = training.robust_accuracy(logged, watched(), eps=0.12, steps=3, restarts=2)
    assert logged.shapes == {(16, 1, 6, 6), (8, 1, 6, 6)} and 0 < accuracy.fraction < 1
    assert accuracy.images == 40 and accuracy.forward == 40 * (1 + 2 * 4) and accuracy.backward == 40 * 2 * 3


def test_a_wait_before_the_end_is_detected(model):
    def watched():
        with no_synchronisation():
            yield from data.Batches(VALIDATION, 16, shuffle=False)

    with pytest.raises(RuntimeError, match="the host reads"):
        training.robust_accuracy(model, watched())


def test_attacking_all_images_gives_the_accuracy_of_attacking_the_correct_ones_only(model, monkeypatch):
    some = training.fgsm_accuracy(model, VALIDATION, eps=0.12, batch_size=16)
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: False)
    assert 0 < some.fraction == training.fgsm_accuracy(model, VALIDATION, eps=0.12, batch_size=16).fraction < 1


@pytest.mark.usefixtures("gpu")
def test_an_image_counts_as_wrong_after_one_successful_restart(model):
    attack = {"eps": 0.25, "steps": 1, "seed": 9}
    accuracies = [training.robust_accuracy(model, VALIDATION, **attack, restarts=n).fraction for n in (1, 2, 8)]
    assert accuracies == sorted(accuracies, reverse=True) and 0 < accuracies[2] < accuracies[0]


@pytest.mark.usefixtures("gpu")
def test_cuda_graphs_give_the_same_accuracy(model):
    graphs, attack = CpuGraphs(), {"eps": 0.12, "steps": 2, "batch_size": 16}
    for _ in range(3):
        expected = training.robust_accuracy(model, VALIDATION, **attack)
        assert training.robust_accuracy(model, VALIDATION, **attack, graphs=graphs) == expected
    assert graphs.counts == (2, 5)  # batches of 16, 16 and 8, three times


@pytest.mark.parametrize("at_once", [True, False])
def test_wrong_images_are_refused_in_any_batch(model, at_once, monkeypatch):
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: at_once)
    images, labels = data.to_unit(VALIDATION.images), VALIDATION.labels
    for wrong, message in (
        ((images * 2, labels), r"images must lie in \[0, 1\]"),
        ((images, labels + 1), "labels must lie in"),
    ):
        for measure in (training.clean_accuracy, training.fgsm_accuracy):
            with pytest.raises(ValueError, match=message):
                measure(model, [(images, labels), wrong])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_host_waits_for_cuda_at_the_end_only(model):
    images = data.Batches(VALIDATION.to("cuda"), 8, shuffle=False)

    def watched():
        with waiting_is_an_error():
            yield from images

    accuracy = training.robust_accuracy(model.cuda(), watched(), eps=0.12, steps=3, restarts=2)
    assert accuracy.forward == 40 * (1 + 2 * 4)


def test_nan_is_neither_right_nor_robust(model):
    class Nan(nn.Module):
        def forward(self, x):
            return model(x) * torch.nan

    zeros = [(data.to_unit(VALIDATION.images), torch.zeros_like(VALIDATION.labels))]
    assert training.clean_accuracy(Nan(), zeros).fraction == 0
    assert training.robust_accuracy(Nan(), zeros, steps=1).fraction == 0


@pytest.mark.parametrize("measure", [training.clean_accuracy, training.robust_accuracy])
def test_outputs_that_are_no_logits_get_a_sentence(model, measure):
    class Returns(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.wrap = wrap

        def forward(self, x):
            return self.wrap(model(x))

    for wrap, error, words in (
        (lambda z: (z, z), TypeError, "got a tuple"),
        (lambda z: {"logits": z}, TypeError, "got a dict"),
        (lambda z: z[:, 0], ValueError, r"got shape \(40,\)"),
    ):
        with pytest.raises(error, match=f"model must return logits .*{words}"):
            measure(Returns(wrap), VALIDATION)


def test_more_steps_restarts_and_early_stop_never_raise_the_accuracy(model):
    attack = {"eps": 0.12, "alpha": 0.03, "seed": 9, "loss": "margin", "early_stop": True}
    for budgets in ([{"steps": n} for n in (1, 3, 9)], [{"steps": 3, "restarts": n} for n in (1, 2, 8)]):
        fractions = [training.robust_accuracy(model, VALIDATION, **attack, **budget).fraction for budget in budgets]
        assert fractions == sorted(fractions, reverse=True) and fractions[-1] < 1


@pytest.mark.parametrize("at_once", [True, False])
def test_every_image_is_attacked_where_the_loss_is_measured(model, at_once, monkeypatch):
    monkeypatch.setattr(evaluation, "reads_at_once", lambda device: at_once)
    x, y = data.to_unit(VALIDATION.images), VALIDATION.labels
    options = {"eps": 0.2, "steps": 3, "seed": 4}
    measured = training.robust_accuracy(model, VALIDATION, **options, every_image=True)
    noise = torch.Generator().manual_seed(training.distributed.own_seed(4, Stream.EVALUATION))
    logits = model(attacks.pgd(model, x, y, eps=0.2, alpha=0.05, steps=3, generator=noise)).detach()
    assert measured.loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    right = (logits.argmax(1) == y) & (model(x).argmax(1) == y)
    assert measured.fraction == pytest.approx(float(right.float().mean()))
    assert (measured.forward, measured.backward) == (5 * len(y), 3 * len(y))
    noise.manual_seed(training.distributed.own_seed(4, Stream.EVALUATION))
    tries = [attacks.pgd(model, x, y, eps=0.2, alpha=0.05, steps=3, generator=noise) for _ in range(3)]
    losses = torch.stack([nn.functional.cross_entropy(model(adv), y, reduction="none") for adv in tries]).detach()
    thrice = training.robust_accuracy(model, VALIDATION, **options, restarts=3, every_image=True)
    assert thrice.loss == pytest.approx(float(losses.amax(0).mean()), rel=1e-5) and losses[-1].lt(losses[0]).any()
    right = model(x).argmax(1) == y
    for adv in tries:
        right &= model(adv).argmax(1) == y
    assert thrice.fraction == pytest.approx(float(right.float().mean()))
    few = torch.arange(len(y)) < 3
    among = training.robust_accuracy(model, VALIDATION, **options, restarts=3, every_image=True, among=few)
    assert among.fraction == pytest.approx(float((right & few).float().mean()))
    assert training.robust_accuracy(model, VALIDATION, **options).loss is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"eps": "x"}, "eps must be a number, got 'x'"), ({"restarts": 0}, "restarts must be an integer")],
)
def test_a_wrong_argument_of_robust_accuracy_is_named(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said):
        training.robust_accuracy(torch.nn.Flatten(), [], **wrong)


@pytest.mark.parametrize(
    ("validation", "error", "said"),
    [
        ([], ValueError, "hold at least one image, got none"),
        (VALIDATION._replace(images=VALIDATION.images[:0], labels=VALIDATION.labels[:0]), ValueError, "at least one"),
        (iter([(TRAIN.images, TRAIN.labels)]), TypeError, "iterated in each evaluation .*, got list_iterator"),
        ({"images": TRAIN.images}, TypeError, "iterated in each evaluation .*, got dict"),
        (3, TypeError, "be of type Split or Iterable or None, got 3"),
    ],
)
def test_validation_images_that_could_not_be_evaluated_are_refused_before_training(validation, error, said):
    for begin in (training.train, tickets.search):
        with pytest.raises(error, match=f"validation must .*{said}"):
            begin(network(), Untouched(), QUICK, validation=validation)


class Untouched:
    """Batches that fail if they are read."""

    def __len__(self):
        return 3

    def __iter__(self):
        raise AssertionError("training began")


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_dtype_are_the_same(dtype):
    images, labels = data.to_unit(VALIDATION.images), VALIDATION.labels.to(dtype)
    model, parts = network().eval(), list(zip(images.split(8), labels.split(8), strict=True))
    for measure in (training.clean_accuracy, training.robust_accuracy, training.fgsm_accuracy):
        expected = measure(model, VALIDATION).fraction
        assert measure(model, data.Split(VALIDATION.images, labels)).fraction == expected
        assert measure(model, parts).fraction == expected
    models = [network(), network()]
    for each, of_dtype in zip(models, (torch.int64, dtype), strict=True):
        own = [(x, y.to(of_dtype)) for x, y in parts]
        training.train(each, own, replace(QUICK, objective="pgd", epochs=2), validation=own)
    assert equal_states(*(each.state_dict() for each in models))
    for objective in ("pgd", "trades", "mart", "fgsm"):
        losses = [
            training.adversarial_loss(model, *batch, objective, generator=torch.Generator().manual_seed(0))
            for batch in (parts[0], (parts[0][0], parts[0][1].long()))
        ]
        assert losses[0].equal(losses[1])


def test_validation_images_are_checked_to_the_last_before_training(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images = torch.rand(600, 1, 2, 2)
    train_on, labels = [(images[:8], torch.zeros(8, dtype=torch.int64))], torch.zeros(600, dtype=torch.int32)
    evaluation.check_evaluable("validation", data.Split(images, labels), model)
    images[-1] = 3
    with pytest.raises(ValueError, match=r"validation: images must lie in \[0, 1\]"):
        config, split = training.TrainConfig("fgsm", epochs=1), data.Split(images, labels)
        training.train(model, train_on, config, validation=split, folder=tmp_path)


def test_radius_and_robust_images_of_other_types_are_refused():
    with pytest.raises(TypeError, match="eps must be a "):
        training.robust_accuracy(network(), VALIDATION, eps=torch.full((40,), 0.1), steps=1)
    with pytest.raises(TypeError, match=r"among must be a bool tensor, got torch\.float32"):
        training.robust_accuracy(network(), VALIDATION, steps=1, among=torch.ones(40))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_validation_labels_may_have_unsigned_dtypes(dtype):
    """Few operations of PyTorch take them."""
    accuracies = []
    for labels in (VALIDATION.labels, VALIDATION.labels.to(dtype)):
        records = training.train(network(), batches(), QUICK, validation=data.Split(VALIDATION.images, labels))
        accuracies.append([(record.clean_accuracy, record.robust_accuracy) for record in records])
    assert len(accuracies[0]) == 3 and accuracies[0] == accuracies[1]
