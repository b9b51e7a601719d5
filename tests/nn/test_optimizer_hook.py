"""After every optimiser step, pruned weights, their gradients and the optimiser's state for them are exactly 0."""

import copy
import gc
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn

from sparse_adv.masks import prune
from sparse_adv.nn import MaskedConv2d, densify, optimizer_hook, sparsify

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, amsgrad=True, foreach=False),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    return OPTIMIZERS[request.param]


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.rand(3, 2, 7, 7)).square().sum().backward()
        optimizer.step()


def assert_nothing_outside_the_masks(model, optimizer):
    layers = [module for module in model.modules() if isinstance(module, MaskedConv2d)]
    assert layers
    for layer in layers:
        state = [value for value in optimizer.state[layer.weight].values() if value.shape == layer.weight.shape]
        assert state
        for tensor in (layer.weight, layer.weight.grad, *state):
            assert not tensor[~layer.weight_mask].any()
        assert layer.weight[layer.weight_mask].any()


def test_from_the_first_step_on(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    for _ in range(3):
        train(model, optimizer, 1)
        assert_nothing_outside_the_masks(model, optimizer)


def test_after_sparsify_of_a_model_whose_optimiser_has_stepped(model, make_optimizer):
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    sparsify(model, prune(model, 0.5))
    train(model, optimizer, 1)
    assert_nothing_outside_the_masks(model, optimizer)


def test_after_a_mask_changed_between_backward_and_step(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    model(torch.rand(3, 2, 7, 7)).square().sum().backward()
    model[0].set_mask(~model[0].weight_mask)
    model[2].set_mask(torch.rand(4, 4, 3, 3) < 0.3)
    with torch.no_grad():
        model[0].weight.add_(model[0].weight_mask * 0.1)
    optimizer.step()
    assert_nothing_outside_the_masks(model, optimizer)
    train(model, optimizer, 1)
    assert_nothing_outside_the_masks(model, optimizer)


def test_what_is_pruned_and_revived_between_two_steps_starts_without_momentum(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    layer = model[0]
    kept, weight = layer.weight_mask.clone(), layer.weight
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if value.shape == weight.shape}
    removed = kept & (torch.arange(kept.numel()).view_as(kept) % 3 == 0)
    layer.set_mask(kept & ~removed)
    layer.set_mask(torch.ones_like(kept))
    layer.set_mask(kept)
    optimizer_hook.settle(optimizer)
    for key, value in before.items():
        assert value[removed].any() and optimizer.state[weight][key].equal(value * ~removed)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert not weight[removed].any()


def test_the_state_of_a_given_optimiser_is_zeroed_at_once(model, make_optimizer):
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    sparsify(model, prune(model, 0.5), optimizer=optimizer)
    assert_nothing_outside_the_masks(model, optimizer)
    model[2].set_mask(prune(model, 0.2)["2"], optimizer=optimizer)
    assert_nothing_outside_the_masks(model, optimizer)


def test_after_loading_dense_weights_and_a_dense_optimisers_state(model, make_optimizer):
    dense = copy.deepcopy(model)
    dense_optimizer = make_optimizer(dense.parameters())
    train(dense, dense_optimizer)
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    model.load_state_dict(dense.state_dict())
    optimizer.load_state_dict(dense_optimizer.state_dict())
    train(model, optimizer, 1)
    assert_nothing_outside_the_masks(model, optimizer)


def test_copies_of_a_model_obey_their_masks_too(model, make_optimizer):
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    twin = copy.deepcopy(sparsify(model, prune(model, 0.5)))
    twin_optimizer = make_optimizer(twin.parameters())
    twin_optimizer.load_state_dict(optimizer.state_dict())
    train(twin, twin_optimizer, 1)
    assert_nothing_outside_the_masks(twin, twin_optimizer)


def test_after_a_write_that_counts_in_no_version(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    for _ in range(2):
        for layer in (model[0], model[2]):
            layer.weight.data.add_(0.5)
        train(model, optimizer, 1)
        assert not any(layer.weight[~layer.weight_mask].any() for layer in (model[0], model[2]))


def test_after_gradients_were_assigned_by_hand(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert not any(layer.weight[~layer.weight_mask].any() for layer in (model[0], model[2]))
    pruned = ~model[0].weight_mask.clone()
    model[0].set_mask(torch.ones_like(pruned), optimizer)  # what it revives has no momentum
    state = [value for value in optimizer.state[model[0].weight].values() if value.shape == pruned.shape]
    assert state and not any(value[pruned].any() for value in state)


def test_a_densified_model_trains_dense(model):
    sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    densify(model)
    train(model, optimizer)
    assert model[0].weight.all() and model[2].weight.all()


def test_a_compiled_step(model):
    sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS["sgd-foreach"](model.parameters())
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        model(torch.rand(3, 2, 7, 7)).square().sum().backward()
        step()
    assert_nothing_outside_the_masks(model, optimizer)


def test_the_hook_keeps_no_weight_and_no_optimiser_alive(model):
    sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    gc.collect()
    watched, settled = len(optimizer_hook._masks), len(optimizer_hook._settled)
    del model[2], optimizer
    gc.collect()
    assert (len(optimizer_hook._masks), len(optimizer_hook._settled)) == (watched - 1, settled - 1)


ALL = [
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
]


@pytest.mark.parametrize("name", ALL)
def test_every_optimiser_of_torch_keeps_pruned_weights_at_zero(name):
    """SparseAdam is left out: it takes sparse gradients only."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    sparsify(model, prune(model, 0.5, linear=True))
    parameters = [p for p in model.parameters() if name != "Muon" or p.dim() == 2]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.rand(6, 4, 4)), torch.arange(6) % 2)
        loss.backward()
        return loss

    for step in range(6):
        if step == 3:
            model[1].set_mask(torch.rand(8, 16) < 0.5)
        optimizer.step(closure)
        for layer in (model[1], model[3]):
            assert layer.weight[layer.weight_mask].any() and not layer.weight[~layer.weight_mask].any()


class Attention(nn.Module):
    """As in Swin, BEiT and EVA-02: a parent that reads its child's weight and never calls it."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 6, bias=False)

    def forward(self, x):
        return nn.functional.linear(x, self.qkv.weight)


@pytest.mark.parametrize("closure", [False, True])
def test_a_weight_that_its_parent_reads(make_optimizer, closure):
    torch.manual_seed(0)
    model = Attention()
    sparsify(model, prune(model, 0.5, linear=True))
    layer, optimizer = model.qkv, make_optimizer(model.parameters())

    def loss():
        optimizer.zero_grad()
        value = model(torch.rand(5, 6)).square().sum()
        value.backward()
        assert layer.weight.grad.any() and not layer.weight.grad[~layer.weight_mask].any()
        return value

    for step in range(4):
        if step == 2:
            layer.set_mask(torch.rand(6, 6) < 0.5)
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
        for tensor in (layer.weight, *optimizer.state[layer.weight].values()):
            assert tensor.shape != layer.weight.shape or not tensor[~layer.weight_mask].any()
        assert layer.weight[layer.weight_mask].any()


def test_a_regulariser_revives_no_pruned_weight(model):
    sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    rows = model[0].weight.flatten(1)
    (rows @ rows.T - torch.eye(4) + (rows - 1).square().sum()).sum().backward()
    optimizer.step()
    assert not model[0].weight[~model[0].weight_mask].any()


def test_gradients_that_are_required_later_and_layers_made_dense(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sparsify(model, prune(model, 0.5))
    mask = model[0].weight_mask
    assert not model[0].weight.requires_grad
    weight = model[0].weight.requires_grad_()
    (weight - 1).square().sum().backward()
    assert torch.equal(weight.grad != 0, mask)
    densify(model)
    weight.grad = None
    (weight - 1).square().sum().backward()
    assert weight.grad.all()


@pytest.mark.parametrize("name", ["sgd-foreach", "adam-foreach"])
@pytest.mark.parametrize("change", ["sparsify", "set_mask", "by hand"])
def test_a_compiled_step_obeys_a_change_in_the_middle_of_training(model, name, change):
    if change != "sparsify":
        sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS[name](model.parameters())
    step = torch.compile(optimizer.step, backend="aot_eager")

    def train_compiled():
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.rand(3, 2, 7, 7)).square().sum().backward()
            step()

    train_compiled()
    if change == "sparsify":
        sparsify(model, prune(model, 0.5))
    elif change == "set_mask":
        model[0].set_mask(~model[0].weight_mask)
    else:
        with torch.no_grad():
            model[0].weight.fill_(1)
    train_compiled()
    assert_nothing_outside_the_masks(model, optimizer)


class Lookahead(torch.optim.SGD):
    """Every second step goes half of the way from older weights, which have none of the new mask's zeros."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, 0.1)
        self.slow = [parameter.detach().clone() for parameter in self.param_groups[0]["params"]]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None) -> None:
        super().step(closure)
        self.steps += 1
        for fast, slow in zip(self.param_groups[0]["params"], self.slow, strict=True) if self.steps % 2 == 0 else ():
            fast.copy_(slow.lerp_(fast, 0.5))


def test_an_optimiser_that_averages_with_older_weights(model):
    optimizer = Lookahead(model.parameters())
    masks = prune(model, 0.3)
    sparsify(model, masks, optimizer=optimizer)
    for _ in range(4):
        model(torch.rand(2, 2, 8, 8)).sum().backward()
        optimizer.step()
        assert all(not model.get_submodule(name).weight[~mask].any() for name, mask in masks.items())


def test_a_weight_written_between_two_steps_is_zeroed_at_the_next(model):
    """As by a swap with averaged weights, or by Lookahead."""
    sparsify(model, prune(model, 0.5))
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train(model, optimizer)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.lerp_(torch.ones_like(layer.weight), 0.5)
    train(model, optimizer, 1)
    assert_nothing_outside_the_masks(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_step_leaves_exact_zeros_in_every_dtype_and_layout_whatever_was_written(dtype, memory_format):
    layer = nn.Conv2d(4, 6, 3).to(dtype=dtype, memory_format=memory_format)
    mask = torch.rand(layer.weight.shape) < 0.4
    layer = MaskedConv2d.from_dense(layer, mask, (1, 1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer.weight.grad = torch.ones_like(layer.weight)
    for value in (-1.0, float("nan"), float("-inf")):
        layer.weight.data[~mask] = value
        kept = layer.weight.detach()[mask].clone()
        optimizer.step()
        pruned = layer.weight.detach()[~mask]
        assert (pruned == 0).all() and not torch.signbit(pruned).any()
        torch.testing.assert_close(layer.weight.detach()[mask], kept - 0.5)


def test_a_weight_that_replaces_another_is_kept_under_the_mask_too(model, make_optimizer):
    sparsify(model, prune(model, 0.5))
    old = model[0].weight.detach().clone()
    model[0].weight = nn.Parameter(torch.ones_like(old))
    assert torch.equal(model[0].weight, model[0].weight_mask.float())
    optimizer = make_optimizer(model.parameters())
    train(model, optimizer)
    assert_nothing_outside_the_masks(model, optimizer)
    weight = model[0].weight
    with pytest.raises(ValueError, match=r"mask has shape \(4, 2, 3, 3\), weight has shape \(4, 2, 5, 5\)"):
        model[0].weight = nn.Parameter(torch.ones(4, 2, 5, 5))
    assert model[0].weight is weight


def test_a_new_mask_zeroes_the_gradients_that_micro_batches_have_added_up(model):
    """They would count when gradients are clipped, and move weights that another mask revives before the next step."""
    sparsify(model, {name: torch.ones_like(mask) for name, mask in prune(model, 0.5).items()})
    model(torch.rand(3, 2, 7, 7)).square().sum().backward()
    masks = prune(model, 0.5)
    kept = {name: model.get_submodule(name).weight.grad.clone() for name in masks}
    sparsify(model, masks)
    for name, mask in masks.items():
        assert model.get_submodule(name).weight.grad.equal(kept[name] * mask)


def test_a_model_that_another_process_gets_warns_of_nothing_and_keeps_its_zeros(model, recwarn):
    masks = prune(model, 0.5)
    received = pickle.loads(ForkingPickler.dumps(sparsify(model, masks)))
    assert not recwarn.list
    train(received, torch.optim.SGD(received.parameters(), 0.1, momentum=0.9, weight_decay=0.1))
    assert all(not received.get_submodule(name).weight[~mask].any() for name, mask in masks.items())
