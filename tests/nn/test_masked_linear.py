"""`MaskedLinear`: values, gradients, copying, loading, compiling and moving a layer, masks that change."""

import copy
import io
import pickle

import pytest
import torch
from helpers.masked_layers import is_zero_where_pruned
from helpers.tolerances import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune as torch_prune

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedLinear, densify, frozen_weights, sparsify


def masked_layer(share=0.4, **options) -> MaskedLinear:
    linear = nn.Linear(10, 6, **options)
    return MaskedLinear.from_dense(linear, prune(linear, share, linear=True)[""])


def network() -> nn.Module:
    dense = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4))
    return sparsify(dense, prune(dense, 0.4, linear=True))


@pytest.fixture
def x():
    return torch.rand(3, 10)


@pytest.mark.parametrize("bias", [True, False])
def test_a_masked_layer_computes_what_a_dense_one_with_zeros_does(bias):
    linear = nn.Linear(10, 6, bias)
    layer = MaskedLinear.from_dense(copy.deepcopy(linear), prune(linear, 0.4, linear=True)[""])
    with torch.no_grad():
        linear.weight.masked_fill_(~layer.weight_mask, 0)
    for x in (torch.rand(3, 10), torch.rand(10), torch.rand(2, 3, 10), torch.rand(0, 10)):
        assert torch.equal(layer(x), linear(x))


def test_the_constructor_is_that_of_linear():
    mask = torch.rand(6, 10) < 0.5
    layer = MaskedLinear(10, 6, False, None, torch.float64, mask=mask)
    assert layer.weight.dtype == torch.float64 and layer.bias is None
    assert torch.equal(layer.weight != 0, mask)
    assert MaskedLinear(10, 6).weight_mask.all()
    with pytest.raises(ValueError, match=r"mask has shape \(6, 6\), weight has shape \(6, 10\)"):
        MaskedLinear(10, 6, mask=torch.ones(6, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .* got torch.float32"):
        MaskedLinear(10, 6, mask=torch.ones(6, 10))


def test_from_dense_keeps_parameters_mode_and_hooks(x):
    linear = nn.Linear(10, 6).eval()
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    weight, bias = linear.weight, linear.bias
    layer = MaskedLinear.from_dense(linear, prune(linear, 0.5, linear=True)[""])
    assert layer.weight is weight and layer.bias is bias and not layer.training
    layer(x)
    handle.remove()
    layer(x)
    assert calls == [1]
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask"]


def test_a_later_change_of_the_callers_mask_has_no_effect():
    linear = nn.Linear(10, 6)
    mask = prune(linear, 0.5, linear=True)[""]
    layer = MaskedLinear.from_dense(linear, mask)
    mask.fill_(True)
    assert layer.density == 0.5


def test_pruned_weights_get_gradient_0_even_where_the_dense_gradient_is_not_finite(x):
    layer = masked_layer()
    mask = layer.weight_mask
    (layer(x) * torch.arange(6)).sum().backward()
    expected = (torch.arange(6.0)[:, None] * x.sum(0)).expand_as(layer.weight)
    assert_close(layer.weight.grad, expected * mask)
    layer.weight.grad = None
    layer(torch.full((1, 10), float("inf"))).sum().backward()
    assert layer.weight.grad[mask].isinf().all() and not layer.weight.grad[~mask].any()


def test_gradients_can_be_differentiated_again():
    layer = masked_layer(dtype=torch.float64)
    weight, x = layer.weight.detach().requires_grad_(), torch.rand(3, 10, dtype=torch.float64, requires_grad=True)

    def call(weight, x):
        return torch.func.functional_call(layer, {"weight": weight}, (x,)).square()

    assert torch.autograd.gradgradcheck(call, (weight, x))


def test_the_value_of_a_pruned_weight_has_no_effect(x):
    layer = masked_layer()
    expected = layer(x)
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.weight_mask, float("nan"))
    assert torch.equal(layer(x), expected)


def test_frozen_weights_get_no_gradient(x):
    model = network()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with frozen_weights(model):
        y = model(x)
        y.square().sum().backward()
        assert model[0].weight.grad is None and model[2].bias.grad is None
    assert torch.equal(x.grad, expected)
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_momentum_and_weights_stay_zero_under_training(x):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        if step == 2:
            model[0].set_mask(~model[0].weight_mask)
            with torch.no_grad():
                model[0].weight.add_(model[0].weight_mask * 0.1)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        for layer in (model[0], model[2]):
            for tensor in (layer.weight, layer.weight.grad, optimizer.state[layer.weight]["momentum_buffer"]):
                assert not tensor[~layer.weight_mask].any()


@pytest.mark.parametrize("from_dense", [True, False])
def test_the_state_of_a_given_optimiser_is_zeroed_at_once(x, from_dense):
    model = nn.Sequential(nn.Linear(10, 6)) if from_dense else network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).square().sum().backward()
    optimizer.step()
    mask = torch.rand(6, 10) < 0.5
    if from_dense:
        sparsify(model, {"0": mask}, optimizer=optimizer)
    else:
        model[0].set_mask(mask, optimizer=optimizer)
    assert not optimizer.state[model[0].weight]["momentum_buffer"][~mask].any()


def test_a_densified_layer_trains_dense_from_the_first_step_on(x):
    linear = densify(masked_layer())
    optimizer = torch.optim.SGD(linear.parameters(), 0.1)
    linear(x).square().sum().backward()
    optimizer.step()
    assert type(linear) is nn.Linear and linear.weight.grad.all() and linear.weight.all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_are_independent(copied, x):
    model = network()
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    twin[0].set_mask(torch.zeros_like(twin[0].weight_mask))
    assert model[0].density > 0


def test_a_state_dict_survives_torch_save_with_weights_only(x):
    model, other = network(), network()
    other[0].set_mask(~model[0].weight_mask)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), model(x))


def test_export(x):
    model = network()
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_fullgraph_compilation_with_gradients(x):
    model = network()
    twin = copy.deepcopy(model)
    model(x).square().sum().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert_close(twin[0].weight.grad, model[0].weight.grad)
    assert not twin[0].weight.grad[~model[0].weight_mask].any()


def test_sixteen_bit_and_autocast(x):
    model = network()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model.bfloat16()
    assert model[0].weight_mask.dtype == torch.bool
    assert (model(x.bfloat16()).float() - expected).abs().max() < expected.abs().max() / 10


def test_the_meta_device():
    layer = masked_layer().to("meta")
    assert layer(torch.rand(2, 10, device="meta")).shape == (2, 6)
    assert "MaskedLinear" in repr(layer)


def test_distributed_data_parallel_ignores_the_masks(x, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(network())
        assert {"0.weight_mask", "2.weight_mask"} <= wrapped.parameters_to_ignore
        wrapped(x).sum().backward()
        teacher = [network()]  # in a list, so that it is not a part of the module that calls it
        student = nn.Linear(10, 3)
        student.register_forward_hook(lambda module, inputs, output: output - teacher[0](inputs[0]).mean())
        wrapped = DistributedDataParallel(student)
        wrapped(x).sum().backward()
        del wrapped  # freed after its group it would wait, with the GIL held, for threads that may want the GIL
    finally:
        torch.distributed.destroy_process_group()


def test_a_mask_written_in_place_takes_effect_at_the_next_call(x):
    layer = masked_layer()
    with torch.no_grad():
        layer.weight_mask[3:] = False
    assert_close(layer(x)[:, 3:], layer.bias[3:].detach().expand(3, 3))
    assert not layer.weight[3:].any()


def test_set_mask_prunes_and_revives_and_new_weights_are_masked():
    layer = masked_layer(0.5)
    before = layer.weight.detach().clone()
    mask = torch.rand(6, 10) < 0.5
    layer.set_mask(mask)
    assert torch.equal(layer.weight, before * mask)
    with pytest.raises(ValueError, match="mask has shape"):
        layer.set_mask(mask[:3])
    assert torch.equal(layer.weight_mask, mask)
    layer.reset_parameters()
    assert is_zero_where_pruned(layer) and not torch.equal(layer.weight, before * mask)


def test_a_layer_with_its_own_forward_is_refused():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    mask = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match="Scaled computes its output in its own way"):
        MaskedLinear.from_dense(Scaled(2, 2), mask)
    with pytest.raises(TypeError, match="weight is computed from something else"):
        MaskedLinear.from_dense(torch_prune.identity(nn.Linear(2, 2), "weight"), mask)
    with pytest.raises(TypeError, match="MultiheadAttention reads this layer's weight"):
        MaskedLinear.from_dense(nn.MultiheadAttention(2, 1).out_proj, mask)
    with pytest.raises(TypeError, match="only a Linear can become a MaskedLinear, got Conv2d"):
        MaskedLinear.from_dense(nn.Conv2d(2, 2, 1), mask)


def test_the_representation_shows_the_density():
    assert repr(masked_layer(0.25)) == "MaskedLinear(in_features=10, out_features=6, bias=True, density=0.25)"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_steps_keep_pruned_complex_weights_at_zero(dtype):
    layer = masked_layer(dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.rand(3, 10, dtype=dtype)).abs().sum().backward()
    layer.weight.data += 1  # counts in no version, so that only the hook after the step zeroes it
    optimizer.step()
    assert is_zero_where_pruned(layer)
