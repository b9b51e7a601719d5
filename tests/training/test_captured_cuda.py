"""On a GPU: a run whose updates are replayed as CUDA graphs equals one without, bit for bit.

cuDNN's fused ReLU and its search for the fastest algorithm are left out under deterministic algorithms, so one test
does without these.
"""

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import TRAIN, WITH_ENGINE, equal_states, network
from torch import nn

from sparse_adv import data, masks, sparsify, training
from sparse_adv.ops import masked_conv2d_roofline

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CONFIG = replace(WITH_ENGINE, objective="n-fgsm", epochs=3, overfitting_monitor=False)
UPDATES = 40


def strided_network(block):
    """Layers of 64 channels, one of them with a stride; with a block, its passes run in the Triton kernels."""
    model = network(channels=64)
    model[3].stride = (2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model[7] = nn.Linear(9 * 64, 2)
    if block is not None:
        sparsify(model, masks.prune(model, density=0.25, block=block, scope="uniform", exclude=["0"]), block)
    return model.cuda()


def training_of(graphs, block, objective, precision, deterministic=True):
    """Train on a GPU for 40 updates, 10 an epoch: an objective whose updates differ by turns replays each kind.

    Returns:
        The weights, and the loss of each epoch.
    """
    model = strided_network(block)
    given = data.Batches(TRAIN.to("cuda"), 10, augment=True)  # the last batch of an epoch is smaller
    config = replace(CONFIG, objective=objective, epochs=4, ema_decay=0.9, max_grad_norm=1.0, schedule="onecycle")
    run = training.Training(model, given, replace(config, precision=precision, graphs=graphs))
    with training.deterministic(deterministic):
        records = list(run.epochs())
    if block is not None:
        x = torch.empty(10, 64, 6, 6, device="cuda", dtype=getattr(torch, precision))
        assert [planned.kernel for planned in model[3].plan(x)] == ["sparse"] * 3
    assert records[-1].step == UPDATES * (config.replays if objective == "free" else 1)
    replayed = [name for call in run.graphs.cache.calls.values() for name in call.replays]
    assert ("update" in replayed) == graphs
    return run.updater.state_dict()["model"] | run.evaluated.state_dict(), [record.loss for record in records]


@pytest.fixture(autouse=True)
def blocks_run_in_triton(monkeypatch):
    """Layers this small take the least time of a kernel either way, and the roofline prefers cuDNN for them."""
    monkeypatch.setattr(masked_conv2d_roofline, "blocks_are_faster", lambda *_, **__: True)


@pytest.mark.parametrize(
    ("objective", "block", "precision"),
    [
        *(("n-fgsm", block, precision) for block in (None, (64, 64)) for precision in ("float32", "bfloat16")),
        ("pgd", (64, 64), "bfloat16"),
        *((objective, None, "bfloat16") for objective in ("free", "fgsm-rs-cs", "fgsm-uap", "nu-at", "trades")),
    ],
)
def test_on_cuda_updates_with_graphs_equal_those_without(objective, block, precision):
    options = block, objective, precision
    (with_graphs, losses), (without, losses_without) = (training_of(graphs, *options) for graphs in (True, False))
    assert equal_states(with_graphs, without) and losses == losses_without


def test_on_cuda_float16_updates_that_overflow_are_skipped_in_a_replay_too():
    results = []
    for graphs in (True, False):
        config = replace(CONFIG, precision="float16", graphs=graphs)
        run = training.Training(network().cuda(), data.Batches(TRAIN.to("cuda"), 16), config)
        run.updater.scaler.load_state_dict(run.updater.scaler.state_dict() | {"scale": 2.0**40})
        with training.deterministic():
            list(run.epochs())
        results.append((run.updater.scaler.get_scale(), run.updater.model.state_dict()))
    assert results[0][0] == results[1][0] < 2.0**40 and equal_states(results[0][1], results[1][1])


def test_on_cuda_updates_by_the_fastest_algorithms_learn_as_well_with_graphs():
    """cuDNN may add up in another order in each run, so that weights differ in the end: losses are compared."""
    options = (64, 64), "n-fgsm", "bfloat16", False
    (_, losses), (_, losses_without) = (training_of(graphs, *options) for graphs in (True, False))
    assert losses == pytest.approx(losses_without, rel=0.1)
