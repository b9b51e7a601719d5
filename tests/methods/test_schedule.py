"""When masks change, and to which density."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_adv.methods import MethodConfig, Schedule


def due(schedule: Schedule, updates: int) -> list[int]:
    return [step for step in range(1, updates + 1) if schedule.is_due(step - 1, step)]


@pytest.mark.parametrize(
    ("method", "more", "expected"),
    [
        ("static", {}, []),
        ("static", {"dense_epochs": 0.5}, [5]),
        ("set", {}, [8, 16, 24, 32]),
        ("flying-bird", {"change_until": 0.5}, [8, 16]),
        ("rigl", {}, [8, 16, 24]),
        ("rigl", {"dense_epochs": 1}, [10, 16, 24]),
        ("gmp", {}, [8, 16, 24, 30]),
        ("gmp", {"dense_epochs": 2, "change_until": 1}, [20, 24, 32, 40]),
        ("gmp", {"change_until": 0, "interval": 100}, [1]),
        ("set", {"interval": 100}, []),
    ],
)
def test_masks_change_at_multiples_of_the_interval(method, more, expected):
    schedule = Schedule(MethodConfig(method, **{"interval": 8} | more), epochs=4, steps_per_epoch=10)
    assert due(schedule, 40) == expected


@settings(deadline=None, max_examples=100)
@given(
    method=st.sampled_from(["flying-bird", "rigl", "set", "gmp", "static"]),
    interval=st.integers(1, 12),
    until=st.floats(0, 1),
    dense=st.sampled_from([0.0, 0.25, 1.0, 3.0]),
    jumps=st.lists(st.integers(1, 15), min_size=1, max_size=12),
)
def test_a_jump_over_several_updates_is_due_if_one_of_them_is(method, interval, until, dense, jumps):
    config = MethodConfig(method, interval=interval, change_until=until, dense_epochs=dense)
    schedule, before = Schedule(config, epochs=3, steps_per_epoch=10), 0
    for jump in jumps:
        each = [schedule.is_due(step, step + 1) for step in range(before, before + jump)]
        assert schedule.is_due(before, before + jump) == any(each)
        before += jump


@pytest.mark.parametrize("dense_epochs", [0, 20])
def test_the_dropped_fraction_follows_half_a_cosine(dense_epochs):
    """Evci et al. 2020, section 3: f(t) = alpha / 2 (1 + cos(pi t / T_end)), here from the first update with masks."""
    config = MethodConfig("rigl", drop_fraction=0.4, dense_epochs=dense_epochs)
    schedule, first = Schedule(config, epochs=100, steps_per_epoch=10), 10 * dense_epochs
    for step in (0, 100, 200, 375, 749, 750, 900):
        t = min(max(0, step - first), 750 - first)
        expected = 0.2 * (1 + math.cos(t * math.pi / (750 - first)))
        assert schedule.drop_fraction(step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["static", "rigl", "gmp"])
@pytest.mark.parametrize("dense_epochs", [0.0, 0.001])
@pytest.mark.parametrize("until", [0.0, 0.05])
def test_a_share_of_less_than_an_update_is_one_update(method, dense_epochs, until):
    """Else a run would train without masks to its end, and say nothing."""
    schedule = Schedule(MethodConfig(method, density=0.1, dense_epochs=dense_epochs, change_until=until), 2, 5)
    if method == "gmp" or dense_epochs:
        assert schedule.is_due(0, 1) and schedule.density(1) == 0.1
    assert schedule.last <= 1


def test_gmp_follows_the_cubic_schedule():
    """Zhu and Gupta 2017, equation 1: s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3, here with s_i = 0."""
    schedule = Schedule(MethodConfig("gmp", density=0.1, dense_epochs=10, change_until=0.6), 100, 10)
    s_f, t_0, end = 0.9, 100, 600
    for step in (100, 101, 200, 350, 599, 600):
        sparsity = s_f + (0 - s_f) * (1 - (step - t_0) / (end - t_0)) ** 3
        assert schedule.density(step) == pytest.approx(1 - sparsity, abs=1e-12)
    assert schedule.density(0) == 1 and schedule.density(999) == pytest.approx(0.1)


def test_shares_of_the_updates_are_the_nearest_integer():
    """0.29 * 100 is less than 29 in binary numbers."""
    first = [Schedule(MethodConfig("static", dense_epochs=hundredths / 100), 3, 100).first for hundredths in range(300)]
    assert first == list(range(300))
    for hundredths in range(101):
        share = hundredths / 100
        schedule = Schedule(MethodConfig("flying-bird-plus", change_until=share, adapt_from=share), 1, 100)
        assert schedule.last == schedule.adapt_after == hundredths


def test_an_update_is_left_for_the_masks():
    for dense_epochs in (1.94, 1.96, 1.99):  # 9.7 updates and more, rounded to 10 of 10
        schedule = Schedule(MethodConfig("set", dense_epochs=dense_epochs), 2, 5)
        assert schedule.first == 9 and due(schedule, 10) == [9]
