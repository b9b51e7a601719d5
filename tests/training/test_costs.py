"""Costs of training: the MACs of an epoch follow from the passes of its attacks, updates and evaluations."""

from dataclasses import replace

import pytest
import torch
from helpers.gpu_clocks import GpuClocks
from helpers.small_runs import QUICK, VALIDATION, batches, network

from sparse_adv import nn, training
from sparse_adv.methods import MethodConfig, SparseTraining
from sparse_adv.ops import PASSES
from sparse_adv.training import loop
from sparse_adv.training.costs import NetworkCosts, Stopwatch
from sparse_adv.training.objectives.base import Passes
from sparse_adv.training.overfitting import OverfittingMonitor
from sparse_adv.training.update import Updater


@pytest.mark.parametrize(
    ("objective", "attack", "update"),
    [
        ("natural", (0, 0), (1, 0)),
        ("fgsm-rs", (1, 1), (1, 0)),
        ("pgd", (2, 2), (1, 0)),
        ("trades", (3, 2), (2, 0)),
        ("mart", (2, 2), (2, 0)),
        ("fgsm-uap", (1, 1), (2, 0)),
        ("nu-at", (4 / 3, 1), (2, 0)),  # the second of three updates compares with the clean images
        ("fgsm-rs-cs", (2, 1), (1, 0)),  # the clean images have no gradient in the first epoch
        ("free", (0, 0), (2, 2)),
    ],
)
def test_macs_follow_from_the_passes(objective, attack, update):
    """Per image: forward and backward passes of the attack; updates, and how many of them reach the image."""
    model = network()
    (record,) = training.train(model, batches(), replace(QUICK, objective=objective, epochs=1, replays=2))
    work = nn.count_macs(model, (32, 1, 6, 6)).per_image()
    whole = work.forward + work.grad_weight + work.grad_input - work.first_grad_input
    assert record.attack.macs == round(96 * attack[0]) * work.forward + 96 * attack[1] * work.grad_input
    assert record.update.macs == 96 * (update[0] * whole + update[1] * work.first_grad_input)


def test_macs_of_an_evaluation_follow_from_its_passes():
    model, config = network(), replace(QUICK, epochs=1, evaluation_steps=3)
    (record,) = training.train(model, batches(), config, validation=VALIDATION)
    clean = training.clean_accuracy(model, VALIDATION)
    robust = training.robust_accuracy(model, VALIDATION, eps=config.eps, steps=3)
    assert clean.forward == 40 and clean.backward == 0 and robust.backward > 0
    work = nn.count_macs(model, (32, 1, 6, 6)).per_image()
    assert record.evaluation.macs == (clean.forward + robust.forward) * work.forward + robust.backward * work.grad_input


def test_adversarial_weights_cost_the_gradients_of_an_update_once_more():
    costs = []
    for gamma in (0.0, 0.01):
        config = replace(QUICK, objective="trades", epochs=1, awp_gamma=gamma)
        (record,) = training.train(network(), batches(), config)
        costs.append((record.attack.macs, record.update.macs))
    assert costs[1] == (costs[0][0], 2 * costs[0][1])
    config = replace(config, epochs=2, awp_warmup_epochs=1)
    records = training.train(network(), batches(), config)
    assert [record.update.macs for record in records] == [costs[0][1], costs[1][1]]


def test_a_dense_weight_gradient_is_counted_in_place_of_the_sparse_one():
    model = nn.sparsify(network(channels=32), {"3": torch.rand(32, 32, 3, 3) < 0.1})
    model[3].choose_kernels({name: {"kernel": "sparse"} for name in PASSES})
    costs, work = NetworkCosts(model, torch.rand(4, 1, 6, 6)), nn.count_macs(model, (4, 1, 6, 6)).per_image()
    assert work.grad_weight < work.dense
    sparse, dense = Passes(1, 1, 2), Passes(1, 1, 2, dense_gradients=1)
    assert costs.update(dense) - costs.update(sparse) == work.dense - work.grad_weight


def test_the_density_is_that_of_the_masks_also_where_dense_kernels_run():
    model, masks = network(channels=32), {"3": torch.rand(32, 32, 3, 3) < 0.1}
    expected = nn.mac_density(model, masks, (4, 1, 6, 6))
    model = nn.sparsify(model, masks)
    model[3].choose_kernels({name: {"kernel": "dense"} for name in PASSES})
    work = nn.count_macs(model, (4, 1, 6, 6))
    assert work.forward == work.dense and NetworkCosts(model, torch.rand(4, 1, 6, 6)).density.macs == expected


def test_a_compiled_model_is_not_compiled_for_the_pass_that_counts():
    torch.compiler.reset()  # other tests may have compiled as many networks as are compiled of one class
    compiled = []
    model = torch.compile(network(), backend=lambda graph, inputs: compiled.append(graph) or graph)
    assert NetworkCosts(model, torch.rand(4, 1, 6, 6)).classes == 2 and not compiled
    model(torch.rand(4, 1, 6, 6))
    assert compiled


@pytest.mark.parametrize("undone", [False, True])
def test_an_update_costs_what_the_network_costs_then(monkeypatch, undone):
    """Masks change within the second epoch; where it is undone, the network has its earlier masks again."""
    update, counted, verdicts = Updater.update, [], iter([False, undone, False, False, False])

    def counting(self, objective, x, y, noise, watch):
        costs = NetworkCosts(self.model, x)
        done = update(self, objective, x, y, noise, watch)
        counted.append((len(x) * costs.attack(done.passes), len(x) * costs.update(done.passes)))
        return done

    monkeypatch.setattr(Updater, "update", counting)
    monkeypatch.setattr(OverfittingMonitor, "must_undo", lambda *arguments: next(verdicts))
    method = SparseTraining(MethodConfig("gmp", density=0.05, interval=2))
    config = replace(QUICK, objective="fgsm-rs", epochs=4)
    records = training.train(network(channels=32), batches(), config, validation=VALIDATION, hook=method)
    attempts = [counted[begin : begin + 3] for begin in range(0, len(counted), 3)]
    assert len(attempts) == 4 + undone and len({cost for cost, _ in attempts[1]}) > 1
    kept = [attempt for number, attempt in enumerate(attempts) if not (undone and number == 1)]
    for record, attempt in zip(records, kept, strict=True):
        assert (record.attack.macs, record.update.macs) == tuple(map(sum, zip(*attempt, strict=True)))
    assert records[-1].total.macs == sum(map(sum, counted))


def test_costs_are_those_of_whole_batches_also_where_masks_change_at_a_small_one(monkeypatch):
    """Few images take other kernels; a run that is continued would count others."""
    measured = []
    monkeypatch.setattr(loop, "NetworkCosts", lambda model, x: measured.append(len(x)) or NetworkCosts(model, x))
    method = SparseTraining(MethodConfig("static", density=0.2, dense_epochs=1))
    training.train(network(), batches(size=60), replace(QUICK, objective="fgsm-rs"), hook=method)
    assert set(measured) == {60}


def test_seconds_are_those_of_the_models_gpu(monkeypatch):
    """Another GPU may be the current one."""
    clocks, device = GpuClocks(monkeypatch), torch.device("cuda", 1)
    watch = Stopwatch(device)
    for _ in range(2):
        with watch.phase("attack"):
            clocks[device] += 250
    assert watch.seconds("attack") == 0.5 and clocks.waited_for == [device]
