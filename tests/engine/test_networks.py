"""The engine on whole networks: its gradients are those of autograd, and convolutions are fused with what follows."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import NETWORKS, network
from torch import nn

from sparse_adv import engine, masks, models
from sparse_adv.nn import MaskedConv2d, sparsify
from sparse_adv.ops import PASSES

BLOCKS = {"dense": None, "(1, 1)": (1, 1), "(4, 4)": (4, 4)}


def relative_error(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def example(name, block):
    model, shape = network(name)
    if block is not None:
        sparsify(model, masks.prune(model, density=0.3, block=block))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(5, *shape[1:], generator=generator)
    y = torch.randint(0, 10, (5,), generator=generator)
    return model, x, lambda logits: F.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_gradients_in_float64_are_exact(name, block):
    model, x, loss = example(name, block)
    model, x = model.double(), x.double()
    program = engine.Program(model, x)
    program.fold()
    autograd = engine.Autograd(model)
    assert relative_error(program.logits(x), autograd.logits(x)) < 1e-12
    for rows in (5, 3):  # 3 are padded
        loss_of_rows = lambda logits, rows=rows: loss(torch.cat([logits, logits.new_zeros(5 - rows, 10)]))  # noqa: E731
        actual, expected = (gradients.gradient(x[:rows], loss_of_rows) for gradients in (program, autograd))
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_gradients_in_float32_differ_by_rounding(name, block):
    model, x, loss = example(name, block)
    program = engine.Program(model, x)
    program.fold()
    expected = engine.Autograd(model.double()).gradient(x.double(), loss)
    assert relative_error(program.gradient(x, loss), expected) < 1e-4


def test_blocks_give_the_gradients_of_autograd(device):
    """On a GPU in Triton kernels, which leave a bit for each output of a ReLU."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, 2, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1), nn.Flatten(), nn.Linear(192, 10)).eval()
    twin = copy.deepcopy(model).double()
    for name, mask in (chosen := masks.prune(model, 0.5, block=(32, 32), scope="uniform", linear=False)).items():
        twin.get_submodule(name).weight.data.masked_fill_(~mask, 0)
    sparsify(model, chosen).to(device)
    for layer in model.modules():  # now: another device forgets the choices
        if isinstance(layer, MaskedConv2d):
            layer.choose_kernels({name: {"kernel": "sparse"} for name in PASSES})
    x, weights = torch.rand(4, 3, 14, 11), torch.randn(10)
    expected = engine.Autograd(twin).gradient(x.double(), lambda logits: logits @ weights.double())
    weights = weights.to(device)
    with engine.input_gradients(model, x.to(device)) as gradients:
        actual = gradients.gradient(x.to(device), lambda logits: logits @ weights)
    assert isinstance(gradients, engine.Program)
    assert sum("[sparse]" in line for line in engine.explain(model, x.to(device))) == 3
    assert relative_error(actual.cpu(), expected) < (1e-2 if device.type == "cuda" else 1e-4)  # TF32 on a GPU


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_of_the_librarys_networks_is_left_to_autograd(name):
    model, x, _ = example(name, (4, 4))
    left = [line for line in engine.explain(model, x) if "autograd" in line]
    assert all("pool" in line or "normalize" in line or "features" in line for line in left)


def test_a_shape_explains_as_much_as_images():
    model, x, _ = example("resnet18", (4, 4))
    assert engine.explain(model, x.shape) == engine.explain(model, x)
    with pytest.raises(ValueError, match=r"example_input must be a tensor or 4 positive integers .*, got \(3, 32\)"):
        engine.explain(model, (3, 32))


@pytest.mark.usefixtures("data_parallel_without_devices")
@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_of_a_wrapper_the_module_inside_is_explained_as_attacks_call_it(wrapper):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval(), torch.rand(2, 3, 6, 6)
    assert engine.explain(wrapper(model).eval(), x) == engine.explain(model, x)
    assert "_0: convolution + ReLU [dense]" in engine.explain(model, x)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_kuangliu"])
def test_even_areas_of_images_leave_no_network_to_autograd(name):
    # The largest pixels of a pooling window are equal there, and rounding decides which of them gets the gradient.
    model, x = models.build(name, width=4).eval(), torch.rand(2, 3, 32, 32)
    x[..., :16] = 0
    assert any(line.endswith("convolution + BatchNorm + ReLU [dense]") for line in engine.explain(model, x))
    assert "features_1: BatchNorm + ReLU" in engine.explain(model.train(), x)


def test_weights_are_read_again_in_each_context():
    model, x, loss = example("resnet18", (4, 4))
    for _ in range(2):
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            error = relative_error(gradients.gradient(x, loss), engine.Autograd(model).gradient(x, loss))
        assert error < 1e-3
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_stay_when_the_memory_is_used_again(memory_format):
    model, x, loss = example("resnet18", (4, 4))
    x = x.contiguous(memory_format=memory_format)
    with engine.input_gradients(model, x) as program:
        assert isinstance(program, engine.Program)
        results = program.logits(x), program.gradient(x, loss)
        copies = [result.clone() for result in results]
        program.gradient(0.5 * x, loss)
        program.logits(0.5 * x)
    assert all(result.equal(copy) for result, copy in zip(results, copies, strict=True))
    assert results[1].shape == x.shape and results[1].stride() == x.stride()


def test_every_step_reads_its_weights_again():
    """A masked and a dense convolution with BatchNorm, a BatchNorm of its own, and masked and dense linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)),
        *(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5)),
    )
    model = sparsify(model.double(), {"1": torch.rand(8, 3, 3, 3) < 0.5, "7": torch.rand(16, 64) < 0.5}).eval()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    for tensor in [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]:
        with torch.no_grad():
            tensor.add_(0.1 * torch.rand(tensor.shape)).mul_(1.1)
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            assert relative_error(gradients.logits(x), engine.Autograd(model).logits(x)) < 1e-9


def test_steps_of_this_librarys_kernels_allocate_nothing():
    model, x, loss = example("resnet18", (4, 4))
    for layer in model.modules():
        if isinstance(layer, MaskedConv2d):
            layer.choose_kernels({name: {"kernel": "sparse"} for name in PASSES})
    with engine.input_gradients(model, x) as program:
        program.gradient(x, loss)
        with torch.profiler.profile(profile_memory=True) as profile:
            program.gradient(x, loss)
    ours = [event for event in profile.key_averages() if event.key.startswith("sparse_adv::")]
    assert {event.key.removeprefix("sparse_adv::") for event in ours} >= {
        "masked_conv2d_out",
        "masked_conv2d_grad_input_out",
    }
    assert all(event.cpu_memory_usage == 0 for event in ours)


def test_the_memory_for_the_pass_back_is_a_bit_for_each_output_of_a_relu():
    model = models.build("preact_resnet18", width=64)
    sparsify(model, masks.prune(model, density=0.1, block=(4, 4)))
    program = engine.Program(model.eval(), torch.rand(2, 3, 32, 32))
    gates = program._memory.gates
    results = {value for step in program.steps for value in step.outputs}
    kept = {value for value in results if value.kept or (value.rectified and value not in gates)}
    values = sum(math.prod(value.shape) * value.dtype.itemsize for value in kept)
    assert (values + sum(gate.nbytes for gate in gates.values())) / 2 < 0.3 * 2**20


def test_two_threads_may_attack_one_model():
    model, x, loss = example("digits_cnn", None)
    expected = engine.Autograd(model).gradient(x, loss)
    with engine.input_gradients(model, x) as first, engine.input_gradients(model, x) as second:
        assert isinstance(first, engine.Program) and isinstance(second, engine.Autograd)
        for gradients in (first, second):
            assert relative_error(gradients.gradient(x, loss), expected) < 1e-4


def hook_with_model(model):
    def hook(module, args, output, of=model):
        return None

    model.conv1.register_forward_hook(hook)


def child_with_parent(model):
    model.conv1.parent = [model]


@pytest.mark.parametrize("refer", [lambda model: None, hook_with_model, child_with_parent])
def test_a_model_is_freed_although_its_steps_are_kept(refer):
    import gc
    import weakref

    model, x, loss = example("resnet18", (1, 1))
    refer(model)
    with engine.input_gradients(model, x) as gradients:
        assert isinstance(gradients, engine.Program)
        gradients.gradient(x, loss)
    reference = weakref.ref(model)
    del model, gradients
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize(
    "held",
    [
        lambda f: f,
        lambda f: (f, 0.0),
        lambda f: [0.0, [f]],
        lambda f: {"of": {"this": f}},
        lambda f: [*[0.0] * 500, f],
        lambda f: [{"a": [{"b": [f]}]}],
    ],
)
def test_a_changed_attribute_of_a_module_is_noticed(held):
    def found(value):
        return (
            value if isinstance(value, float) else max(map(found, value.values() if isinstance(value, dict) else value))
        )

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.factor = nn.Conv2d(3, 4, 3), held(1.0)

        def forward(self, x):
            return self.conv(x).relu().mean((2, 3)) * found(self.factor)

    model, x = Scaled().eval(), torch.rand(2, 3, 8, 8)
    for factor in (1.0, 3.0):
        if isinstance(model.factor, list):
            model.factor[:] = held(factor)
        else:
            model.factor = held(factor)
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            torch.testing.assert_close(gradients.logits(x), model(x).detach())
        fused = engine.fuse_for_training(model, x)
        torch.testing.assert_close(fused(x), model(x))


def test_a_changed_function_of_a_module_is_noticed():
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.activation = nn.Conv2d(3, 4, 3), F.relu

        def forward(self, x):
            return self.activation(self.conv(x)).mean((2, 3))

    model, x = Activated().eval(), torch.rand(2, 3, 8, 8)
    for activation in (F.relu, torch.tanh, F.softplus):
        model.activation = activation
        with engine.input_gradients(model, x) as gradients:
            torch.testing.assert_close(gradients.logits(x), model(x).detach())


def test_steps_are_those_of_the_present_autocast_and_dtype():
    """On a CPU the engine leaves a model under autocast to autograd; what was made before or after does not count."""
    model, x, _ = example("digits_cnn", None)
    for autocast, kind in ((False, engine.Program), (True, engine.Autograd), (False, engine.Program)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), engine.input_gradients(model, x) as gradients:
            assert type(gradients) is kind
            assert gradients.logits(x).dtype == (torch.bfloat16 if autocast else torch.float32)
    with engine.input_gradients(model.double(), x.double()) as gradients:
        assert type(gradients) is engine.Program and gradients.logits(x.double()).dtype == torch.float64


def test_a_reason_is_logged_once(caplog):
    class Branches(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    model, x = Branches().eval(), torch.rand(2, 3, 8, 8)
    with caplog.at_level(logging.INFO, "sparse_adv.engine"):
        for _ in range(2):
            with engine.input_gradients(model, x) as gradients:
                assert isinstance(gradients, engine.Autograd)
    assert len(caplog.records) == 1 and "leaves this Branches to autograd" in caplog.text


def test_a_model_with_masks_that_is_left_to_autograd_is_told_in_one_warning(caplog):
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = Branches(nn.Conv2d(3, 4, 3), nn.Flatten())
    sparsify(model, masks.prune(model, 0.5))
    for module in (model.train(), model.eval(), Branches(nn.Flatten()).eval()):
        for size in (2, 40):
            engine.explain(module, torch.rand(size, 3, 8, 8))
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and "leaves this Branches to autograd: " in told[0] and "training mode" not in told[0]


def test_a_changed_tensor_of_a_module_is_read_again():
    """One that is neither a parameter nor a buffer, assigned anew and written in place."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), torch.tensor(1.0)

        def forward(self, x):
            return (self.conv(x).relu() * self.scale).mean((2, 3))

    model, x = Scaled().eval(), torch.rand(2, 3, 8, 8)
    for change in (lambda: None, lambda: setattr(model, "scale", torch.tensor(3.0)), lambda: model.scale.mul_(2)):
        change()
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            torch.testing.assert_close(gradients.logits(x), model(x).detach())


def test_a_mask_that_is_written_in_place_is_read_again():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    dense, x, loss = copy.deepcopy(model), torch.rand(2, 3, 8, 8), lambda logits: logits[:, 0]
    layer = sparsify(model, {"0": torch.rand(8, 3, 3, 3) < 0.5})[0]
    layer.choose_kernels({name: {"kernel": "sparse"} for name in PASSES})
    for _ in range(2):
        with engine.input_gradients(model, x) as gradients:
            assert isinstance(gradients, engine.Program)
            actual = gradients.gradient(x, loss)
        dense[0].weight.data = (layer.weight * layer.weight_mask).detach()
        assert relative_error(actual, engine.Autograd(dense).gradient(x, loss)) < 1e-3
        layer.weight_mask.copy_(layer.weight_mask.flip(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sums_of_several_branches(dtype):
    """The gradient of such a sum goes to its branches uncopied: its memory must not be used again meanwhile."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
                for _ in range(4)
            )

        def forward(self, x):
            first, second, third, fourth = (branch(x) for branch in self.branches)
            return first + second + third + fourth

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Branches(), Branches(), nn.Flatten(), nn.Linear(576, 5))
    sparsify(model, masks.prune(model, density=0.5, block=(1, 1), exclude=("0",)))
    for layer in model.modules():
        if isinstance(layer, MaskedConv2d):  # kernels that write into the planned memory
            layer.choose_kernels({name: {"kernel": "sparse"} for name in PASSES})
    model, x = model.eval().to(dtype), torch.rand(2, 3, 8, 8, dtype=dtype)
    program = engine.Program(model, x)
    program.fold()
    actual, expected = (each.gradient(x, lambda logits: logits[:, 0]) for each in (program, engine.Autograd(model)))
    assert relative_error(actual, expected) < (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("kernels", ["chosen", "dense grad_input"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_pruned_weights_written_by_hand_count_nowhere(channels_last, kernels):
    """A layer of one channel, whose layout is ambiguous, beside layers whose dense kernels decide the layout."""
    dense = [nn.Conv2d(8, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), *(dense if channels_last else []))
    model.extend([nn.Conv2d(64 if channels_last else 8, 1, 3, padding=1), nn.Flatten(), nn.Linear(64, 10)]).eval()
    for layer in (model[0], model[-3]):
        mask = torch.rand(layer.weight.shape) < 0.3
        model[0 if layer is model[0] else len(model) - 3] = MaskedConv2d.from_dense(layer, mask, (1, 1))
    if kernels != "chosen":  # as tuning may find them
        for layer in (model[0], model[-3]):
            layer.choose_kernels({name: {"kernel": "dense" if name == "grad_input" else "sparse"} for name in PASSES})
    x, loss = torch.rand(16, 1, 8, 8), lambda logits: logits.square().sum(1)
    expected = engine.Autograd(model).gradient(x, loss)
    for layer in (model[0], model[-3]):
        layer.weight.data[~layer.weight_mask] = 1e3
    program = engine.Program(model, x)
    program.fold()
    assert relative_error(program.gradient(x, loss), expected) < 1e-4
