"""What the code of a model reads: each change of it is seen, or the model is left to autograd; others cost nothing."""

import collections
import dataclasses
import enum
import functools
import logging
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.own_network import Net, X, assert_as_autograd, gradient, new
from torch import nn

from sparse_adv import engine


class Slots:
    __slots__ = ("value",)


class Attributed(dict):
    pass


class Level(enum.Enum):
    LOW, HIGH = 1.0, 3.0


@dataclasses.dataclass
class Options:
    value: float = 1.0
    names: list = dataclasses.field(default_factory=lambda: [str(i) for i in range(1100)])


def with_attribute(kind, value):
    made = kind()
    made.value = value
    return made


def counted_by(values):
    return lambda x: F.gelu(x) * values[0]


def leaky(slope):
    return functools.partial(F.leaky_relu, negative_slope=slope)


class Property(Net):
    hidden = 1.0

    @property
    def held(self):
        return self.hidden

    @held.setter
    def held(self, value):
        self.hidden = value


def of_value(self, x):
    return F.gelu(x) * self.held.value


def of_first(self, x):
    return F.gelu(x) * self.held[0]


def called(self, x):
    return self.held(x)


def replace_method(model):
    type(model).act = lambda self, x: x.square()


def replace_forward(model):
    type(model).forward = lambda self, x: self.linear(self.conv(x).tanh().mean((2, 3)))


def replace_code(model):
    type(model).act.__code__ = (lambda self, x: x.square()).__code__


CHANGES = {
    "partial": (lambda: new(leaky(0.1), act=called), lambda m: setattr(m, "held", leaky(0.9))),
    "keywords of a partial": (
        lambda: new(leaky(0.1), act=called),
        lambda m: m.held.keywords.update(negative_slope=0.9),
    ),
    "function": (lambda: new(lambda x: x * 2, act=called), lambda m: setattr(m, "held", lambda x: x.square())),
    "default of a function": (
        lambda: new(lambda x, k=1: F.gelu(x) * k, act=called),
        lambda m: setattr(m.held, "__defaults__", (5,)),
    ),
    "closure": (
        lambda: new(counted_by([1.0]), act=called),
        lambda m: m.held.__closure__[0].cell_contents.__setitem__(0, 7.0),
    ),
    "builtin function": (lambda: new(torch.relu, act=called), lambda m: setattr(m, "held", torch.sigmoid)),
    "after a long list": (lambda: new(Options(), act=of_value), lambda m: setattr(m.held, "value", 4.0)),
    "element 1500 of a list": (
        lambda: new([1.0] * 2000, act=lambda self, x: F.gelu(x) * self.held[1500]),
        lambda m: m.held.__setitem__(1500, 4.0),
    ),
    "element of a very long list": (lambda: new([1.0] * 10_000, act=of_first), lambda m: m.held.__setitem__(0, 4.0)),
    "slots": (lambda: new(with_attribute(Slots, 1.0), act=of_value), lambda m: setattr(m.held, "value", 4.0)),
    "attribute of a dict": (
        lambda: new(with_attribute(Attributed, 1.0), act=of_value),
        lambda m: setattr(m.held, "value", 4.0),
    ),
    "namespace": (
        lambda: new(types.SimpleNamespace(value=1.0), act=of_value),
        lambda m: setattr(m.held, "value", 4.0),
    ),
    "method of an object": (
        lambda: new(Scale(), act=called),
        lambda m: setattr(Scale, "__call__", lambda self, x: x.square()),
    ),
    "deque": (lambda: new(collections.deque([1.0]), act=of_first), lambda m: m.held.__setitem__(0, 4.0)),
    "enum": (lambda: new(Level.LOW, act=of_value), lambda m: setattr(m, "held", Level.HIGH)),
    "array": (
        lambda: new(np.ones((8, 8, 8), np.float32), act=lambda self, x: F.gelu(x) * torch.tensor(self.held)),
        lambda m: m.held.__imul__(5),
    ),
    "large array": (
        lambda: new(np.ones(1 << 18), act=lambda self, x: F.gelu(x) * float(self.held[7])),
        lambda m: m.held.__imul__(5),
    ),
    "attribute of a class": (
        lambda: new(act=lambda self, x: F.gelu(x) * self.k),
        lambda m: setattr(type(m), "k", 4.0),
    ),
    "attribute that type(self) gives": (
        lambda: new(act=lambda self, x: F.gelu(x) * type(self).k),
        lambda m: setattr(type(m), "k", 4.0),
    ),
    "method": (lambda: new(act=lambda self, x: F.gelu(x)), replace_method),
    "code of a method": (lambda: new(act=lambda self, x: F.gelu(x)), replace_code),
    "method that super() gives": (
        lambda: type("Outer", (type(new()),), {"act": lambda self, x: super(type(self), self).act(x), "held": 1.0})(),
        lambda m: setattr(type(m).__base__, "act", lambda self, x: x.square()),
    ),
    "forward": (new, replace_forward),
    "new attribute": (
        lambda: new(act=lambda self, x: x.square() if hasattr(self, "squares") else F.gelu(x)),
        lambda m: setattr(m, "squares", True),
    ),
    "read by vars": (
        lambda: new(act=lambda self, x: F.gelu(x) * vars(self)["held"]),
        lambda m: setattr(m, "held", 4.0),
    ),
    "read by a property": (lambda: Property(), lambda m: setattr(m, "held", 4.0)),
    "attribute of a layer": (new, lambda m: setattr(m.conv, "padding", (0, 0))),
    "sign of zero": (
        lambda: new(0.0, act=lambda self, x: F.gelu(x) * (2 if str(self.held) == "0.0" else 3)),
        lambda m: setattr(m, "held", -0.0),
    ),
    "type of a number": (
        lambda: new(1, act=lambda self, x: F.gelu(x) * (2 if self.held is True else 3)),
        lambda m: setattr(m, "held", True),
    ),
    "order of a dict": (
        lambda: new({"a": 1.0, "b": 2.0}, act=lambda self, x: F.gelu(x) * next(iter(self.held.values()))),
        lambda m: m.held.update(a=m.held.pop("a")),
    ),
}


class Scale:
    def __call__(self, x):
        return F.gelu(x)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_is_read_is_seen(name):
    make, change = CHANGES[name]
    model = make().eval()
    assert_as_autograd(model)
    before = gradient(model)
    change(model)
    assert not torch.allclose(before, gradient(model, use_engine=False), rtol=1e-3)
    assert_as_autograd(model)


@pytest.mark.parametrize("name", ["partial", "closure", "deque", "method", "forward", "attribute of a class", "slots"])
def test_a_change_is_seen_in_training(name):
    make, change = CHANGES[name]
    model = make().train()
    model.conv = nn.Sequential(model.conv, nn.BatchNorm2d(8))
    for _ in range(2):
        expected = model(X)
        torch.testing.assert_close(engine.fuse_for_training(model, X)(X), expected, rtol=1e-4, atol=1e-6)
        change(model)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (with_attribute(Slots, 1.0), "'held' of the model: a value of type Slots, of which changes would not be seen"),
        ([1.0] * 10_000, "'held' of the model: more than 4096 values, of which"),
        (iter([1.0]), "'held' of the model: a value of type list_iterator, of which"),
    ],
    ids=["slots", "long", "iterator"],
)
def test_what_cannot_be_watched_leaves_the_model_to_autograd(held, said):
    (line,) = engine.explain(new(held, act=lambda self, x: F.gelu(x) if self.held else x), X)
    assert line.startswith("autograd: ") and said in line


def test_methods_of_the_model_as_attributes():
    model = new(act=called, a=lambda self, x: F.gelu(x), b=lambda self, x: x * x)
    for held in (model.a, model.b, model.a):
        model.held = held
        assert_as_autograd(model)
        assert not engine.explain(model, X)[0].startswith("autograd")


def test_a_new_function_at_the_address_of_a_freed_one_is_another():
    model = new(act=called)
    for k in range(1, 5):
        model.held = lambda x, k=k: F.gelu(x) * k
        assert_as_autograd(model)
        del model.held


def test_attributes_that_are_not_read_cause_no_trace(made):
    model = new()
    for step in range(8):
        model.step, model.conv.step, model.trainer, model.last = step, step, with_attribute(Slots, step), X * step
        type(model).instances = [object()]
        assert_as_autograd(model)
    assert len(made) == 1 and not engine.explain(model, X)[0].startswith("autograd")


def test_a_model_that_saves_its_features_is_traced_once(made):
    model = new(act=lambda self, x: setattr(self, "last", F.gelu(x)) or self.last)
    for _ in range(8):
        gradient(model)
    assert len(made) == 1


def test_a_hook_that_saves_features_causes_no_trace(made):
    model = new()
    model.conv.register_forward_hook(lambda module, args, output: setattr(module, "out", output.detach()))
    model.linear.register_forward_hook(lambda module, args, output: setattr(module, "calls", id(output)))
    for _ in range(8):
        assert_as_autograd(model)
    assert len(made) == 1


def test_an_attribute_that_changes_at_each_call_leaves_the_model_to_autograd_until_it_stays(made, caplog):
    model = new()
    for step in range(1, 20):
        model.held = 1.0 + step
        assert_as_autograd(model)
    assert len(made) == 5
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        "the engine leaves this Own to autograd: held changes from call to call"
    ]
    assert engine.explain(model, X) == ["autograd: held changes from call to call"]
    for _ in range(20):
        assert_as_autograd(model)
    assert len(made) == 6 and not engine.explain(model, X)[0].startswith("autograd")


def of_all(self, x):
    return x * len(self.__dict__)


@pytest.mark.parametrize(
    ("model", "change", "said"),
    [
        (
            lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3)),
            lambda model, k: setattr(model[1], "padding", (k, k)),
            "an option of module '1'",
        ),
        (lambda: new(forward=of_all), lambda model, k: setattr(model, f"own{k}", 1.0), "an attribute of the model"),
    ],
    ids=["layer", "all attributes"],
)
def test_what_changes_at_each_call_is_told_in_words(model, change, said):
    model = model().eval()
    for step in range(1, 20):
        change(model, step)
        gradient(model)
    assert engine.explain(model, X) == [f"autograd: {said} changes from call to call"]


def test_states_that_come_again_are_not_traced_again(made):
    model = new()
    for step in range(20):
        model.held = 1.0 + step % 3
        assert_as_autograd(model)
    assert len(made) == 3
