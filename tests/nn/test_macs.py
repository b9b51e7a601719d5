"""The multiply-adds that a model executes, compared with counts by hand."""

import pytest
import torch
from torch import nn

from sparse_adv.masks import density
from sparse_adv.nn import Macs, MaskedConv2d, count_macs, dead_channels, mac_density, shrink, sparsify
from sparse_adv.ops import PASSES

SHAPE = (3, 4, 9, 7)
STEM = 3 * (9 * 7) * (8 * 4 * 3 * 3)  # images * output pixels * weights
GROUPED = 3 * (5 * 4) * (16 * 4 * 3 * 1)  # stride 2, padding (1, 0): 9 x 7 -> 5 x 4
HEAD = 3 * (16 * 10)
DENSE = STEM + GROUPED + HEAD


@pytest.fixture
def model():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, (3, 1), stride=2, padding=(1, 0), groups=2, bias=False),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def masked(model, kernel, kept=24):
    """Masks for both convolutions, of `kept` weights each; `kernel` is fixed for all passes, or one for each pass."""
    masks = {name: torch.zeros_like(model.get_submodule(name).weight, dtype=torch.bool) for name in ("0", "2")}
    for mask in masks.values():
        mask.view(-1)[torch.randperm(mask.numel())[:kept]] = True
    sparsify(model, masks, block=(1, 1))
    kernels = kernel if isinstance(kernel, dict) else dict.fromkeys(PASSES, kernel)
    for layer in model.modules():
        if isinstance(layer, MaskedConv2d):
            layer.choose_kernels({name: {"kernel": kernel} for name, kernel in kernels.items()})
    return model


def kept_of(dense, weights):
    return dense // weights * 24


STEM_KEPT, GROUPED_KEPT = kept_of(STEM, 8 * 4 * 9), kept_of(GROUPED, 16 * 4 * 3)
SPARSE = STEM_KEPT + GROUPED_KEPT + HEAD


def test_a_dense_model_executes_all_in_each_pass(model):
    assert count_macs(model, SHAPE) == Macs(DENSE, DENSE, DENSE, STEM, DENSE, DENSE, 3)


def test_sparse_kernels_execute_kept_weights(model):
    assert count_macs(masked(model, "sparse"), SHAPE) == Macs(SPARSE, SPARSE, SPARSE, STEM_KEPT, SPARSE, DENSE, 3)


def test_dense_kernels_execute_pruned_weights_too(model):
    assert count_macs(masked(model, "dense"), SHAPE) == Macs(DENSE, DENSE, DENSE, STEM, SPARSE, DENSE, 3)


@pytest.mark.parametrize("sparse", PASSES)
def test_each_pass_counts_by_its_own_kernel(model, sparse):
    macs = count_macs(masked(model, {name: "sparse" if name == sparse else "dense" for name in PASSES}), SHAPE)
    assert {name: getattr(macs, name) for name in PASSES} == {n: SPARSE if n == sparse else DENSE for n in PASSES}
    assert macs.first_grad_input == (STEM_KEPT if sparse == "grad_input" else STEM)


def test_what_has_no_sparse_kernel_executes_all(model):
    masked(model, "sparse")
    with torch.autocast("cpu", torch.bfloat16):
        assert count_macs(model, SHAPE).forward == DENSE
    assert count_macs(model.double(), SHAPE).forward == DENSE


class OneByOne(nn.Sequential):
    """Runs on each image by itself, without a batch's dimension."""

    def forward(self, x):
        return [super(OneByOne, self).forward(image) for image in x]


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "circular"}])
@pytest.mark.parametrize("kind", [nn.Sequential, OneByOne])
def test_padding_of_any_kind_and_images_without_a_batch_count_alike(padding, kind):
    model = kind(nn.Conv2d(4, 8, 3, **padding), nn.ReLU(), nn.Conv2d(8, 8, 1))
    macs = count_macs(masked(model, "sparse"), SHAPE)
    assert (macs.forward, macs.grad_weight) == (2 * STEM_KEPT, 2 * STEM_KEPT)
    assert macs.dense == STEM + STEM // 36 * 8


def test_macs_are_proportional_to_the_batch(model):
    masked(model, "sparse")
    macs = count_macs(model, SHAPE)
    assert count_macs(model, torch.rand(6, 4, 9, 7)) == Macs(*(2 * count for count in macs))
    assert macs.per_image() == count_macs(model, (1, *SHAPE[1:]))


def test_a_layer_that_runs_twice_counts_twice():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    once = count_macs(layer, SHAPE).forward
    assert count_macs(nn.Sequential(layer, layer), SHAPE) == Macs(*[2 * once] * 3, once, *[2 * once] * 2, 3)


def test_a_mask_of_a_layer_counts_under_each_of_its_names():
    layer, mask = nn.Conv2d(4, 4, 3, padding=1), torch.rand(4, 4, 3, 3) < 0.5
    model = nn.Sequential(layer, nn.ReLU(), layer)
    first, second = (mac_density(model, {name: mask}, SHAPE) for name in ("0", "2"))
    assert first == second == mask.float().mean()


def test_linear_layers_count_every_row():
    assert count_macs(nn.Linear(7, 5), SHAPE).forward == 3 * 4 * 9 * (7 * 5)


def test_masked_linear_layers_multiply_zeros_too():
    mask = torch.arange(35).view(5, 7) % 5 == 0
    counted = count_macs(sparsify(nn.Sequential(nn.Linear(7, 5)), {"0": mask}), SHAPE)
    assert counted.forward == counted.grad_input == counted.grad_weight == counted.dense == 3 * 4 * 9 * 35
    assert counted.kept == 3 * 4 * 9 * 7


def test_a_model_with_neither_layer_executes_nothing():
    assert count_macs(nn.ReLU(), SHAPE) == Macs(0, 0, 0, 0, 0, 0, 3)


def test_counting_leaves_the_model_and_random_numbers_as_they_were(model):
    model[3].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    count_macs(model, SHAPE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_counting_compiles_nothing(model):
    torch.compiler.reset()  # other tests may have compiled as many networks as are compiled of one class
    compiled = []
    counted = count_macs(torch.compile(model, backend=lambda graph, inputs: compiled.append(graph) or graph), SHAPE)
    assert counted == count_macs(model, SHAPE) and not compiled


def test_mac_density_of_a_convolution_counts_output_pixels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1))
    masks = {"0": torch.zeros(8, 3, 3, 3, dtype=torch.bool), "1": torch.zeros(8, 8, 3, 3, dtype=torch.bool)}
    masks["0"][:2] = True
    masks["1"][:1] = True
    kept = 64 * 2 * 27 + 16 * 72 + 16 * 32
    dense = 64 * 8 * 27 + 16 * 8 * 72 + 16 * 32
    assert mac_density(model, masks, (1, 3, 8, 8)) == kept / dense
    assert mac_density(model, masks, (3, 3, 8, 8)) == kept / dense


def test_mac_density_of_a_linear_layer_counts_rows_of_the_input():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Flatten(), nn.Linear(256, 2))  # rows: 64, then 1
    masks = {"1": torch.zeros(4, 8, dtype=torch.bool), "3": torch.zeros(2, 256, dtype=torch.bool)}
    masks["1"][:1] = masks["3"][:1] = True
    kept = 64 * 24 + 64 * 8 + 256
    dense = 64 * 24 + 64 * 32 + 512
    assert mac_density(model, masks, (1, 3, 8, 8)) == kept / dense
    with pytest.raises(ValueError, match="model must run a convolution or a linear layer"):
        mac_density(nn.ReLU(), {}, (1, 3, 8, 8))


def test_mac_density_raises_for_an_unknown_layer_or_an_invalid_shape():
    with pytest.raises(ValueError, match="model has no module '9'"):
        mac_density(nn.Conv2d(3, 4, 3), {"9": torch.ones(1, 1, 1, 1, dtype=torch.bool)}, (1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"example_input must be a tensor or 4 positive integers .*got \(3, 8\)"):
        mac_density(nn.Conv2d(3, 4, 3), {}, (3, 8))


@pytest.mark.parametrize(
    ("name", "mask", "error", "message"),
    [
        (
            "0",
            torch.ones(8, 8, 9, 9, dtype=torch.bool),
            ValueError,
            r"module '0': mask has shape \(8, 8, 9, 9\), weight",
        ),
        ("0", torch.ones(4, 3, 3, 3), TypeError, "module '0': mask must be a bool tensor"),
        ("1", torch.ones(4, 4, dtype=torch.bool), TypeError, "module '1': only Conv2d and Linear layers can be masked"),
    ],
)
def test_masks_that_do_not_fit_are_refused_in_one_way(name, mask, error, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    shape = (1, 3, 8, 8)
    for use in (
        lambda: mac_density(model, {name: mask}, shape),
        lambda: density({name: mask}, model),
        lambda: sparsify(model, {name: mask}),
        lambda: shrink(model, {name: mask}, shape),
        lambda: dead_channels(model, {name: mask}, shape),
    ):
        with pytest.raises(error, match=message):
            use()
