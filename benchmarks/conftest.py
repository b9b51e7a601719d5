"""Benchmarks as pytest tests on the CPU: `make bench` measures, plain pytest calls each side once at toy size."""

from collections.abc import Callable
from functools import lru_cache

import pytest
from harness import Case, title_of
from machine import environment, measured_peak
from pytest_benchmark.fixture import BenchmarkFixture

from sparse_adv import keep_freed_memory

peak_of_machine = lru_cache(measured_peak)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("benchmark_enable"):
        keep_freed_memory()


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Add the facts that the numbers depend on to the files of --benchmark-json and --benchmark-save."""
    machine_info.update(environment())


@pytest.fixture
def quick(benchmark: BenchmarkFixture) -> bool:
    """Whether nothing is measured: then toy sizes are enough."""
    return benchmark.disabled


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[[Case, str], None]:
    """Times one side of a case. The sides of a case form a group; its MACs, bytes and bound are extra information."""

    def run(case: Case, side: str) -> None:
        benchmark.group = title_of(case.labels)
        benchmark.extra_info.update(macs=case.macs, bytes=case.moved)
        if benchmark.enabled:
            if bound := 1e3 * peak_of_machine().seconds(case.macs, case.moved):
                benchmark.group += f", bound {bound:.3g} ms"
                benchmark.extra_info["bound_ms"] = bound
            for _ in range(case.warmup):
                case.sides[side]()
        benchmark(case.sides[side])

    return run
