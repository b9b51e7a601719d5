"""The content of a value is equal while nothing of the value changes, and another after any change that can be seen."""

import collections
import copy
import functools
import gc
import random
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from sparse_adv.engine.content import Unseen, content


class Plain:
    scale = 1

    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("__dict__", "__weakref__", "value")

    def __init__(self, value):
        self.value = value


class WithoutWeakReferences:
    """As large as an object with nothing but a `__dict__`."""

    __slots__ = ("__dict__", "value")

    def __init__(self, value):
        self.value = value


class Dict(dict):
    pass


def function_of(value):
    return lambda default=value: (default, value)


WRAPPERS = {
    "tuple": lambda value: (value, 1),
    "list": lambda value: [2, value],
    "dict": lambda value: {"key": value},
    "deque": lambda value: collections.deque([value], 3),
    "partial": lambda value: functools.partial(max, value, key=[value]),
    "namespace": lambda value: types.SimpleNamespace(value=value),
    "object": Plain,
    "method": lambda value: Plain(value).__init__,
    "closure": function_of,
    "slots": Slots,
    "small slots": WithoutWeakReferences,
    "dict of one's own": lambda value: Dict(value=value),
    "ordered": lambda value: collections.OrderedDict(value=value),
    "view": lambda value: {"key": value}.values(),
    "iterator": lambda value: iter([value]),
    "objects in an array": lambda value: np.array([value, None], dtype=object),
}


@pytest.mark.parametrize("seed", range(300))
def test_values_that_differ_anywhere_have_other_contents_or_none(seed):
    draw = random.Random(seed)
    wrappers = [draw.choice(list(WRAPPERS)) for _ in range(draw.randrange(1, 5))]
    leaves = draw.sample([1, 1.0, True, -0.0, 0.0, "a", b"a", None, 1j, np.float32(1), torch.float32, range(3)], 2)
    values = []
    for leaf in leaves:
        for name in wrappers:
            leaf = WRAPPERS[name](leaf)
        values.append(leaf)
    contents = [content(value) for value in values]
    seen = not any(isinstance(found, Unseen) for found in contents)
    assert contents == [content(value) for value in values]
    assert not seen or contents[0] != contents[1]
    hidden = {"slots", "small slots", "dict of one's own", "ordered", "view", "iterator", "objects in an array"}
    assert not seen or not hidden & set(wrappers)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.value.append(1),
        lambda value: setattr(value, "other", 1),
        lambda value: setattr(Plain, "scale", 2),
        lambda value: setattr(Plain, "method", lambda self: 1),
    ],
)
def test_a_change_of_an_object_or_its_class_shows(change, monkeypatch):
    monkeypatch.setattr(Plain, "scale", 1)
    monkeypatch.setattr(Plain, "method", None, raising=False)
    value = Plain([0])
    before = content(value)
    assert content(copy.deepcopy(value)) == before
    change(value)
    assert content(value) != before


def test_not_a_number_equals_itself():
    assert content([float("nan")]) == content([float("nan")])


def test_containers_that_hold_themselves():
    values = [[1], [2]]
    for value in values:
        value.append(value)
    assert content(values[0]) == content(values[0]) != content(values[1])


def test_contents_keep_nothing_alive_and_a_freed_object_equals_none():
    module, function, tensor = nn.ReLU(), lambda: 0, torch.ones(2)
    found = content([module, function, tensor, Plain(module)])
    assert found == content([module, function, tensor, Plain(module)])
    freed = [weakref.ref(each) for each in (module, function, tensor)]
    del module, function, tensor
    gc.collect()
    assert [each() for each in freed] == [None] * 3
    assert found != content([nn.ReLU(), lambda: 0, torch.ones(2), Plain(nn.ReLU())])


@pytest.mark.parametrize("most", [4000, 5000])
def test_long_values_are_seen_as_a_whole_or_not_at_all(most):
    values = list(range(most))
    found = content(values)
    values[most // 2] = -1
    assert isinstance(found, Unseen) == (most > 4096) and (isinstance(found, Unseen) or found != content(values))
