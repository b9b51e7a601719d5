"""The masks of a run: how many blocks they keep at each change, what becomes of weights, momentum and average."""

import math
import re
from dataclasses import replace

import pytest
import torch
from helpers.small_runs import VALIDATION, Stop, equal_states, network
from helpers.sparse_runs import CONFIG, odd_network, run
from torch import nn

from sparse_adv import engine, masks, runs
from sparse_adv.masks.allocation import targets_of
from sparse_adv.masks.blocks import block_sizes, block_sums, conv_shape
from sparse_adv.methods import MethodConfig, SparseTraining
from sparse_adv.ops.masked_conv2d_mask import obeys
from sparse_adv.training import checkpoint

CHANGING = ("flying-bird", "rigl", "set", "gmp")
BLOCKS = [(1, 1), (4, 4), (3, 2), (1, 1, 3, 3), (2, 2, 2, 2), (64, 64)]


class Observed(SparseTraining):
    """Remembers masks and gradients around each update."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def after_update(self, step, gradients):
        before = {name: mask.clone() for name, mask in self.masks().items()}
        weights = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        momentum = {
            name: self.updater.optimizer.state[layer.weight]["momentum_buffer"].clone()
            for name, layer in self.layers.items()
        }
        changed = super().after_update(step, gradients)
        after = {name: mask.clone() for name, mask in self.masks().items()}
        self.seen.append((step, before, after, weights, momentum, dict(gradients), changed))
        self.check_state()
        return changed

    def check_state(self):
        models = [self.model] if self.updater.ema is None else [self.model, self.updater.ema.module]
        for name, mask in self.masks().items():
            assert obeys(mask, self.block)
            momentum = self.updater.optimizer.state[self.layers[name].weight]["momentum_buffer"]
            for model in models:
                layer = model.get_submodule(name)
                assert layer.weight_mask.equal(mask) and not layer.weight[~mask].any()
            assert not momentum[~mask].any()


def sizes_of(mask, block):
    return block_sizes(conv_shape(mask.shape), (*block, 1, 1)[:4])


def blocks(mask, block) -> torch.Tensor:
    block = (*block, 1, 1)[:4]
    return mask.reshape(conv_shape(mask.shape))[tuple(slice(None, None, size) for size in block)]


@pytest.mark.parametrize(
    ("method", "block", "scope"),
    [
        (method, block, ("erk", "global")[(i + j) % 2])  # each method and each block meets both
        for i, method in enumerate(CHANGING)
        for j, block in enumerate(BLOCKS)
    ],
)
def test_every_change_keeps_exact_numbers_of_blocks_and_leaves_zeros(method, block, scope):
    config = MethodConfig(method, density=0.4, block=block, scope=scope, interval=3, change_until=1.0)
    hook = Observed(config)
    run(hook, config=replace(CONFIG, ema_decay=0.5))
    changed = [step for step, *_, new in hook.seen if new]
    if math.prod(block) < 64:
        assert changed
    for step, before, after, *_ in hook.seen:
        live = {name: int(blocks(mask, block).sum()) for name, mask in before.items()}
        new = {name: int(blocks(mask, block).sum()) for name, mask in after.items()}
        if method == "gmp":
            assert all((after[name] <= before[name]).all() for name in after)  # no weight comes back
            if step == 12:
                for group, target in targets_of(hook.shapes, 0.4, scope).items():
                    sizes = torch.cat([sizes_of(after[name], block).flatten() for name in group])
                    assert abs(sum(int(after[name].sum()) for name in group) - target) <= int(sizes.max()) / 2
        elif scope == "global":
            assert sum(live.values()) == sum(new.values())
        else:
            assert live == new


@pytest.mark.parametrize("method", ["static", *CHANGING])
def test_settings_without_effect_are_those_that_a_method_does_not_use(method):
    config = MethodConfig(method, density=0.4, interval=2)
    trained = run(SparseTraining(config))[0].state_dict()
    others = {"interval": 3, "drop_fraction": 0.9, "change_until": 0.3, "rescale_init": True}
    others["growth"] = "gradient" if method == "set" else "random"
    for name, value in others.items():
        other = run(SparseTraining(replace(config, **{name: value})))[0].state_dict()
        assert equal_states(trained, other) == (name in config.without_effect()), name
    assert "rescale_init" in replace(config, dense_epochs=1.0).without_effect()


def test_gmp_ends_with_the_density_of_the_configuration():
    hook = Observed(MethodConfig("gmp", density=0.25, interval=4, change_until=0.75))
    _, records = run(hook)
    kept = [sum(int(mask.sum()) for mask in after.values()) for _, _, after, *_ in hook.seen]
    total = sum(mask.numel() for mask in hook.masks().values())
    cubic = [0.25 + 0.75 * (1 - step / 9) ** 3 for step in (4, 8, 9)]
    expected = [1, 1, 1, *[cubic[0]] * 4, cubic[1], *[0.25] * 4]
    assert [count / total for count in kept] == pytest.approx(expected, abs=3 / total)
    assert [record.density.weights for record in records] == pytest.approx([kept[i] / total for i in (2, 5, 8, 11)])


@pytest.mark.parametrize("method", ["flying-bird", "rigl"])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (2, 2, 2, 2)], ids=str)
def test_dropped_are_the_smallest_weights_and_grown_the_largest_gradients(method, block):
    hook = Observed(MethodConfig(method, density=0.3, block=block, interval=3, scope="uniform"))
    run(hook)
    changes = [change for change in hook.seen if change[-1]]
    assert len(changes) >= 2
    for step, before, after, weights, _, gradients, _ in changes:
        for name, mask in before.items():
            live, new = blocks(mask, block), blocks(after[name], block)
            if live.all() or not live.any():
                assert live.equal(new)
                continue
            shape = conv_shape(mask.shape)
            block4, sizes = (*block, 1, 1)[:4], sizes_of(mask, block).numpy().ravel()
            magnitude = block_sums(weights[name].abs().reshape(shape), block4).numpy().ravel() / sizes
            gradient = block_sums(gradients[name].abs().reshape(shape), block4).numpy().ravel() / sizes
            kept = live.numpy().ravel().copy()
            count = math.ceil(hook.schedule.drop_fraction(step) * kept.sum())
            kept[[i for i in magnitude.argsort(kind="stable") if kept[i]][:count]] = False
            kept[[i for i in (-gradient).argsort(kind="stable") if not kept[i]][:count]] = True
            assert kept.tolist() == new.flatten().tolist()


@pytest.mark.parametrize("method", ["gmp", "set"])
def test_smaller_blocks_at_an_edge_are_kept_as_often_as_others(method):
    """By sums of magnitudes the last 2 of 10 rows always lost: two classes without a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 400, bias=False), nn.ReLU(), nn.Linear(400, 10))
    hook = SparseTraining(MethodConfig(method, density=0.3, block=(4, 4), scope="uniform", interval=4))
    run(hook, model)
    mask = hook.masks()["3"].float()  # rows 4 to 9 belong to classes without images
    assert mask[8:].mean() > 0.05 and mask[8:].mean() == pytest.approx(float(mask[4:8].mean()), abs=0.1)


@pytest.mark.parametrize("method", ["gmp", "static"])
def test_a_layer_that_loses_all_of_its_weights_is_logged(method, caplog):
    hook = SparseTraining(MethodConfig(method, density=0.3, block=(64, 64), scope="global", interval=2, dense_epochs=1))
    run(hook)
    empty = [name for name, mask in hook.masks().items() if not mask.any()]
    assert empty
    told = [record.getMessage() for record in caplog.records if "keeps no weight" in record.getMessage()]
    assert told == [f"{method} keeps no weight of {', '.join(map(repr, empty))}, whose output is constant"]


def test_grown_weights_start_at_zero_and_kept_ones_are_unchanged():
    hook = Observed(MethodConfig("rigl", density=0.3, interval=3, drop_fraction=0.5))
    states = []
    hook_after = hook.after_update

    def after(step, gradients):
        changed = hook_after(step, gradients)
        states.append({name: layer.weight.detach().clone() for name, layer in hook.layers.items()})
        return changed

    hook.after_update = after
    run(hook)
    grown = 0
    for (_, before, after_masks, weights, *_), now in zip(hook.seen, states, strict=True):
        for name in before:
            assert now[name].equal(torch.where(before[name] & after_masks[name], weights[name], 0))
            grown += int((after_masks[name] & ~before[name]).sum())
    assert grown > 0


@pytest.mark.parametrize("method", ["static", *CHANGING])
def test_density_1(method):
    hook = SparseTraining(MethodConfig(method, density=1.0, block=(4, 4), interval=2))
    _, records = run(hook)
    assert records[-1].density.weights == 1 and all(mask.all() for mask in hook.masks().values())


def test_static_masks_stay_and_differ_by_seed():
    hooks = [Observed(MethodConfig("static", density=0.3, block=(2, 2))) for _ in range(3)]
    for hook, seed in zip(hooks, (0, 0, 1), strict=True):
        run(hook, config=replace(CONFIG, seed=seed))
        assert hook.changes == 0 and all(before[n].equal(after[n]) for _, before, after, *_ in hook.seen for n in after)
    first, same, other = (hook.masks() for hook in hooks)
    assert all(first[name].equal(same[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def test_random_growth_draws_anew_at_each_change_and_by_the_seed():
    drawn = []
    for seed in (0, 1):
        hook = SparseTraining(MethodConfig("set", density=0.3, interval=2))
        score = hook._growth_scores
        hook._growth_scores = lambda *arguments, score=score: drawn.append(score(*arguments)) or drawn[-1]
        run(hook, config=replace(CONFIG, seed=seed))
    scores = [float(each["3"].flatten()[0]) for each in drawn]
    assert len(scores) == len(set(scores)) == 10


def test_dense_epochs_end_with_the_largest_weights():
    hook = Observed(MethodConfig("static", density=0.3, dense_epochs=2, scope="global"))
    _, records = run(hook)
    assert [record.density.weights == 1 for record in records] == [True, False, False, False]
    (change,) = [change for change in hook.seen if change[-1]]
    step, _, after, weights, *_ = change
    assert step == 6
    kept = torch.cat([weights[name][after[name]].abs() for name in after])
    pruned = torch.cat([weights[name][~after[name]].abs() for name in after])
    assert kept.min() >= pruned.max() and len(kept) == round(0.3 * (len(kept) + len(pruned)))


def test_none_is_no_method():
    with pytest.raises(ValueError, match="method must name a method, got 'none'"):
        SparseTraining(MethodConfig())


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (MethodConfig("set"), "set will keep .* change in 11 of the 12 updates, interval is 100; lower interval"),
        (MethodConfig("rigl", interval=9), "rigl will keep .* change in 8 of the 12 updates, interval is 9; lower"),
        (MethodConfig("rigl", change_until=0.0, interval=1), "in 0 of the 12 .*; raise change_until"),
        (MethodConfig("rigl", dense_epochs=3, interval=1), "in 0 of the 12 .*; raise change_until"),
        (MethodConfig("rigl", change_until=0.1, interval=1), "in 0 of the 12 .*; raise change_until"),
        (MethodConfig("rigl", interval=8), None),
        (MethodConfig("gmp"), None),
        (MethodConfig("static"), None),
    ],
    ids=str,
)
def test_a_method_that_never_changes_its_masks_says_so(method, said, caplog):
    hook = SparseTraining(replace(method, density=0.5))
    run(hook)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == (said is not None) and all(re.search(said, text) for text in texts)
    assert hook.changes == (0 if said and not method.dense_epochs else method.method != "static")


@pytest.mark.parametrize(
    "method",
    [MethodConfig("static"), MethodConfig("gmp", interval=2), MethodConfig("rigl", interval=2, dense_epochs=1)],
)
@pytest.mark.parametrize(("block", "misses"), [((64, 64), True), ((1, 1), False)])
def test_masks_that_miss_the_density_by_far_say_so(method, block, misses, caplog):
    hook = SparseTraining(replace(method, density=0.3, block=block, scope="uniform"))
    _, records = run(hook)
    texts = [record.getMessage() for record in caplog.records]
    got = records[-1].density.weights
    said = f"{method.method} keeps {got:.3g} of the weights, density asks for 0.3: layers have few blocks of 64,64"
    assert (abs(got - 0.3) > 0.03) == misses == any(text.startswith(said) for text in texts)
    assert sum("density asks" in text for text in texts) == misses


@pytest.mark.parametrize("dense_epochs", [4, 4.5])
@pytest.mark.parametrize("method", ["static", "rigl", "gmp"])
def test_dense_epochs_that_leave_none_are_refused_before_training(tmp_path, method, dense_epochs):
    steps, hook = [], SparseTraining(MethodConfig(method, dense_epochs=dense_epochs))
    with pytest.raises(ValueError, match=f"dense_epochs must be less than the 4 epochs .*, got {dense_epochs:g}"):
        run(hook, folder=tmp_path, on_step=steps.append)
    assert not steps


def stop_after(stop_at, in_batch):
    def on_epoch(record):
        if record.epoch == stop_at and not in_batch:
            raise Stop

    def on_step(step):
        if in_batch and step == 3 * stop_at + 2:
            raise Stop

    return {"on_epoch": on_epoch, "on_step": on_step}


STOPPED = {"config": replace(CONFIG, ema_decay=0.9, schedule="cosine"), "validation": VALIDATION}


@pytest.fixture(scope="module", params=["static", *CHANGING])
def whole(request, tmp_path_factory):
    """A run that was not stopped: its method, hook, weights, records and folder."""
    method, folder = MethodConfig(request.param, density=0.3, block=(2, 2), interval=2), tmp_path_factory.mktemp("run")
    hook = SparseTraining(method)
    model, records = run(hook, folder=folder / "whole", **STOPPED)
    return method, hook, model.state_dict(), records, folder / "whole"


@pytest.mark.parametrize(
    ("stop_at", "in_batch", "again"), [(1, False, "new model"), (1, True, "same model"), (3, True, "new model")]
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(tmp_path, whole, stop_at, in_batch, again):
    method, hook, expected, records, folder = whole
    model = odd_network()
    with pytest.raises(Stop):
        run(SparseTraining(method), model, folder=tmp_path, **STOPPED, **stop_after(stop_at, in_batch))
    if again == "new model":
        model = odd_network()
    second = SparseTraining(method)
    _, continued = run(second, model, folder=tmp_path, **STOPPED)
    assert (second.step, second.changes) == (hook.step, hook.changes)
    assert equal_states(model.state_dict(), expected)
    for name in (runs.LAST, runs.BEST):
        assert equal_states(*(checkpoint.read_weights(run / name)[0] for run in (folder, tmp_path)))
    for one, other in zip(records, continued, strict=True):
        assert (one.loss, one.density, one.total.macs) == (other.loss, other.density, other.total.macs)


def test_a_compiled_network_is_trained_and_averaged_as_it_is():
    config, method = replace(CONFIG, epochs=2, ema_decay=0.5), MethodConfig("rigl", density=0.5, interval=2)
    torch.compiler.reset()
    results = []
    for model in (odd_network(), torch.compile(odd_network(), backend="eager")):
        _, records = run(SparseTraining(method), model, config=config, validation=VALIDATION)
        results.append([number for record in records for number in (record.loss, record.robust_accuracy)])
    assert results[0] == pytest.approx(results[1])


def test_a_finished_run_can_be_extended(tmp_path):
    config, model = MethodConfig("set", density=0.3, interval=2), odd_network()
    run(SparseTraining(config), model, folder=tmp_path)
    _, records = run(SparseTraining(config), model, config=replace(CONFIG, epochs=6), folder=tmp_path)
    assert [record.epoch for record in records] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_another_method_is_refused(tmp_path):
    config = MethodConfig("set", density=0.3)
    run(SparseTraining(config), folder=tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(method.density 0.3, now 0.4\)"):
        run(SparseTraining(replace(config, density=0.4)), folder=tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run(None, folder=tmp_path)


def test_the_weights_are_a_pruned_checkpoint(tmp_path):
    hook = SparseTraining(MethodConfig("flying-bird", density=0.3, interval=2))
    run(hook, folder=tmp_path)
    read = masks.load_pruned(tmp_path / runs.LAST).masks
    assert read.keys() == hook.masks().keys() and all(read[name].equal(mask) for name, mask in hook.masks().items())


def test_the_engine_and_attacks_see_changed_masks():
    """Gradients after each change equal those of a dense model with the same weights."""
    x, y = VALIDATION.images[:8].float() / 255, VALIDATION.labels[:8]

    class Compared(Observed):
        def check_state(self):
            super().check_state()
            if not self.seen[-1][-1]:
                return
            modes = [(module, module.training) for module in self.model.modules()]
            self.model.eval()
            dense = odd_network().eval()
            dense.load_state_dict({k: v for k, v in self.model.state_dict().items() if not k.endswith("weight_mask")})
            leaf = x.clone().requires_grad_()
            nn.functional.cross_entropy(dense(leaf), y, reduction="sum").backward()
            with engine.input_gradients(self.model, x) as gradients:
                assert isinstance(gradients, engine.Program)
                got = gradients.gradient(x, lambda logits: nn.functional.cross_entropy(logits, y, reduction="sum"))
            assert torch.allclose(got, leaf.grad, atol=1e-6, rtol=1e-4)
            for module, mode in modes:
                module.training = mode

    hook = Compared(MethodConfig("rigl", density=0.3, interval=2))
    run(hook, config=replace(CONFIG, engine=True))
    assert hook.changes == 4


@pytest.mark.parametrize("method", [*CHANGING, "flying-bird-plus"])
def test_a_second_run_of_one_object_is_that_of_a_new_object(method):
    hook = SparseTraining(MethodConfig(method, density=0.3, interval=2, permute_channels=method == "gmp"))
    first = run(hook, network(), validation=VALIDATION)[0].state_dict()
    changes, retained = hook.changes, hook.retained
    assert equal_states(run(hook, network(), validation=VALIDATION)[0].state_dict(), first)
    assert (hook.changes, hook.retained) == (changes, retained)
