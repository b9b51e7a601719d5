"""`MaskedConv2d`: values, copying, loading, compiling and moving a layer, masks that change."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.masked_layers import is_zero_where_pruned
from helpers.tolerances import assert_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, count_macs, frozen_weights, sparsify
from sparse_adv.ops.masked_conv2d_mask import check_block


def masked_layer(share=0.4, block=(1, 1), **options) -> MaskedConv2d:
    conv = nn.Conv2d(8, 12, 3, padding=1, **options)
    return MaskedConv2d.from_dense(conv, prune(conv, share, block)[""], block)


def network() -> nn.Module:
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
    return sparsify(dense, prune(dense, 0.4))


@pytest.fixture
def x():
    return torch.rand(2, 3, 9, 9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("size", "padding", "stride", "dilation", "groups"),
    [
        (3, 1, 1, 1, 1),
        (3, "same", 1, 2, 1),
        ((2, 3), "same", 1, 1, 2),
        ((4, 1), "valid", 2, 1, 1),
        (3, (2, 1), 2, 1, 4),
    ],
)
def test_a_masked_layer_computes_what_a_dense_one_with_zeros_does(
    size, padding, stride, dilation, groups, padding_mode, bias
):
    conv = nn.Conv2d(8, 12, size, stride, padding, dilation, groups, bias, padding_mode)
    layer = MaskedConv2d.from_dense(copy.deepcopy(conv), prune(conv, 0.4)[""])
    with torch.no_grad():
        conv.weight.masked_fill_(~layer.weight_mask, 0)
    for x in (torch.rand(2, 8, 9, 11), torch.rand(8, 9, 11), torch.rand(0, 8, 9, 11)):
        assert_close(layer(x), conv(x))
    x = torch.rand(2, 8, 9, 11).to(memory_format=torch.channels_last)
    assert_close(layer(x), conv(x))
    if padding_mode != "circular":  # torch's circular padding itself returns NCHW
        assert layer(x).is_contiguous(memory_format=torch.channels_last)


def test_the_constructor_is_that_of_conv2d():
    mask = torch.rand(12, 4, 3, 3) < 0.5
    layer = MaskedConv2d(8, 12, 3, 2, "valid", 1, 2, False, "zeros", None, torch.float64, mask=mask)
    assert layer.weight.dtype == torch.float64 and layer.bias is None
    assert torch.equal(layer.weight != 0, mask)
    assert MaskedConv2d(8, 12, 3).weight_mask.all()
    with pytest.raises(ValueError, match=r"mask has shape \(1, 1, 1, 1\), weight has shape \(12, 8, 3, 3\)"):
        MaskedConv2d(8, 12, 3, mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("size", "pair"), [(0, (0, 0)), ((3, 0), (3, 0))])
def test_a_layer_without_a_filter_is_refused_by_the_name_of_its_size(size, pair):
    conv = nn.Conv2d(3, 8, size)
    mask = torch.ones_like(conv.weight, dtype=torch.bool)
    for make in (
        lambda: MaskedConv2d(3, 8, size),
        lambda: MaskedConv2d(3, 8, size, block=(1, 1)),
        lambda: MaskedConv2d.from_dense(conv, mask),
        lambda: sparsify(conv, {"": mask}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"kernel_size must be positive, got {pair}")):
            make()


@pytest.mark.parametrize("block", [(1, 1), (4, 4), (2, 1), (1, 1, 3, 3)])
def test_without_a_block_every_way_to_make_a_layer_finds_that_of_the_mask(block):
    conv = nn.Conv2d(8, 12, 3)
    mask = prune(conv, 0.4, block)[""]
    made = [MaskedConv2d(8, 12, 3, mask=mask), MaskedConv2d.from_dense(conv, mask)]
    made += [MaskedConv2d(8, 12, 3), MaskedConv2d(8, 12, 3, device="meta")]
    made[2].set_mask(mask)
    made[3].load_state_dict(made[0].state_dict(), assign=True)
    assert {layer.block for layer in made} == {check_block(block)}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_kept_and_everything_kept(share, x):
    layer = masked_layer(share, block=(4, 4))
    x = torch.rand(2, 8, 9, 9)
    assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert layer.density == share


def test_from_dense_keeps_parameters_mode_dtype_and_hooks():
    conv = nn.Conv2d(8, 12, 3).double().eval()
    calls = []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    weight, bias = conv.weight, conv.bias
    layer = MaskedConv2d.from_dense(conv, prune(conv, 0.5)[""])
    assert layer.weight is weight and layer.bias is bias and not layer.training
    layer(torch.rand(1, 8, 5, 5, dtype=torch.float64))
    handle.remove()
    layer(torch.rand(1, 8, 5, 5, dtype=torch.float64))
    assert calls == [1]
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]


def test_a_later_change_of_the_callers_mask_has_no_effect():
    conv = nn.Conv2d(8, 12, 3)
    mask = prune(conv, 0.5)[""]
    layer = MaskedConv2d.from_dense(conv, mask)
    mask.fill_(True)
    assert layer.density == 0.5


def test_pruned_weights_get_no_gradient(x):
    model = network()
    model(x).square().sum().backward()
    for layer in (model[0], model[3]):
        assert not layer.weight.grad[~layer.weight_mask].any()
        assert layer.weight.grad[layer.weight_mask].any()


def test_the_pattern_is_not_in_the_state_dict_and_the_mask_is():
    assert list(masked_layer().state_dict()) == ["weight", "bias", "weight_mask"]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_compute_the_same(copied, x):
    model = network()
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    twin[0].set_mask(torch.zeros_like(twin[0].weight_mask))
    assert model[0].density > 0
    assert len(pickle.dumps(masked_layer(1.0))) < len(pickle.dumps(nn.Conv2d(8, 12, 3))) + 3000


def test_a_state_dict_survives_torch_save_with_weights_only(x):
    model, other = network(), network()
    with torch.no_grad():
        other[0].weight.mul_(2)
    other[0].set_mask(~model[0].weight_mask)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("empty", [False, True])
def test_export(x, empty):
    model = network().eval()
    if empty:
        model[0].set_mask(torch.zeros_like(model[0].weight_mask))
    torch.export.save(torch.export.export(model, (x,)), file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), model(x))


def test_fullgraph_compilation_with_gradients(x):
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    assert_close(twin[0].weight.grad, model[0].weight.grad)
    assert_close(twin[3].bias.grad, model[3].bias.grad)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_compiled_layer_refuses_a_mask_that_was_written_until_it_is_set(x, gradients):
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(gradients):
        assert_close(compiled(x), model(x))
        with torch.no_grad():
            for m in (model, twin):
                m[3].weight_mask.logical_not_()
        with pytest.raises(RuntimeError, match=r"weight_mask was written in place.* call layer.set_mask\(layer.weight"):
            compiled(x)
        twin[3].set_mask(twin[3].weight_mask)
        assert_close(compiled(x), model(x))
        twin[3].weight_mask.copy_(twin[3].weight_mask.clone())
        assert_close(compiled(x), model(x))


def test_functional_call(x):
    model, other = network().eval(), network().eval()
    state = {key: value.clone() for key, value in other.state_dict().items()}
    assert not torch.equal(other(x), model(x))
    assert torch.equal(torch.func.functional_call(model, state, (x,)), other(x))


def test_sixteen_bit(x):
    model = network()
    expected = model(x)
    model.bfloat16()
    assert model[0].weight_mask.dtype == torch.bool
    assert (model(x.bfloat16()).float() - expected).abs().max() < expected.abs().max() / 10


def test_autocast(x):
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        y = model[0](x)
        with frozen_weights(model):
            assert torch.equal(model[0](x), y)
            assert model[0].frozen_operands[0].dtype == torch.bfloat16  # cast once, not in every pass
    assert y.dtype == torch.bfloat16


def test_a_model_moved_to_channels_last(x):
    model = network()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    assert_close(model(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("block", [(1, 1), (4, 4)])
def test_the_meta_device(block):
    layer = masked_layer(block=block).to("meta")
    assert layer(torch.rand(2, 8, 5, 5, device="meta")).shape == (2, 12, 5, 5)
    assert "MaskedConv2d" in repr(layer)
    with pytest.raises(ValueError, match="a mask of it is on the meta device"), frozen_weights(layer):
        count_macs(layer, torch.rand(2, 8, 5, 5, device="meta"))


def test_a_state_that_is_read_is_zeroed(x):
    """Averaging writes the weights with no call of the layer."""
    model = network()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    mask = ~model[0].weight_mask
    model[0].set_mask(mask)
    averaged.update_parameters(model)
    state = averaged.state_dict()
    assert torch.equal(state["module.0.weight_mask"], mask)
    assert not state["module.0.weight"][~mask].any()


def test_reading_the_state_does_not_disturb_a_backward_pass(x):
    model = network()
    loss = model(x).sum()
    model.state_dict()
    loss.backward()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    assert not model.state_dict()["0.weight"][~model[0].weight_mask].any()


@pytest.mark.parametrize("assign", [False, True])
def test_conversion_and_loading_that_swap_tensors(x, assign):
    model, other = network(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        optimizer.zero_grad()
        model.load_state_dict(other.double().state_dict(), assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_close(model(x.double()), other(x.double()))
    (model(x.double()).sum() + (model[0].weight - 1).square().sum()).backward()
    optimizer.step()
    assert model[0].weight.dtype == torch.float64 and is_zero_where_pruned(model[0])


def test_distributed_data_parallel_ignores_the_masks(x, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        wrapped = DistributedDataParallel(model)
        assert {"0.weight_mask", "3.weight_mask"} <= wrapped.parameters_to_ignore
        wrapped(x).sum().backward()
        assert model[0].weight.grad is not None
        del wrapped  # freed after its group it would wait, with the GIL held, for threads that may want the GIL
    finally:
        torch.distributed.destroy_process_group()


def test_loading_keeps_the_block_that_the_mask_obeys_or_finds_another():
    layer = masked_layer(block=(4, 4))
    layer.load_state_dict(masked_layer(0.2, block=(4, 4)).state_dict())
    assert layer.block == (4, 4, 1, 1)
    layer.load_state_dict(masked_layer(0.2, block=(2, 2)).state_dict())
    assert layer.block == (2, 2, 1, 1)


def test_a_mask_of_another_shape_is_reported_as_torch_does():
    layer = masked_layer()
    with pytest.raises(RuntimeError, match="size mismatch for weight_mask"):
        layer.load_state_dict(layer.state_dict() | {"weight_mask": torch.ones(1)})


def test_a_mask_written_in_place_takes_effect_at_the_next_call():
    layer, x = masked_layer(), torch.rand(2, 8, 5, 5)
    with torch.no_grad():
        layer.weight_mask[3:] = False
        y = layer(x)
    assert_close(y[:, 3:], layer.bias[None, 3:, None, None].detach().expand(2, 9, 5, 5))
    assert not layer.weight[3:].any()


def test_a_mask_that_is_written_but_not_changed_costs_no_compilation():
    layer, x = masked_layer(), torch.rand(2, 8, 5, 5)
    pattern = layer.pattern
    layer.weight_mask.copy_(layer.weight_mask.clone())
    layer(x)
    assert layer.pattern is pattern


def test_set_mask_prunes_and_revives():
    layer = masked_layer(0.5)
    before = layer.weight.detach().clone()
    mask = torch.rand(12, 8, 3, 3) < 0.5
    layer.set_mask(mask)
    assert torch.equal(layer.weight, before * mask)
    with pytest.raises(ValueError, match="does not obey block"):
        layer.set_mask(mask, block=(4, 4))
    with pytest.raises(ValueError, match="mask has shape"):
        layer.set_mask(mask[:3])
    assert torch.equal(layer.weight_mask, mask)


def test_reset_parameters_masks_the_new_weights():
    layer = masked_layer()
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    assert is_zero_where_pruned(layer)


def test_a_layer_with_its_own_forward_is_refused():
    class Standardized(nn.Conv2d):
        def forward(self, input):
            return super().forward(input - input.mean())

    mask = torch.ones(2, 2, 1, 1, dtype=torch.bool)
    with pytest.raises(TypeError, match="Standardized computes its output in its own way"):
        MaskedConv2d.from_dense(Standardized(2, 2, 1), mask)
    pruned = torch_prune.identity(nn.Conv2d(2, 2, 1), "weight")
    with pytest.raises(TypeError, match="weight is computed from something else"):
        MaskedConv2d.from_dense(pruned, mask)
    with pytest.raises(TypeError, match="only a Conv2d can become a MaskedConv2d, got Linear"):
        MaskedConv2d.from_dense(nn.Linear(2, 2), mask)


def test_the_representation_shows_density_and_block():
    layer = masked_layer(0.25, block=(4, 4))
    assert repr(layer).startswith("MaskedConv2d(8, 12, kernel_size=(3, 3)")
    assert "density=0.2407, block=(4, 4, 1, 1)" in repr(layer)
