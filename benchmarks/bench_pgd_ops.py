"""The ops of a PGD attack in one process: `bench_pgd_step.py`, `bench_pgd_step_normalized.py`, `bench_random_start.py`.

    python benchmarks/bench_pgd_ops.py [--device cuda] [--out FILE.csv]

For gpu_check.sh: PyTorch and its compiler start once instead of three times, which takes them 10 s and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import bench_pgd_step
import bench_pgd_step_normalized
import bench_random_start
import harness


def main(arguments: Sequence[str] | None = None) -> None:
    options = harness.start(harness.argument_parser(__doc__, tuple(bench_pgd_step.SHAPES)), arguments)
    benchmarks = (bench_pgd_step, bench_pgd_step_normalized, bench_random_start)
    cases = chain.from_iterable(benchmark.cases(options.device, options.quick) for benchmark in benchmarks)
    harness.measure(cases, options)


if __name__ == "__main__":
    main()
