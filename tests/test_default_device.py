"""`torch.set_default_device` makes tensors elsewhere than where the library's are: all of these say where they are.

On the meta device they would have no data, and every use would fail.
"""

from dataclasses import replace

import pytest
import torch
from helpers.attacked import batch, make_model
from helpers.small_runs import QUICK, TRAIN, VALIDATION, WITH_ENGINE, batches, network

from sparse_adv import attacks, data, engine, explain, masks, nn, sparsify, tickets, training
from sparse_adv.config import MethodConfig, PruneConfig
from sparse_adv.methods import SparseTraining

X, Y = batch(size=4)


@pytest.fixture
def model():
    """A model on the CPU, while new tensors are made elsewhere."""
    model = make_model().eval()
    with torch.device("meta"):
        yield model


def test_images_are_divided_and_augmented(model):
    parts = [*data.hold_out(TRAIN, 10), data.stratified(TRAIN, 0.5)]
    colour = data.Split(torch.zeros(40, 3, 32, 32, dtype=torch.uint8, device="cpu"), TRAIN.labels[:40])
    parts += [data.Split(x, y) for x, y in (*batches(), *data.Batches(colour, 8, augment=True))]
    assert {tensor.device.type for part in parts for tensor in part} == {"cpu"}


def test_attacks_find_examples(model):
    found = {
        name: getattr(attacks, name)(model, X, Y, eps=0.1, **more)
        for name, more in {
            "fgsm": {},
            "pgd": {"alpha": 0.05, "steps": 2},
            "apgd": {"steps": 3},
            "fab": {"steps": 3},
            "square": {"queries": 20},
        }.items()
    }
    found["pgd l2"] = attacks.pgd(model, X, Y, eps=0.5, alpha=0.2, steps=2, norm="l2")
    found["cw"] = attacks.cw(model, X, Y, steps=2)
    assert all(bool(adv.isfinite().all()) for adv in found.values())
    attacks.signs_of_masking(model, X, Y, eps=0.1)
    assert not engine.explain(model, X)[0].startswith("autograd: ")


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_models_are_pruned_and_measured(model, block):
    for scope in ("global", "uniform", "erk", "igq"):
        found = masks.prune(model, 0.5, block=block, scope=scope)
    sparsify(model, found)
    assert nn.count_macs(model, X.shape).forward > 0 and "density" in str(explain(model, X)).lower()
    assert all(mask.device.type == "cpu" for mask in tickets.shuffle(found, 0, block, model).values())


@pytest.mark.parametrize("method", ["none", "set", "gmp"])
def test_networks_are_trained(tmp_path, model, method):
    own = MethodConfig(method, density=0.5, interval=1, block=(2, 2), permute_channels=method == "gmp")
    hook = None if method == "none" else SparseTraining(own)
    config = replace(WITH_ENGINE, objective="fgsm-rs", epochs=2, awp_gamma=0.01, ema_decay=0.5, max_grad_norm=1.0)
    with torch.device("cpu"):
        trained = network()
    records = training.train(trained, batches(), config, validation=VALIDATION, folder=tmp_path, hook=hook)
    assert records[-1].robust_accuracy is not None


def test_tickets_are_found(tmp_path, model):
    with torch.device("cpu"):
        searched = network()
    prune = PruneConfig(0.5, block=(2, 2), permute_channels=True, rounds=2)
    ticket = tickets.search(searched, batches(), QUICK, prune, validation=VALIDATION, folder=tmp_path)
    assert all(mask.device.type == "cpu" for mask in ticket.masks.values())
