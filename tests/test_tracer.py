"""Tracing while other threads use models."""

import threading

import pytest
import torch
from torch import nn

from sparse_adv.tracer import Tracer


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.Flatten()).eval()


def test_other_threads_run_and_trace_models_meanwhile():
    model, other, x = network(), network(), torch.rand(2, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
    call, lookup = nn.Module.__call__, nn.Module.__getattr__
    done, failures, runs = threading.Event(), [], []

    def run() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    runs.append(torch.equal(model(x), expected))
        except Exception as error:
            failures.append(error)

    def trace(traced: nn.Module) -> None:
        try:
            for _ in range(30):
                nodes = Tracer().trace(traced).nodes
                assert [n.op for n in nodes] == ["placeholder"] + 4 * ["call_module"] + ["output"]
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=trace, args=(each,)) for each in (other, model)]
    runner = threading.Thread(target=run)
    runner.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    runner.join()
    assert not failures and runs and all(runs)
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is lookup


class Counts(nn.Module):
    def forward(self, x):
        return x * len(x)


def test_the_place_of_an_error_is_the_innermost_module():
    tracer = Tracer()
    with pytest.raises(RuntimeError):
        tracer.trace(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU(), Counts()), nn.ReLU()))
    assert tracer.place == "module '1.1' (Counts)"
    tracer = Tracer()
    tracer.trace(network())
    assert tracer.place == "the model"
