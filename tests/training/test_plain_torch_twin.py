"""`train` does what a plain loop of PyTorch does, bit for bit; every setting that a run is given reaches its use."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.small_runs import QUICK, TEST, TRAIN, VALIDATION, batches, equal_states, network
from torch.utils._pytree import tree_flatten

from sparse_adv import runs, training
from sparse_adv.training import checkpoint, loop

PLAIN = replace(QUICK, momentum=0.8, weight_decay=0.01)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"weight_decay": 0.0},
        {"momentum": 0.0},
        {"lr": 0.03},
        {"schedule": "piecewise", "milestones": (0.3, 0.6)},
        {"schedule": "cosine", "warmup_epochs": 1.5, "warmup_start_lr": 0.01},
        {"max_grad_norm": 0.05},
    ],
    ids=str,
)
def test_training_is_a_plain_loop_bit_for_bit(change):
    config = replace(PLAIN, **change)
    trained, plain = network(), network()
    records = training.train(trained, batches(40), config)  # a last batch of 16
    optimizer = torch.optim.SGD(plain.parameters(), 0.0, config.momentum, weight_decay=config.weight_decay, fused=True)
    images, step = batches(40), 0
    for record in records:
        plain.train()
        loss_sum = 0.0
        for x, y in images:
            optimizer.param_groups[0]["lr"] = config.learning_rate(step, len(images))
            optimizer.zero_grad()
            loss = F.cross_entropy(plain(x), y)
            loss.backward()
            loss_sum += loss.item() * len(y)
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), config.max_grad_norm)
            optimizer.step()
            step += 1
        assert record.loss == pytest.approx(loss_sum / len(TRAIN.labels))
        plain.eval()
    assert equal_states(trained.state_dict(), plain.state_dict())
    if change:
        other = network()
        training.train(other, batches(40), PLAIN)
        assert not equal_states(trained.state_dict(), other.state_dict())


def test_the_scale_of_the_loss_in_float16_does_not_count_where_gradients_are_clipped():
    states = []
    for most in (0.0, 100.0):  # no gradient is so long, but for the scale of 65536
        model = network()
        run = training.Training(model, batches(), replace(PLAIN, epochs=1, precision="float16", max_grad_norm=most))
        list(run.epochs())
        assert run.updater.scaler.get_scale() > 1000
        states.append(model.state_dict())
    assert equal_states(*states)


def test_a_state_holds_every_part_of_an_update():
    """What is loaded is what was saved, whatever another run had in its place."""
    config = replace(PLAIN, objective="free", replays=2, epochs=1, precision="float16", ema_decay=0.9)
    first, second = (training.Training(network(seed), batches(), config) for seed in (0, 1))
    list(first.epochs())
    first.updater.scaler.update(512.0)
    state = copy.deepcopy(first.updater.state_dict())
    assert state["scaler"]["scale"] == 512 and state["step"] == 6 and state["objective"]
    second.updater.load_state_dict(state)
    (saved, kind), (loaded, same) = (tree_flatten(updater) for updater in (state, second.updater.state_dict()))
    assert kind == same
    for a, b in zip(saved, loaded, strict=True):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def test_the_model_is_in_training_mode_in_every_epoch():
    model, modes = network(), []
    training.train(model, batches(), PLAIN, validation=VALIDATION, on_step=lambda _: modes.append(model.training))
    assert modes == [True] * 9


def test_the_buffers_that_are_not_averaged_are_those_of_the_model():
    run = training.Training(network(), batches(), replace(PLAIN, ema_decay=0.9))
    for record in run.epochs():
        for model in (run.updater.model, run.evaluated):
            assert int(model[1].num_batches_tracked) == record.step


@pytest.fixture
def peaks(monkeypatch):
    """Accuracies that peak in different epochs: the clean one in epoch 1, the robust one in epoch 2 of 3."""
    measured = {"clean": [0.9, 0.5, 0.4], "robust": [0.1, 0.3, 0.2]}

    def measure(name):
        rest = iter(measured[name])

        def accuracy(*_, **__):
            value = next(rest)
            return training.Accuracy(value, 100, 100, 100)

        return accuracy

    monkeypatch.setattr(loop, "clean_accuracy", measure("clean"))
    monkeypatch.setattr(loop, "robust_accuracy", measure("robust"))


@pytest.mark.parametrize(("objective", "epoch"), [("natural", 1), ("pgd", 2)])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_best_and_last_weights_are_those_of_the_right_epoch_and_model(tmp_path, peaks, objective, epoch, decay):
    config = replace(PLAIN, objective=objective, ema_decay=decay, overfitting_monitor=False)
    run = training.Training(network(), batches(), config, validation=VALIDATION, folder=tmp_path)
    states = []
    for _ in run.epochs():
        states.append({name: value.clone() for name, value in run.evaluated.state_dict().items()})
    best, metadata = checkpoint.read_weights(tmp_path / runs.BEST)
    assert metadata["epoch"] == epoch and equal_states(best, states[epoch - 1])
    assert not equal_states(best, states[-1])
    assert equal_states(best, run.updater.model.state_dict()) is False
    last, metadata = checkpoint.read_weights(tmp_path / runs.LAST)
    assert metadata["epoch"] == 3 and equal_states(last, states[-1])
    assert equal_states(last, run.updater.model.state_dict()) == (decay == 0)


@pytest.mark.parametrize("objective", [name for name in training.OBJECTIVES if name != "natural"])
def test_the_norm_reaches_training(objective):
    # The second epoch counts: in the first one NU-AT trains with clean images.
    config = replace(QUICK, objective=objective, eps=0.5, alpha=0.3, epochs=2, overfitting_monitor=False)
    losses = {}
    for each in ("linf", "l2"):
        *_, record = training.train(network(), batches(), replace(config, norm=each), validation=TEST)
        losses[each] = record.loss, record.robust_accuracy
    assert losses["linf"][0] > losses["l2"][0] and losses["linf"][1] <= losses["l2"][1]


def test_weights_with_gaps_in_memory_train_like_others():
    # The fused SGD of PyTorch would take their memory for that of a contiguous tensor.
    expected, gaps = network(), network()
    for name, parameter in list(gaps.named_parameters()):
        padded = torch.zeros(*parameter.shape, 2)
        padded[..., 0] = parameter.detach()
        owner, _, attribute = name.rpartition(".")
        setattr(gaps.get_submodule(owner), attribute, torch.nn.Parameter(padded[..., 0]))
    config = replace(PLAIN, epochs=1)
    for model in (expected, gaps):
        training.train(model, batches(), config)
    for a, b in zip(expected.parameters(), gaps.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
