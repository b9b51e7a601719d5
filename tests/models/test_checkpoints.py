"""`load_checkpoint`: networks of other code compute the same here, and nothing is left over, missing or dropped."""

from functools import partial

import pytest
import torch
from helpers.foreign_networks import (
    Basic,
    Bottleneck,
    DeepMind,
    PreAct,
    Residual,
    Trades,
    Vgg,
    randomised,
    with_scores,
)

from sparse_adv import masks, models, tickets
from sparse_adv.models import Normalize, load_checkpoint
from sparse_adv.models.checkpoints import sizes_of
from sparse_adv.nn import MaskedConv2d, MaskedLinear

EIGHTEEN, FIFTY = (2, 2, 2, 2), (3, 4, 6, 3)
Raw = partial(PreAct, raw=True)
OTHERS = {
    "resnet18": lambda: Residual(Basic, EIGHTEEN),
    "resnet34": lambda: Residual(Basic, FIFTY),
    "resnet50": lambda: Residual(Bottleneck, FIFTY, expansion=4),
    "preact_resnet18": lambda: Residual(PreAct, EIGHTEEN, preact=True, last_norm=True),
    "preact_resnet18_kuangliu": lambda: Residual(PreAct, EIGHTEEN, preact=True),
    "preact_resnet18_wong": lambda: Residual(Raw, EIGHTEEN, preact=True, last_norm=True),
    "preact_resnet18_robustbench": lambda: Residual(Raw, EIGHTEEN, preact=True),
    "vgg16_kuangliu": Vgg,
    "vgg16_hydra": lambda: Vgg(hydra=True),
    "wrn-10-2": Trades,
    "wrn-10-2-silu": DeepMind,
}


def width_of(name: str) -> int | None:
    return None if name.startswith("wrn") else 4


def load(source, name, **options):
    return load_checkpoint(source, name, width=width_of(name), **({"normalize": "none"} | options))


@pytest.mark.parametrize("prefix", ["", "module.", "module.model."])
@pytest.mark.parametrize("name", OTHERS)
def test_a_network_of_other_code_computes_the_same_logits(name, prefix, tmp_path):
    net = randomised(OTHERS[name]())
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pt")
    images = torch.rand(3, 3, 32, 32)
    for source in (tmp_path / "a.pt", state, {"net": state}):
        ours = load(source, name)
        assert not ours.training
        torch.testing.assert_close(ours(images), net(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "vgg16_hydra", "wrn-10-2"])
def test_scores_of_hydra_become_masks(name):
    state, net = with_scores(randomised(OTHERS[name]()), 0.3)
    ours, images = load(state, name, density=0.3), torch.rand(3, 3, 32, 32)
    torch.testing.assert_close(ours(images), net(images), rtol=1e-4, atol=1e-6)
    layers = [layer for layer in ours.modules() if isinstance(layer, MaskedConv2d | MaskedLinear)]
    assert layers and all(layer.density == pytest.approx(0.3, abs=0.02) for layer in layers)
    with pytest.raises(ValueError, match="density must give the fraction"):
        load(state, name)


def test_the_normalisation_of_a_checkpoint_is_kept_in_every_form():
    net = randomised(Residual(Basic, EIGHTEEN, normalized=True))
    images, state = torch.rand(2, 3, 32, 32), net.state_dict()
    wanted = net(images)
    inner = {key: value for key, value in state.items() if key not in ("mu", "sigma")}
    for mean, std, prefix in (("mu", "sigma", ""), ("0.mean", "0.std", "1."), ("normalize.mean", "normalize.std", "")):
        named = {prefix + key: value for key, value in inner.items()} | {mean: net.mu, std: net.sigma}
        torch.testing.assert_close(load(named, "resnet18", normalize=None)(images), wanted, rtol=1e-5, atol=1e-6)
    layer = Normalize(net.mu.flatten().tolist(), net.sigma.flatten().tolist())
    torch.testing.assert_close(load(inner, "resnet18", normalize=layer)(images), wanted, rtol=1e-5, atol=1e-6)
    assert load(inner, "resnet18", normalize="cifar100").normalize.mean.flatten()[0] == pytest.approx(0.5071)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "wrn-10-2", "digits_cnn"])
def test_own_networks_pruned_or_dense_come_back_bit_for_bit(name):
    model = models.build(name, width=8).eval()
    images = torch.rand(2, *models.find(name).input_shape)
    kept = masks.prune(model, 0.5)
    weights = dict(model.state_dict())
    dense = load_checkpoint(weights, name, width=8)
    assert dense(images).equal(model(images))
    again = load_checkpoint(masks.Ticket(kept, weights, {}), name, width=8)
    assert all(again.get_submodule(layer).weight_mask.equal(mask) for layer, mask in kept.items())


def test_a_checkpoint_of_before_batches_were_counted_loads():
    net = randomised(OTHERS["resnet18"]())
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load(state, "resnet18")(images), net(images), rtol=1e-5, atol=1e-6)


def damaged(change):
    state = dict(OTHERS["resnet18"]().state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("source", "name", "options", "message"),
    [
        (
            damaged(lambda s: s.pop("layer2.0.shortcut.0.weight")),
            "resnet18",
            {},
            r"lacks 'layer2.0.downsample.0.weight'",
        ),
        (damaged(lambda s: s.update({"extra.weight": torch.ones(2)})), "resnet18", {}, "has 'extra.weight', for which"),
        (
            damaged(lambda s: s.update({"linear.bias": torch.ones(3)})),
            "resnet18",
            {},
            r"'linear.bias' has shape \(3,\)",
        ),
        (damaged(lambda s: s.update({"fc.bias": torch.ones(10)})), "resnet18", {}, "both 'linear.bias' and 'fc.bias'"),
        (damaged(lambda s: None), "resnet18", {"normalize": None}, "does not say how its images were normalised"),
        (damaged(lambda s: s.update(mu=torch.ones(3))), "resnet18", {}, "has the normalisation 'mu' itself"),
        (damaged(lambda s: None), "resnet18", {"normalize": "cifar1"}, "normalize must be .*cifar10.*, got 'cifar1'"),
        (damaged(lambda s: None), "resnet18", {"normalize": "mnist"}, "layer for 3 channels, got 'mnist'"),
        (damaged(lambda s: None), "preact_resnet18_kuangliu", {}, "has 'bn1.weight', for which"),
        (damaged(lambda s: None), "resnet19", {}, "did you mean .resnet18."),
        ({}, "resnet18", {}, "no state dict"),
    ],
)
def test_what_does_not_fit_is_named_in_one_sentence(source, name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load(source, name, **options)
    assert "\n" not in str(error.value)


def test_a_file_with_code_is_refused(tmp_path):
    torch.save(OTHERS["resnet18"](), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="neither a tensor nor plain data"):
        load(tmp_path / "a.pt", "resnet18")
    with pytest.raises(FileNotFoundError, match=r"b\.pt"):
        load(tmp_path / "b.pt", "resnet18")


def test_a_width_beyond_that_of_the_file_takes_no_memory():
    state = models.build("digits_cnn", width=4).state_dict()
    for width, said in ((200_000, "does not fit digits_cnn"), (10**9, "cannot be built")):
        with pytest.raises(ValueError, match=said):
            models.load_checkpoint(state, "digits_cnn", width=width)


def test_the_images_of_a_checkpoint_may_have_another_shape_than_those_of_cifar():
    net = models.build("resnet18", width=4, classes=7, input_shape=(1, 28, 28))
    state = {name: value for name, value in net.state_dict().items() if "normalize" not in name}
    ours = load(state, "resnet18", classes=7, input_shape=(1, 28, 28), normalize="mnist")
    assert ours(torch.rand(2, 1, 28, 28)).shape == (2, 7) and ours.normalize.mean.item() == pytest.approx(0.1307)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("own", [True, False])
def test_a_checkpoint_becomes_a_ticket_that_the_network_can_be_restored_from(name, own, tmp_path):
    theirs = randomised(OTHERS[name]())
    model = models.build(name, width=width_of(name), classes=theirs(torch.rand(2, 3, 32, 32)).shape[1])
    model.load_state_dict(load(theirs.state_dict(), name).state_dict())
    kept = masks.prune(model, 0.3)
    if own:
        given = masks.Ticket(kept, model.state_dict(), {"seed": 3})
    else:
        sparse = masks.prune(theirs, 0.3)
        masks.save_pruned(tmp_path / "theirs.pt", sparse, theirs.state_dict())
        given = masks.load_pruned(tmp_path / "theirs.pt")
    fitted = models.fit_ticket(given, name, normalize=None if own else "none", width=width_of(name))
    assert fitted.provenance == given.provenance
    restored = tickets.restore(model, fitted, (1, 3, 32, 32))
    assert sum(map(torch.Tensor.sum, fitted.masks.values())) <= sum(map(torch.Tensor.sum, given.masks.values()))
    assert all(restored.get_submodule(name).weight_mask.equal(mask) for name, mask in fitted.masks.items())


@pytest.mark.parametrize(("classes", "channels"), [(100, 3), (7, 1)])
def test_a_ticket_has_the_classes_and_channels_of_the_checkpoint(classes, channels):
    model = models.build("resnet18", width=4, classes=classes, input_shape=(channels, 28, 28))
    other = {f"module.{key.replace('downsample', 'shortcut')}": value for key, value in model.state_dict().items()}
    fitted = models.fit_ticket(masks.Ticket({}, other), "resnet18", width=4)
    assert all(fitted.state_dict[key].equal(value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [*OTHERS, "digits_cnn", "vgg16"])
def test_the_sizes_do_not_depend_on_the_order_of_the_tensors(name):
    net = models.build(name, width=4, classes=7, input_shape=(1, *models.find(name).input_shape[1:]))
    state = net.state_dict()
    for keys in (state, reversed(state), sorted(state)):
        assert sizes_of({key: state[key] for key in keys}, name) == (7, 1)
    theirs = OTHERS[name]().state_dict() if name in OTHERS else state
    assert sizes_of({key: theirs[key] for key in sorted(theirs)}, name) == sizes_of(theirs, name)


def test_seeds_have_64_bits():
    assert models.build("digits_cnn", 2**64 - 1, width=4) is not None
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"seed must lie in \[-2\*\*63, 2\*\*64\), got {seed}"):
            models.build("digits_cnn", seed)
