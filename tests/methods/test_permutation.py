"""Channels permuted before the first pruning: training goes on as if they had always been in that order."""

import copy
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import TRAIN, VALIDATION, WITH_ENGINE, Batches, Stop, Untraceable, equal_states, network

from sparse_adv import masks, runs, training
from sparse_adv.masks import ChannelPermutation, dependency_groups
from sparse_adv.methods import MethodConfig, SparseTraining, permutation
from sparse_adv.training import checkpoint

CONFIG = replace(WITH_ENGINE, epochs=4, ema_decay=0.5)
"""12 updates."""
STOPPED = replace(CONFIG, engine=False)
"""The engine would have to trace each of the many models."""
SHAPE = (1, 1, 6, 6)
PERMUTED = {
    "gmp": MethodConfig("gmp", density=0.3, block=(4, 4), interval=4, permute_channels=True),
    "static": MethodConfig("static", density=0.3, block=(4, 4), dense_epochs=2, permute_channels=True),
    "rigl": MethodConfig("rigl", density=0.3, block=(4, 2), dense_epochs=1.5, interval=2, permute_channels=True),
}


def run(hook, model=None, config=CONFIG, **options):
    model = model or network(channels=8)
    return model, training.train(model, Batches(TRAIN, 32), config, validation=VALIDATION, hook=hook, **options)


def test_momentum_batchnorm_and_average_move_with_the_weights(monkeypatch):
    """A run whose channels are permuted half-way ends as one whose channels are permuted at the end."""
    config = MethodConfig("gmp", density=1.0, interval=6)
    plain = SparseTraining(config)
    expected, _ = run(plain)
    groups = [group for group in dependency_groups(network(channels=8), SHAPE) if not group.fixed]
    random = torch.Generator().manual_seed(1)
    orders = {group: torch.randperm(group.width, generator=random) for group in groups}
    assert len(groups) == 2
    forced = ChannelPermutation(orders, (1.0, 1.0))
    monkeypatch.setattr(masks, "permute_channels", lambda *args, **options: forced)
    hook = SparseTraining(replace(config, permute_channels=True))
    model, _ = run(hook)
    assert hook.retained == (1.0, 1.0)
    permutation.apply(plain.updater, forced)
    for ours, theirs in ((model, expected), (hook.updater.ema.module, plain.updater.ema.module)):
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    for parameter, other in zip(model.parameters(), expected.parameters(), strict=True):
        momentum = [
            each.optimizer.state[p]["momentum_buffer"]
            for each, p in ((hook.updater, parameter), (plain.updater, other))
        ]
        torch.testing.assert_close(*momentum, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", PERMUTED)
def test_the_function_stays_and_the_blocks_kept_hold_more(method, monkeypatch):
    x, seen = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0)), []

    def outputs(updater):
        models = [updater.model, updater.ema.module]
        modes = [[module.training for module in model.modules()] for model in models]
        values = [model.eval()(x).detach() for model in models]
        for model, mode in zip(models, modes, strict=True):
            for module, training_mode in zip(model.modules(), mode, strict=True):
                module.training = training_mode
        return values

    def permute(updater, config):
        before = outputs(updater)
        retained = permutation.permute_before_pruning(updater, config)
        torch.testing.assert_close(outputs(updater), before, rtol=1e-4, atol=1e-5)
        seen.append(retained)
        return retained

    monkeypatch.setattr("sparse_adv.methods.sparse_training.permute_before_pruning", permute)
    hook = SparseTraining(PERMUTED[method])
    _, records = run(hook)
    without = SparseTraining(replace(PERMUTED[method], permute_channels=False))
    _, plain = run(without)
    assert seen == [hook.retained] and seen[0][0] < seen[0][1] <= 1 and without.retained is None
    assert [each.density.weights for each in records] == pytest.approx([each.density.weights for each in plain])


@pytest.fixture(scope="module", params=PERMUTED)
def whole(request, tmp_path_factory):
    """Method, weights and folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    return (
        request.param,
        run(SparseTraining(PERMUTED[request.param]), config=STOPPED, folder=folder)[0].state_dict(),
        folder,
    )


@pytest.mark.parametrize(("stop_at", "again"), [(4, "new"), (5, "same"), (8, "new"), (11, "same")])
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, whole, stop_at, again):
    method, expected, folder = whole

    def stop(step):
        if step == stop_at:
            raise Stop

    model = network(channels=8)
    with pytest.raises(Stop):
        run(SparseTraining(PERMUTED[method]), model, STOPPED, folder=tmp_path, on_step=stop)
    hook = SparseTraining(PERMUTED[method])
    model, _ = run(hook, model if again == "same" else None, STOPPED, folder=tmp_path)
    assert equal_states(model.state_dict(), expected) and hook.retained is not None
    for name in (runs.LAST, runs.BEST):
        assert equal_states(*(checkpoint.read_weights(run / name)[0] for run in (folder, tmp_path)))


def test_what_cannot_be_permuted_is_refused_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"permute_channels needs weights before they are pruned, .* got method 'rigl'"
    ):
        MethodConfig("rigl", permute_channels=True)
    sparse = run(SparseTraining(MethodConfig("static", density=0.5, block=(4, 4))))[0]
    with pytest.raises(ValueError, match="permute_channels needs a model without masks, got one that has masks"):
        run(SparseTraining(PERMUTED["gmp"]), sparse)
    model = Untraceable(*network(channels=8))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace"):
        run(SparseTraining(PERMUTED["gmp"]), model)
    assert equal_states(model.state_dict(), before)
