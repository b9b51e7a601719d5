"""What the engine has made of models is made once, kept for the last states and freed with the model."""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
from torch import nn

from sparse_adv.engine.state_cache import StateCache


def test_the_value_of_a_state_is_made_once_and_the_least_recently_used_one_is_forgotten():
    cache, model, made = StateCache(capacity=2), nn.ReLU(), []

    def find(state):
        return cache.find(model, lambda: state, lambda: made.append(state) or len(made))

    assert [find(state) for state in "abab"] == [1, 2, 1, 2]
    find("a")
    find("c")  # b was used least recently
    assert [find("a"), find("c")] == [1, 3] and made == list("abc")
    assert find("b") == 4


def test_models_do_not_share_values_and_a_freed_one_leaves_none():
    cache, first, second = StateCache(capacity=1), nn.ReLU(), nn.ReLU()
    kept = weakref.ref(cache.find(first, lambda: "eval", nn.Identity))
    other = weakref.ref(cache.find(second, lambda: "eval", nn.Identity))
    assert kept() is cache.find(first, lambda: "eval", nn.Tanh) is not other()
    del first
    gc.collect()
    assert kept() is None and other() is not None


def test_a_value_is_found_while_another_is_made():
    cache, model, other = StateCache(capacity=1), nn.ReLU(), nn.Tanh()
    cache.find(model, lambda: "eval", lambda: 1)
    found = []

    def make():
        thread = threading.Thread(target=lambda: found.append(cache.get(model, "eval")))
        thread.start()
        thread.join(timeout=60)
        return 2

    assert cache.find(other, lambda: "eval", make) == 2 and found == [1]


def test_a_value_that_refers_to_its_model_is_freed_with_it():
    cache, model = StateCache(capacity=1), nn.ReLU()
    reference = weakref.ref(model)
    cache.find(model, lambda: "eval", reference)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_have_none_of_the_values(copied):
    cache, model = StateCache(capacity=2), nn.Linear(2, 2)
    cache.find(model, lambda: "eval", lambda: lambda: model)  # no pickle could hold it
    assert [cache.find(each, lambda: "eval", lambda: 2) for each in (copied(model), copied(copied(model)))] == [2, 2]
    assert callable(cache.find(model, lambda: "eval", lambda: 3))
    assert model.state_dict().keys() == nn.Linear(2, 2).state_dict().keys()


def test_a_value_of_none_counts_and_an_error_leaves_nothing():
    cache, model = StateCache(capacity=1), nn.ReLU()
    assert cache.find(model, lambda: "eval", lambda: None) is None
    assert cache.find(model, lambda: "eval", lambda: 1) is None
    with pytest.raises(ZeroDivisionError):
        cache.find(model, lambda: "train", lambda: 1 // 0)
    assert cache.find(model, lambda: "train", lambda: 2) == 2


def test_threads_wait_for_a_value_that_another_one_is_making_and_a_maker_may_use_the_cache():
    cache, model, made = StateCache(capacity=2), nn.ReLU(), []

    def make():
        time.sleep(0.05)
        made.append(cache.find(model, lambda: "inner", lambda: 5))
        return made[-1]

    threads = [threading.Thread(target=lambda: cache.find(model, lambda: "outer", make)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [5]
