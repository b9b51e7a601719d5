"""Sides are timed in turns."""

import itertools

import pytest
import timing
import torch
from helpers.cpu_graphs import CpuCapturer
from timing import Times


def test_each_side_runs_once_to_warm_up_and_then_in_every_round():
    calls = []
    sides = {name: lambda name=name: calls.append(name) for name in ("ours", "rival")}
    assert timing.interleaved(sides, rounds=3).keys() == sides.keys()
    assert calls == ["ours", "rival"] * 4


def test_quantiles_of_the_times(monkeypatch):
    seconds = itertools.accumulate(itertools.chain.from_iterable((1.0, float(time)) for time in range(1, 10)))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(seconds))  # the rounds take 1, 2, ... 9 s
    times = timing.interleaved({"ours": lambda: None}, rounds=9)["ours"]
    assert times == Times(median=5.0, q20=2.0, q80=8.0)
    assert times.spread == pytest.approx(6.0 / 5.0)


def test_one_round_has_no_spread():
    assert timing.interleaved({"ours": lambda: None}, rounds=1)["ours"].spread == 0


@pytest.fixture
def graphs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(timing, "Capturer", lambda: CpuCapturer(torch.device("cpu")))


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_captured_side_keeps_what_its_graph_reads():
    """Such as the model of an update that nothing else refers to: a GPU would read freed memory, and once crashed."""

    def side():
        weight = torch.ones(3)
        return timing.captured(lambda: weight * 2, calls=1)

    assert side()().tolist() == [2.0] * 3


@pytest.mark.usefixtures("graphs_on_the_cpu")
def test_a_captured_side_returns_its_last_result():
    """An epoch of captured updates adds up their losses."""
    x = torch.zeros(())
    replay = timing.captured(lambda: x.add_(1) * 2, calls=3)
    x.zero_()
    assert [float(replay()) for _ in range(2)] == [6.0, 12.0]
