"""`run_once` and `maskable`: one forward pass through the layers that can have masks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from sparse_adv.engine import fuse_for_training
from sparse_adv.masks import prune
from sparse_adv.masks.layers import maskable, owners, run_once, unknown_module
from sparse_adv.nn import count_macs, dead_channels, explain, mac_density, sparsify, tune


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 36, 2))


@pytest.mark.parametrize("fails", [False, True])
def test_model_hooks_and_random_state_are_restored(fails):
    model = make_model().train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run_once(model, (2, 3, 9, 9), lambda layer, input, output: None)
    else:
        run_once(model, (2, 3, 8, 8), lambda layer, input, output: None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model] == [True, False, True, True, True]
    assert not any(module._forward_hooks for module in model)


def test_visit_is_called_for_convolutions_and_on_request_for_linear_layers():
    model, visited = make_model(), []
    run_once(model, torch.rand(2, 3, 8, 8), lambda layer, input, output: visited.append((layer, output.shape)))
    assert visited == [(model[0], (2, 4, 6, 6))]
    run_once(model, (2, 3, 8, 8), lambda layer, input, output: visited.append((layer, output.shape)), linear=True)
    assert visited[1:] == [(model[0], (2, 4, 6, 6)), (model[4], (2, 2))]
    assert list(maskable(model)) == ["0", "4"] and list(maskable(model, linear=False)) == ["0"]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 3, 0, 8), (1, 3, 8.0, 8)])
def test_an_invalid_shape_raises(shape):
    with pytest.raises(ValueError, match=r"input must be a tensor or 4 positive integers \[N, C, H, W\], got \("):
        run_once(make_model(), shape, lambda layer, input, output: None)


def test_the_message_about_an_unknown_module_suggests_a_similar_name():
    assert unknown_module("conv1", ["conv2", "fc"]) == "model has no module 'conv1'; did you mean 'conv2'?"
    assert unknown_module("x", ["conv2"]) == "model has no module 'x'"


@pytest.mark.parametrize("look", ["explain", "count_macs", "mac_density", "prune", "fuse_for_training", "owners"])
def test_a_look_at_a_model_makes_no_step_of_spectral_norm(look):
    """To read a parametrized weight in train mode changes what its parametrization holds."""
    model = nn.Sequential(spectral_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).train()
    x, before = torch.rand(2, 3, 9, 9), copy.deepcopy(model.state_dict())
    looks = {
        "explain": lambda: (explain(model), explain(model, x)),
        "count_macs": lambda: count_macs(model, x),
        "mac_density": lambda: mac_density(model, {"3": torch.ones(8, 8, 3, 3, dtype=torch.bool)}, x),
        "prune": lambda: prune(model, 0.3),
        "fuse_for_training": lambda: fuse_for_training(model, x),
        "owners": lambda: owners(maskable(model)),
    }
    looks[look]()
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_layers_may_be_called_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(input=self.conv(input=x))

    model = Model()
    mask = torch.ones(4, 2, 3, 3, dtype=torch.bool)
    mask[1] = False
    assert dead_channels(model, {"conv": mask}, (1, 2, 6, 6))["norm"].tolist() == [False, True, False, False]
    sparsify(model, {"conv": mask})
    assert count_macs(model, (1, 2, 6, 6)).kept == 3 * 2 * 9 * 16
    assert set(tune(model, torch.rand(1, 2, 6, 6), trials=1)) == {"conv"}
