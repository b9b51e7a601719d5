"""What `prune` tells of layers that it leaves out, and of those of which it keeps nothing."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sparse_adv.masks import prune
from sparse_adv.nn import sparsify


def test_a_warning_names_a_layer_of_which_no_weight_is_kept(caplog):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    prune(model, 0.1)
    assert "keeps no weight of '0'" in caplog.text


def test_layers_of_which_no_weight_is_kept_are_named_in_one_line(caplog):
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3) for _ in range(7)], nn.Conv2d(1, 64, 3))
    prune(model, 0.1, score=lambda name, weight: weight.abs() + 10 * (name == "7"))
    assert [record.getMessage() for record in caplog.records] == [
        "prune keeps no weight of '0', '1', '2', '3', '4' and 2 more layers, whose output will be constant"
    ]


@pytest.mark.parametrize("structure", [(1, 1), "filter"])
def test_layers_that_sparsify_refuses_get_no_mask(caplog, structure):
    """As timm's Conv2dSame, ScaledStdConv2d and others, whose forward is their own."""

    class Same(nn.Conv2d):
        def forward(self, input):
            return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))

    class Scaled(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = nn.Sequential(Same(3, 4, 2), nn.Conv2d(4, 4, 3), nn.Flatten(), Scaled(16, 8), nn.Linear(8, 2))
    masks = prune(model, 0.5, structure, linear=True)
    assert sorted(masks) == ["1", "4"]
    assert "not pruned, as they have a forward of their own: 0, 3" in caplog.text
    assert sparsify(model, masks)(torch.rand(2, 3, 4, 4)).shape == (2, 2)
    caplog.clear()
    assert sorted(prune(model, 0.5, structure, exclude=["0", "3"], linear=True)) == ["1", "4"] and not caplog.text
    model[1].forward = model[1].forward  # as accelerate sets it
    assert sorted(prune(model, 0.5, structure, linear=True)) == ["4"] and "forward of their own: 0, 1, 3" in caplog.text


def test_a_layer_whose_weight_is_computed_gets_no_mask_as_sparsify_refuses_it(caplog):
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3, groups=2), nn.Conv2d(16, 18, 1))
    nn.utils.parametrizations.weight_norm(model[0])
    parametrize.register_parametrization(model[2], "bias", nn.Softplus())
    masks = prune(model, 0.5)
    assert list(masks) == ["1"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        (
            "WARNING",
            "not pruned, as weight or bias is computed from something else (nn.utils.prune or parametrize): 0, 2",
        )
    ]
    sparsify(model, masks)


def test_convolutions_without_a_masked_form_are_named(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(2), nn.Conv1d(4, 2, 3))
    with caplog.at_level("INFO"):
        prune(model, 0.5)
    said = "not pruned, as only Conv2d and Linear layers can be masked: 1, 3"
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [("INFO", said)]
    caplog.clear()
    nn.utils.parametrizations.weight_norm(model[0])
    prune(model, 0.5)
    assert caplog.records[0].getMessage().endswith("; as only Conv2d and Linear layers can be masked: 1, 3")


def test_candidates_that_hold_the_smaller_part_of_the_weights_are_told_once(caplog):
    """As the patch embedding of a vision transformer."""
    model = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(64, 10), nn.Linear(10, 26))
    prune(model, 0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "linear layers hold 90.0 % of the weights that can be pruned, and stay dense: linear=True prunes those, too"
    ]
    caplog.clear()
    prune(model, 0.5, linear=True)
    prune(model, 0.5, exclude=["2", "3"])
    prune(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Linear(64, 10)), 0.5)  # half of the weights
    prune(nn.Sequential(nn.Conv2d(1, 10, 8), nn.LazyLinear(100)), 0.5)
    assert not caplog.records
