"""Masked layers under PyTorch's tools (fx, TorchScript, prune, inference mode, quantization): right, or refused."""

import copy

import pytest
import torch
from helpers.tolerances import assert_close
from torch import fx, nn
from torch.ao import quantization
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode

from sparse_adv import ops
from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, MaskedLinear, count_macs, densify, sparsify


def dense_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 5))


@pytest.fixture
def model() -> nn.Module:
    model = dense_network()
    return sparsify(model, prune(model, 0.4, linear=True))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def test_symbolic_tracing_keeps_layers_as_nodes_that_follow_their_masks(model, x):
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]
    assert torch.equal(graph(x), model(x))
    for layer in (model[0], model[4]):
        layer.set_mask(~layer.weight_mask)
    assert torch.equal(graph(x), model(x))
    graph(x).sum().backward()
    assert not model[0].weight.grad[~model[0].weight_mask].any()


def test_torchscript(model, x):
    assert_close(torch.jit.trace(model, x)(x), model(x))
    with pytest.raises(TypeError, match=r"jit.script cannot compile masked layers: script `densify\(copy.deepcopy"):
        torch.jit.script(model)
    assert type(model[0]) is MaskedConv2d and type(model[4]) is MaskedLinear
    assert_close(torch.jit.script(densify(copy.deepcopy(model)))(x), model(x))


@pytest.mark.parametrize("index", [0, 4])
def test_pruning_a_masked_layer_by_torch_is_refused_and_changes_nothing(model, x, index):
    expected, keys = model(x), list(model.state_dict())
    with pytest.raises(
        TypeError, match=r"prune and spectral_norm cannot change a masked layer: give it another mask by set_mask"
    ):
        torch_prune.random_unstructured(model[index], "weight", 0.5)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys


def test_a_mask_set_in_inference_mode_can_be_trained_afterwards(x):
    model = dense_network()
    with torch.inference_mode():
        sparsify(model, prune(model, 0.4, linear=True))
        model(x)
        for layer in (model[2], model[4]):
            layer.set_mask(torch.rand(layer.weight.shape) < 0.5)
        model[0].weight_mask[:, 0] = False
        expected = model(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    y = model(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    optimizer.step()
    for layer in (model[0], model[2], model[4]):
        assert not layer.weight[~layer.weight_mask].any() and layer.weight[layer.weight_mask].any()


def test_a_model_that_is_made_in_inference_mode_runs_there_and_outside(x):
    with torch.inference_mode():
        model = dense_network()
        sparsify(model, prune(model, 0.4, linear=True))
        expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("index", [2, 4])
@pytest.mark.parametrize("name", ["weight", "weight.grad"])
def test_what_was_made_in_inference_mode_takes_a_mask_there_and_is_refused_outside_before_any_change(index, name):
    model = dense_network()
    masks = {key: torch.rand(model.get_submodule(key).weight.shape) < 0.5 for key in ("0", "2", "4")}
    with torch.inference_mode():
        new = torch.rand_like(model[index].weight)
    if name == "weight":
        model[index].weight = torch.nn.Parameter(new, requires_grad=False)
    else:
        model[index].weight.grad = new
    before = copy.deepcopy(model.state_dict())
    sentence = f"{name} is an inference tensor, which takes a mask inside of torch.inference_mode only"
    with pytest.raises(ValueError, match=f"module '{index}': {sentence}"):
        sparsify(model, masks)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.inference_mode():
        sparsify(model, masks)
        assert torch.equal(model[index].weight, before[f"{index}.weight"] * masks[str(index)])
    with pytest.raises(ValueError, match=sentence):
        model[index].set_mask(~masks[str(index)])


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: model.cpu(),
        lambda model: model.share_memory(),
        lambda model: densify(model),
        lambda model: [copy.copy(layer) for layer in (model[0], model[4])],
        lambda model: sparsify(model, {name: model.get_submodule(name).weight_mask for name in ("0", "2", "4")}),
    ],
)
def test_what_leaves_weights_and_masks_alone_does_not_disturb_a_backward_pass(model, x, touch):
    loss = model(x).square().sum()
    touch(model)
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_that_is_loaded_in_inference_mode_takes_effect(model, x, compiled):
    """Tensors made there count no writes, by which a changed mask is noticed otherwise."""
    expected, state = model(x), model.state_dict()
    with torch.inference_mode():
        loaded = dense_network()
        sparsify(loaded, prune(loaded, 0.2, linear=True))
        run = torch.compile(loaded, backend="aot_eager") if compiled else loaded
        run(x)
        loaded.load_state_dict(state)
        assert_close(run(x), expected)
        loaded[0].weight_mask.zero_()
        if compiled:
            with pytest.raises(RuntimeError, match="weight_mask was written in place"):
                run(x)
        else:
            assert_close(loaded[0](x), loaded[0].bias[None, :, None, None].expand(2, 4, 4, 4))


@pytest.mark.parametrize("backward", [False, True])
def test_pytorch_counts_the_operations_of_kept_weights(model, x, backward):
    convolutions = nn.Sequential(*list(model)[:3])
    work = count_macs(convolutions, x.shape)
    with FlopCounterMode(display=False) as counter:
        y = convolutions(x.requires_grad_(backward))
        if backward:
            y.sum().backward()
    assert 0 < work.kept < work.dense
    assert counter.get_total_flops() == (6 if backward else 2) * work.kept


def test_pytorch_counts_the_operations_of_the_passes_into_given_memory():
    weight, x, grad = torch.rand(6, 4, 3, 3), torch.rand(2, 4, 5, 5), torch.rand(2, 6, 5, 5)
    pattern = ops.compile_pattern(weight > 0.7)
    with FlopCounterMode(display=False) as counter:
        ops.masked_conv2d_out(x, weight, pattern, padding=1, out=torch.empty_like(grad))
        ops.masked_conv2d_grad_input_out(grad, weight, pattern, padding=1, out=torch.empty_like(x))
    assert counter.get_total_flops() == 2 * 2 * pattern.nonzeros * 2 * 25


@pytest.mark.parametrize(
    "quantize",
    [
        lambda model: quantization.quantize_dynamic(model, {nn.Linear}),
        lambda model: quantization.quantize_dynamic(model),
        lambda model: quantization.prepare(with_configuration(model.eval())),
    ],
)
def test_quantization_is_refused_and_changes_nothing(model, x, quantize):
    expected = model(x)
    with pytest.raises(TypeError, match=r"torch.ao.quantization cannot quantize masked layers: `densify` the model"):
        quantize(model)
    assert torch.equal(model(x), expected)
    quantization.quantize_dynamic(densify(model), {nn.Linear})(x)


def with_configuration(model: nn.Module) -> nn.Module:
    model.qconfig = quantization.get_default_qconfig()
    return model


@pytest.mark.parametrize("index", [0, 4])
def test_a_weight_of_torchao_is_refused_and_changes_nothing(model, x, index):
    """`quantize_` assigns such parameters; a subclass from a module of that name stands in for them."""
    expected, weight = model(x), model[index].weight
    kind = type("AffineQuantizedTensor", (torch.Tensor,), {"__module__": "torchao.dtypes.affine_quantized_tensor"})
    with pytest.raises(TypeError, match="torchao cannot quantize masked layers: `densify` the model first"):
        model[index].weight = nn.Parameter(weight.detach().as_subclass(kind))
    assert model[index].weight is weight and torch.equal(model(x), expected)
