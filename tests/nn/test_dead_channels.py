"""Dead BatchNorm channels, after fully pruned filters: the right ones are channels, and stay at zero under training."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers.tolerances import assert_close, assert_equal
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sparse_adv.nn import dead_channels, densify, shrink, sparsify, zero_dead_channels

SHAPE = (4, 3, 6, 6)
DEAD = [1, 4]


def convolution(inputs, outputs=8, bias=False):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def norm(channels=8, **options):
    """A BatchNorm2d whose parameters and statistics all differ from the defaults."""
    layer = nn.BatchNorm2d(channels, **options)
    for tensor in (*layer.parameters(), layer.running_mean, layer.running_var):
        nn.init.uniform_(tensor.data, 0.5, 1.5)
    return layer


class PostActivation(nn.Module):
    """A residual block that ends with bn2(conv2(...)) + skip."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = convolution(8), norm(), convolution(8), norm()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class PreActivation(nn.Module):
    """A residual block that begins with bn1(x), where x is the sum of the block before."""

    def __init__(self):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.conv2 = norm(), convolution(8), norm(), convolution(8)

    def forward(self, x):
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x


class AddedInPlace(nn.Module):
    """A residual sum that is written into the tensor that the convolution returned."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = convolution(8), norm()

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.bn(out)


def head():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def chain(bias=False):
    return nn.Sequential(convolution(3, bias=bias), norm(), nn.ReLU(), head())


def residual(block):
    return nn.Sequential(nn.Conv2d(3, 8, 1), block(), block(), head())


def masks_of(model, dead=DEAD):
    """For each 3x3 convolution, a mask that keeps no weight of the filters `dead` and a third of the others."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            mask = torch.rand(module.weight.shape) < 0.33
            mask[:, 0, 0, 0] = True
            mask[dead] = False
            masks[name] = mask
    return masks


def train(model, steps=5):
    """With all that could change a parameter: gradients, momentum and weight decay, and an Adam step."""
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2),
    ]
    model.train()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
            images, labels = torch.randn(SHAPE), torch.randint(5, SHAPE[:1])
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return optimizers


def dead_vector():
    return torch.tensor([channel in DEAD for channel in range(8)])


@pytest.fixture(params=[False, True], ids=["dense", "sparsified"])
def prepare(request):
    """Makes masks for a model, which stays dense or becomes sparse."""

    def prepare(model, **options):
        masks = masks_of(model, **options)
        return (sparsify(model, masks) if request.param else model), masks

    return prepare


def test_in_a_chain_the_norm_after_the_convolution_has_dead_channels(prepare):
    model, masks = prepare(chain())
    channels = dead_channels(model, masks, SHAPE)
    assert list(channels) == ["1"]
    assert_equal(channels["1"], dead_vector())


def test_in_a_post_activation_block_both_norms_have_dead_channels(prepare):
    channels = dead_channels(*prepare(residual(PostActivation)), SHAPE)
    assert list(channels) == ["1.bn1", "1.bn2", "2.bn1", "2.bn2"]
    assert all(dead.equal(dead_vector()) for dead in channels.values())


def test_a_norm_after_a_residual_sum_is_never_changed(prepare):
    model, masks = prepare(residual(PreActivation))
    assert masks["1.conv2"][DEAD].sum() == 0  # comes before the second block's bn1 in module order
    assert list(dead_channels(model, masks, SHAPE)) == ["1.bn2", "2.bn2"]
    before = copy.deepcopy(model[2].bn1.state_dict())
    assert zero_dead_channels(model, masks, SHAPE) == {"1.bn2": 2, "2.bn2": 2}
    assert all(value.equal(before[name]) for name, value in model[2].bn1.state_dict().items())
    train(model)
    assert model[2].bn1.weight.all() and model[2].bn1.bias.all()


def test_a_sum_computed_in_place_counts_as_a_sum(prepare):
    assert list(dead_channels(*prepare(residual(AddedInPlace)), SHAPE)) == []


def test_dead_channels_are_those_that_a_sparse_convolution_outputs_as_zero():
    model = chain()
    masks = masks_of(model)
    sparsify(model, masks)
    given = model[0](torch.rand(SHAPE))
    assert_equal((given == 0).all(3).all(2).all(0), dead_channels(model, masks, SHAPE)["1"])


def test_without_dead_filters_no_channel_is_dead(prepare):
    model, masks = prepare(chain(), dead=[])
    before = copy.deepcopy(model.state_dict())
    assert zero_dead_channels(model, masks, SHAPE) == {"1": 0}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_bias_before_the_norm_keeps_no_channel_alive(prepare):
    """As in torchvision's vgg16_bn: the filter outputs its bias, which BatchNorm makes a constant."""
    model = chain(bias=True)
    with torch.no_grad():
        model[0].bias.fill_(0.1)[DEAD[0]] = 0
    model, masks = prepare(model)
    assert_equal(dead_channels(model, masks, SHAPE)["1"], dead_vector())
    zero_dead_channels(model, masks, SHAPE)
    train(model)
    assert model[0].bias[DEAD[1]] != 0
    for mode in (True, False):
        hidden = model.train(mode)[:2](torch.randn(SHAPE))
        assert not hidden[:, DEAD].any()
    images = torch.randn(SHAPE)
    small = shrink(model, masks, SHAPE)
    assert small.widths["0"] == (8, 8 - len(DEAD)) and not small.retained
    assert_close(small.model(images), sparsify(model, masks)(images))


def test_densify_has_all_channels_trained_again():
    model = chain()
    masks = masks_of(model)
    sparsify(model, masks)
    zero_dead_channels(model, masks, SHAPE)
    densify(model)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.fill_(1)
    train(model)
    for parameter in model[1].parameters():
        assert parameter.all()
    assert model[0].weight[DEAD].any()


def test_a_norm_that_runs_twice_needs_dead_channels_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.bn = convolution(3), convolution(3), nn.Conv2d(3, 8, 1), norm()

        def forward(self, x):
            return self.bn(self.a(x)) + self.bn(self.b(x)) + (self.bn(self.c(x)) if x.shape[0] == 1 else 0)

    model = Shared()
    masks = masks_of(model, dead=[1, 4, 6])
    masks["a"][1, 0, 0, 0] = masks["b"][6, 0, 0, 0] = True
    assert dead_channels(model, masks, SHAPE)["bn"].nonzero().flatten().tolist() == [4]
    assert dead_channels(model, masks, (1, 3, 6, 6)) == {}


def test_synchronised_norms_count_too():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(chain())
    assert zero_dead_channels(model, masks_of(model), SHAPE) == {"1": 2}


def test_a_convolution_whose_output_a_hook_changes_has_no_dead_channels():
    model = chain()
    masks = masks_of(model)
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    assert zero_dead_channels(model, masks, SHAPE) == {}


def test_norms_without_gamma_and_beta_do_not_count():
    model = nn.Sequential(convolution(3), nn.BatchNorm2d(8, affine=False))
    assert zero_dead_channels(model, masks_of(model), SHAPE) == {}


@pytest.mark.parametrize("make", [chain, lambda: residual(PostActivation), lambda: residual(PreActivation)])
def test_training_keeps_zeroed_channels_at_exactly_zero(prepare, make):
    model, masks = prepare(make())
    channels = dead_channels(model, masks, SHAPE)
    zero_dead_channels(model, masks, SHAPE)
    statistics = {name: model.get_submodule(name).running_var.clone() for name in channels}
    sparsify(model, masks)
    train(model)
    for name, dead in channels.items():
        layer = model.get_submodule(name)
        assert not layer.weight[dead].any() and not layer.bias[dead].any()
        assert layer.weight[~dead].all() and layer.bias[~dead].all()
        assert not layer.running_var.equal(statistics[name])


@pytest.mark.parametrize("wrapped_first", [False, True])
def test_zeroed_channels_stay_at_zero_under_ddp(tmp_path, wrapped_first):
    model = residual(PostActivation)
    masks = masks_of(model)
    sparsify(model, masks)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model) if wrapped_first else None
        zero_dead_channels(model, masks, SHAPE)
        train(wrapped or DistributedDataParallel(model))
        del wrapped  # freed after its group it would wait, with the GIL held, for threads that may want the GIL
    finally:
        dist.destroy_process_group()
    for layer in (model[1].bn2, model[2].bn2):
        assert_equal(layer.weight == 0, dead_vector())
        assert_equal(layer.bias == 0, dead_vector())


def test_without_zeroing_training_changes_the_beta_of_a_dead_channel():
    model = residual(PostActivation)
    sparsify(model, masks_of(model))
    nn.init.zeros_(model[1].bn2.bias)
    train(model)
    assert model[1].bn2.bias[DEAD].all()


def test_earlier_momentum_does_not_change_zeroed_channels():
    model = residual(PostActivation)
    masks = masks_of(model)
    sparsify(model, masks)
    optimizers = train(model, steps=2)
    zero_dead_channels(model, masks, SHAPE)
    for optimizer in optimizers:
        optimizer.step()
    for name, dead in dead_channels(model, masks, SHAPE).items():
        layer = model.get_submodule(name)
        assert not layer.weight[dead].any() and not layer.bias[dead].any()


def test_a_zeroed_channel_outputs_zero_and_the_others_do_not_change(prepare):
    model, masks = prepare(chain())
    sparsify(model, masks)
    images = torch.rand(SHAPE)
    for training in (True, False):
        reference = copy.deepcopy(model)
        zero_dead_channels(model, masks, SHAPE)
        model.train(training), reference.train(training)
        given, expected = model[:2](images), reference[:2](images)
        assert not given[:, DEAD].any()
        assert_close(given[:, ~dead_vector()], expected[:, ~dead_vector()])


def test_running_statistics_do_not_change(prepare):
    model, masks = prepare(chain())
    before = copy.deepcopy(model[1].state_dict())
    zero_dead_channels(model, masks, SHAPE)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_equal(model[1].state_dict()[name], before[name])


def test_zeroing_twice_has_the_effect_of_zeroing_once(prepare):
    model, masks = prepare(chain())
    assert zero_dead_channels(model, masks, SHAPE) == zero_dead_channels(model, masks, SHAPE) == {"1": 2}
    assert len(model[1].bias._backward_hooks) == 1


def test_channels_that_are_no_longer_dead_are_trained_again():
    model = residual(PostActivation)
    masks = masks_of(model)
    sparsify(model, masks)
    zero_dead_channels(model, masks, SHAPE)
    masks = masks_of(model, dead=DEAD[:1])
    sparsify(model, masks)
    assert zero_dead_channels(model, masks, SHAPE)["1.bn2"] == 1
    train(model)
    assert (model[1].bn2.bias == 0).nonzero().flatten().tolist() == DEAD[:1]
    assert zero_dead_channels(model, masks_of(model, dead=[]), SHAPE)["1.bn2"] == 0
    with torch.no_grad():
        model[1].bn2.bias.fill_(1)
    torch.optim.SGD(model.parameters(), lr=0).step()
    assert_equal(model[1].bn2.bias, torch.ones(8))


def test_parameters_without_gradients_are_zeroed_too():
    model = chain()
    model[1].requires_grad_(False)
    zero_dead_channels(model, masks_of(model), SHAPE)
    assert_equal(model[1].weight == 0, dead_vector())


def test_masks_of_linear_layers_are_ignored():
    model = chain()
    masks = masks_of(model) | {"3.2": torch.zeros(5, 8, dtype=torch.bool)}
    assert list(dead_channels(model, masks, SHAPE)) == ["1"]


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ({"00": torch.ones(8, 3, 3, 3, dtype=torch.bool)}, ValueError, "model has no module '00'"),
        (
            {"0": torch.ones(8, 3, 1, 1, dtype=torch.bool)},
            ValueError,
            r"module '0': mask has shape \(8, 3, 1, 1\), weight",
        ),
        ({"0": torch.ones(8, 3, 3, 3)}, TypeError, "mask must be a bool tensor"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks, error, message):
    model = chain()
    with pytest.raises(error, match=message):
        zero_dead_channels(model, masks, SHAPE)
    assert model[1].bias.all()
