"""Masked layers whose parameters FSDP, the first and the second, distributes over two processes."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.process_group import results_by_rank
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from sparse_adv import attacks, densify, engine, masks, sparsify, training
from sparse_adv.nn import frozen_weights, tune

STEPS = 3


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    model = nn.Sequential(*layers).eval()
    return sparsify(model, masks.prune(model, 0.3, scope="uniform", linear=True))


def first(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


def second(model):
    for layer in (model[0], model[4]):
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = {"FSDP1": first, "FSDP2": second}


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.rand(8, 2, 6, 6, generator=generator), torch.arange(8) % 4


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)


def train(model, optimizer, x, y):
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def auto_attack(model, x, y):
    names = ["apgd-ce"]
    evaluator = attacks.AutoAttack(
        model, eps=0.1, version="custom", attacks_to_run=names, seed=0, engine=False, verbose=False
    )
    evaluator.apgd.n_iter = 5
    return evaluator.run_standard_evaluation(x, y)


def message(function, *args):
    try:
        function(*args)
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing was raised"


def uses(wrap):
    """What attacks, evaluation and training make of a sharded model."""
    model, (x, y) = wrap(network()).eval(), batch()
    optimizer = optimizer_of(model)  # before a pass, after which FSDP2 shows parameters that it has gathered
    results = {"logits": model(x)}  # after this pass FSDP frees the weights
    for use_engine in (True, False):
        results[f"engine={use_engine}"] = attacks.fgsm(model, x, y, eps=0.1, engine=use_engine)
    with frozen_weights(model):
        results["frozen"] = model(x)
    results["robust"] = training.robust_accuracy(model, [(x, y)], eps=0.1, steps=2).fraction
    results["steps"] = engine.explain(model, x)
    kept = {name: torch.ones_like(each.weight_mask) for name, each in model.named_modules() if hasattr(each, "density")}
    results["sparsify"] = message(sparsify, model, kept)
    results["densify"] = message(densify, model)
    results["prune"] = message(masks.prune, model)
    results["tune"] = message(tune, model, x)
    results["AutoAttack"] = auto_attack(model, x, y)
    train(model, optimizer, x, y)
    results["trained"] = model(x)
    return results


def original_parameters():
    model = first(network(), use_orig_params=True)
    return message(model, batch()[0])


SCENARIOS = {**{name: partial(uses, wrap) for name, wrap in WRAPPERS.items()}, "original": original_parameters}


def work(rank, folder):
    warnings.simplefilter("ignore", FutureWarning)
    return {name: scenario() for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both processes; they are started once, for all scenarios."""
    return results_by_rank(work, tmp_path_factory.mktemp("two"))


@pytest.fixture(params=WRAPPERS)
def each(request, results):
    """The results of one kind of FSDP, of both processes."""
    return [of_rank[request.param] for of_rank in results]


def test_the_passes_are_those_of_the_whole_model(each):
    expected = network()(batch()[0])
    for results in each:
        torch.testing.assert_close(results["logits"], expected)
        torch.testing.assert_close(results["frozen"], expected)


def test_attacks_and_evaluation_give_what_they_give_of_the_whole_model(each):
    model, (x, y) = network(), batch()
    expected = attacks.fgsm(model, x, y, eps=0.1, engine=False)
    robust = training.robust_accuracy(model, [(x, y)], eps=0.1, steps=2).fraction
    for results in each:
        torch.testing.assert_close(results["engine=True"], expected)
        torch.testing.assert_close(results["engine=False"], expected)
        torch.testing.assert_close(results["AutoAttack"], auto_attack(model, x, y))
        assert results["robust"] == robust


def test_training_gives_what_it_gives_of_the_whole_model(each):
    model, (x, y) = network(), batch()
    train(model, optimizer_of(model), x, y)
    for results in each:
        torch.testing.assert_close(results["trained"], model(x))


def test_what_cannot_be_done_is_told(each):
    for results in each:
        assert results["steps"] == ["autograd: FSDP gathers its weights in each pass"]
        for function in ("prune", "sparsify", "densify", "tune"):
            assert results[function].endswith(
                "weight is sharded by FSDP: prune, sparsify, densify or tune the model before FSDP wraps it"
            )


def test_fsdp1_with_original_parameters_is_refused(results):
    for of_rank in results:
        assert "FSDP(use_orig_params=True) cannot shard masked layers" in of_rank["original"]
