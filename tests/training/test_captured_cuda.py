"""On a GPU: a run whose updates are replayed as CUDA graphs equals one without, bit for bit."""

from dataclasses import replace

import pytest
import torch
from helpers.small_runs import TRAIN, WITH_ENGINE, equal_states, network

from sparse_adv import data, masks, sparsify, training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CONFIG = replace(WITH_ENGINE, objective="n-fgsm", epochs=3, overfitting_monitor=False)


def weights_of_twenty_updates(graphs, block, objective, precision):
    """Train a network of blocks of 64 channels for 20 updates on a GPU, the last batch of each epoch smaller."""
    model = network(channels=64).cuda()
    if block is not None:
        sparsify(model, masks.prune(model, density=0.5, block=block), block)
    given = data.Batches(TRAIN.to("cuda"), 20, augment=True)
    config = replace(CONFIG, objective=objective, epochs=4, ema_decay=0.9, max_grad_norm=1.0, schedule="onecycle")
    run = training.Training(model, given, replace(config, precision=precision, graphs=graphs))
    with training.deterministic():
        records = list(run.epochs())
    assert records[-1].step == 20 * (config.replays if objective == "free" else 1)
    replayed = [name for call in run.graphs.cache.calls.values() for name in call.replays]
    assert ("update" in replayed) == graphs
    return run.updater.state_dict()["model"] | run.evaluated.state_dict()


@pytest.mark.parametrize(
    ("objective", "block", "precision"),
    [
        *(("n-fgsm", block, precision) for block in (None, (64, 64)) for precision in ("float32", "bfloat16")),
        ("pgd", (64, 64), "bfloat16"),
        *((objective, None, "bfloat16") for objective in ("free", "fgsm-rs-cs", "fgsm-uap", "nu-at", "trades")),
    ],
)
def test_on_cuda_twenty_updates_with_graphs_equal_those_without(objective, block, precision):
    options = block, objective, precision
    with_graphs, without = (weights_of_twenty_updates(graphs, *options) for graphs in (True, False))
    assert equal_states(with_graphs, without)


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
