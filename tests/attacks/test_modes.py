"""A model in another mode: a twin runs it, so that flags which other threads see stay; else the flags are restored."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.attacked import batch, make_model, snapshot
from torch import nn

from sparse_adv import attacks, engine, masks, sparsify, training
from sparse_adv.attacks.modes import bn_mode, in_mode
from sparse_adv.engine import dispatch

IMAGES, LABELS = batch()


def flags(model: nn.Module) -> list[tuple[bool, bool | None]]:
    return [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def partly_frozen(masked: bool = False) -> nn.Module:
    """A network in training mode whose first BatchNorm is frozen."""
    model = make_model()
    model = sparsify(model, masks.prune(model, 0.5, linear=True)) if masked else model
    model.train()[1].eval()
    return model


@pytest.mark.parametrize("use_engine", [True, False])
@pytest.mark.parametrize("mode", ["eval", "batch", "train"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_flags_of_a_model_in_training_never_change(mode, use_engine, masked):
    model, images = partly_frozen(masked).double(), IMAGES.double()
    expected, seen = flags(model), []

    def loss(logits, labels):
        seen.append(flags(model))
        return F.cross_entropy(logits, labels, reduction="none")

    toggled = copy.deepcopy(model)
    options = {"steps": 3, "random_start": False, "engine": use_engine}
    for _ in range(2):  # the second time the twin is there already
        adv = attacks.pgd(model, images, LABELS, bn_mode=mode, loss=loss, **options)
        assert len(seen) >= 3 and all(found == expected for found in seen) and flags(model) == expected
        with bn_mode(toggled, mode):
            x = images
            for _ in range(3):
                x = x.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(F.cross_entropy(toggled(x), LABELS, reduction="sum"), x)
                moved = x.detach() + 2 / 255 * gradient.sign()
                x = (images + (moved - images).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
        torch.testing.assert_close(adv, x)
    assert snapshot(model) == snapshot(toggled)


@pytest.mark.parametrize("before", ["eval", "train"])
def test_a_model_and_its_twin_keep_what_the_engine_made_of_each(before, monkeypatch):
    model, made, seen = make_model(), [], []
    monkeypatch.setattr(dispatch, "Program", lambda *args: made.append(args) or engine.Program(*args))

    def loss(logits, labels):
        seen.append(flags(model))
        return F.cross_entropy(logits, labels, reduction="none")

    for mode in (before, "train", "train", "eval", "train"):
        model.train(mode == "train")
        expected = flags(model)
        attacks.pgd(model, IMAGES, LABELS, steps=1, loss=loss)
        assert all(found == expected for found in seen)
        seen.clear()
    assert len(made) <= 4  # a copy to compare with and a program, for the model and for its twin


def test_a_thread_runs_a_model_in_training_while_others_attack_and_evaluate_it():
    model = partly_frozen(masked=True)
    model[4].eval()  # random numbers of dropout are drawn from a generator that all threads share
    model[3][1].momentum = 0.0  # the attacks use the running statistics
    expected_flags = flags(model)
    reference = copy.deepcopy(model)
    wanted = [reference(IMAGES).detach() for _ in range(4)]
    adversarial = attacks.pgd(copy.deepcopy(model), IMAGES, LABELS, steps=2, random_start=False)
    done, failures = threading.Event(), []

    def watch() -> None:
        try:
            while not done.is_set():
                assert flags(model) == expected_flags
        except BaseException as error:
            failures.append(error)

    def attack() -> None:
        try:
            for use_engine in (True, False) * 2:
                adv = attacks.pgd(model, IMAGES, LABELS, steps=2, random_start=False, engine=use_engine)
                torch.testing.assert_close(adv, adversarial)
                attacks.AutoAttack(model, version="custom", attacks_to_run=["square"], verbose=False).clean_accuracy(
                    IMAGES, LABELS
                )
                training.clean_accuracy(model, [(IMAGES, LABELS)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=target) for target in (watch, attack, attack)]
    for thread in threads:
        thread.start()
    try:
        for output in wanted:
            assert torch.equal(model(IMAGES), output)
    finally:
        for thread in threads[1:]:
            thread.join()
        done.set()
        threads[0].join()
    assert not failures
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    )


def hooked(model: nn.Module) -> nn.Module:
    model[0].register_forward_hook(lambda module, inputs, output: output * (1 if module is model[0] else 0))
    return model


class Referring(nn.Module):
    """Calls a submodule through a list, a bound method or a closure that the table of submodules does not show."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = make_model()
        inner = self.inner
        ways = {"list": [inner], "method": inner.forward, "closure": lambda x: inner(x), "deep": {"a": [(inner,)]}}
        self.found = ways[how]

    def forward(self, x):
        found = self.found
        while isinstance(found, (list, tuple, dict)):
            found = found["a"] if isinstance(found, dict) else found[0]
        return found(x)


def own_forward(model: nn.Module) -> nn.Module:
    model.forward = model.forward
    return model


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: hooked(make_model()),
        lambda: own_forward(make_model()),
        *(lambda how=how: Referring(how) for how in ("list", "method", "closure", "deep")),
        lambda: torch.jit.script(make_model()),
    ],
)
def test_a_model_whose_twin_might_compute_something_else_is_put_in_eval_mode_itself(make):
    model = make().train()
    with in_mode(model, "eval") as running:
        assert running is model and not any(module.training for module in model.modules())
        expected = model(IMAGES)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(make_model().eval()(IMAGES), expected)


def test_with_hooks_for_all_modules_the_model_itself_runs():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with in_mode(make_model().train(), "eval") as running:
            pass
    finally:
        handle.remove()
    model = make_model().train()
    with in_mode(model, "eval") as other:
        assert other is not model
    assert running.training and not other.training


def test_what_a_twin_assigns_is_assigned_to_the_model():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.weight, self.log = 0, nn.Parameter(torch.ones(1)), []
            self.register_buffer("total", torch.zeros(1))

        def forward(self, x):
            self.calls, self.total = self.calls + 1, self.total + 1
            self.log.append(self.calls)
            if not hasattr(self, "head"):
                self.head = nn.Linear(192, 5)
            return self.head(x.flatten(1)) * self.weight

    model = Counting().train()
    for _ in range(2):
        attacks.pgd(model, IMAGES, LABELS, steps=2, engine=False)
    assert model.calls == 4 == model.total and model.log == [1, 2, 3, 4] and model.training
    assert list(model.state_dict()) == ["weight", "total", "head.weight", "head.bias"] and model.head.training


def test_a_twin_follows_its_model():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.empty, self.none = make_model(), nn.Sequential(), None
            self.scale, self.register = 1.0, nn.ModuleDict({"again": self.inner})

        def forward(self, x):
            return self.empty(self.register["again"](x) + self.inner(x)) * self.scale

    def same() -> None:
        model.train()
        with in_mode(model, "eval") as running, torch.no_grad():
            found = running(IMAGES.to(next(model.parameters()).dtype))
        assert running is not model and model.training
        torch.testing.assert_close(found, copy.deepcopy(model).eval()(IMAGES.to(found.dtype)))
        twins.append(running)

    model, twins = Scaled(), []
    same()
    same()
    model.scale = 3.0
    model.inner[0].weight = nn.Parameter(torch.rand_like(model.inner[0].weight))
    same()
    model.double()
    same()
    assert len({id(twin) for twin in twins}) == 1  # the engine's programs are kept
    model.inner[2] = nn.ELU()
    same()
    nn.utils.parametrizations.weight_norm(model.inner[0])
    same()
    del model.scale
    with pytest.raises(AttributeError, match="scale"):
        same()
    with in_mode(model.eval(), "eval") as running:
        assert running is not model  # an evaluation after training needs no other programs of the engine


def test_a_model_in_eval_mode_runs_itself_and_twins_end_with_their_model():
    model = make_model().eval()
    with in_mode(model, "eval") as running:
        assert running is model
    with in_mode(model.train(), "eval") as running:
        attacks.pgd(model, IMAGES, LABELS, steps=1)
    references = [weakref.ref(module) for module in (model, running)]
    del model, running
    gc.collect()  # the tracer of torch.fx is part of a cycle
    assert [reference() for reference in references] == [None, None]
