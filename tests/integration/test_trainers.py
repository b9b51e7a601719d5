"""Masked networks in the loops of other libraries: pruned weights stay 0, and masks survive saving and loading.

`pip install -e ".[integration]"` brings the libraries; a test without its library is skipped.
"""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, MaskedLinear, densify, shrink, sparsify

X, Y = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 5


def loader():
    return DataLoader(TensorDataset(X, Y), 8)


def network(density=0.3):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(288, 5)
    )
    return sparsify(model, prune(model, density, linear=True))


def layers_of(model):
    return [layer for layer in model.modules() if isinstance(layer, (MaskedConv2d, MaskedLinear))]


def assert_sparse(model, density=0.3):
    layers = layers_of(model)
    assert layers
    kept = sum(int(layer.weight_mask.sum()) for layer in layers)
    assert kept == pytest.approx(density * sum(layer.weight_mask.numel() for layer in layers), abs=len(layers))
    assert not any(layer.weight[~layer.weight_mask].any() for layer in layers)
    assert all(layer.weight[layer.weight_mask].any() for layer in layers)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)


def test_accelerate_accumulates_saves_and_loads(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate, whose loop is tried, is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, batches = network(), None, loader()
    optimizer = sgd(model)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for number, (x, y) in enumerate(batches):
        if number == 2:
            accelerator.save_state(str(tmp_path))
            saved = {key: value.clone() for key, value in model.state_dict().items()}
            layers_of(model)[0].set_mask(layers_of(model)[0].weight_mask.roll(1, 0))
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    assert_sparse(model)
    assert not layers_of(model)[0].weight_mask.equal(saved["0.weight_mask"])
    accelerator.load_state(str(tmp_path))
    assert all(value.equal(saved[key]) for key, value in model.state_dict().items())
    train(model, optimizer)
    assert_sparse(model)


def test_lightning_trains_checkpoints_and_resumes(tmp_path):
    lightning = pytest.importorskip(
        "pytorch_lightning", reason="pytorch_lightning, whose loop is tried, is not installed"
    )

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2, weight_decay=1e-2)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    module = Module()
    trainer.fit(module, loader())
    assert_sparse(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = Module()
    for layer in layers_of(other):
        layer.set_mask(torch.rand(layer.weight.shape) < 0.9)
    again = lightning.Trainer(max_epochs=2, enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    again.fit(other, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert again.global_step == 8
    assert_sparse(other)
    assert all(a.weight_mask.equal(b.weight_mask) for a, b in zip(layers_of(module), layers_of(other), strict=True))


@pytest.mark.parametrize("arch", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "efficientnet_b0"])
def test_timm_networks_are_pruned_trained_averaged_and_made_dense(arch):
    timm = pytest.importorskip("timm", reason="timm, whose networks are tried, is not installed")
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5)
    sparsify(model, prune(model, 0.3, scope="uniform", linear=True))
    average = importlib.import_module("timm.utils").ModelEmaV3(model, decay=0.5)
    optimizer = importlib.import_module("timm.optim").create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(F.interpolate(X[:4], size=64)), Y[:4]).backward()
        optimizer.step()
        average.update(model)
    assert_sparse(model)
    state = average.state_dict()
    for name, layer in model.named_modules():
        if layer in layers_of(model):
            assert not state[f"module.{name}.weight"][~layer.weight_mask].any()
    x = torch.rand(2, 3, 64, 64)
    expected = model.eval()(x)
    assert_close(densify(copy.deepcopy(model))(x), expected)


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "swin_t"])
def test_torchvision_networks_are_pruned_and_trained(arch):
    models = pytest.importorskip(
        "torchvision.models", reason="torchvision, whose networks are tried, is not installed", exc_type=Exception
    )
    torch.manual_seed(0)
    model = getattr(models, arch)(num_classes=5)
    sparsify(model, prune(model, 0.3, scope="uniform", linear=True))
    optimizer = sgd(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(F.interpolate(X[:4], size=64)), Y[:4]).backward()
        optimizer.step()
    assert_sparse(model)
    if arch == "resnet18":
        x = torch.rand(2, 3, 64, 64)
        assert_close(shrink(model.eval(), None, x.shape).model(x), model(x))


def test_a_data_loader_of_torch_and_a_scaler_and_a_schedule():
    model = network()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    scaler = torch.amp.GradScaler("cpu")
    for x, y in [*loader(), *loader()]:
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert_sparse(model)


class Lookahead:
    """A wrapper that every `period` steps moves slow weights to the fast ones and writes them back."""

    def __init__(self, optimizer, period=2, rate=0.5):
        self.optimizer, self.period, self.rate, self.steps = optimizer, period, rate, 0
        self.slow = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % self.period == 0:
            for group, slow in zip(self.optimizer.param_groups, self.slow, strict=True):
                for fast, weight in zip(group["params"], slow, strict=True):
                    weight.lerp_(fast, self.rate)
                    fast.copy_(weight)


def assert_zero_in_state(model):
    state = model.state_dict()
    masks = {key: value for key, value in state.items() if key.endswith("weight_mask")}
    assert masks
    for key, mask in masks.items():
        assert not state[key.removesuffix("_mask")][~mask].any()


def test_lookahead_does_not_bring_weights_back_after_a_change_of_the_mask():
    model = network()
    optimizer = Lookahead(sgd(model))
    for _ in range(3):
        train(model, optimizer, 3)
        for layer in layers_of(model):
            layer.set_mask(layer.weight_mask.roll(1, 0))
    train(model, optimizer, 3)
    assert_zero_in_state(model)
    optimizer.optimizer.step()
    assert_sparse(model)


def test_weights_edited_by_hand_between_steps_are_zero_in_the_forward_pass_and_after_the_step():
    model = network()
    optimizer = sgd(model)
    train(model, optimizer)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.weight.add_(0.5)
    twin = copy.deepcopy(model)
    densify(twin)
    assert_close(model.eval()(X), twin.eval()(X))
    train(model, optimizer, 1)
    assert_sparse(model)


def test_weights_swapped_for_their_average_and_back_stay_sparse():
    model = network()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=False
    )
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
    for layer in layers_of(model):
        layer.set_mask(layer.weight_mask.roll(1, 0))
    fast = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p, mean in zip(model.parameters(), average.module.parameters(), strict=True):
            p.copy_(mean)
    assert_zero_in_state(model)
    with torch.no_grad():
        for p, own in zip(model.parameters(), fast, strict=True):
            p.copy_(own)
    train(model, optimizer, 1)
    assert_sparse(model)
    torch.optim.swa_utils.update_bn(loader(), average)
    assert_zero_in_state(average)
