"""The ops of a PGD attack in one process: `bench_pgd_step.py`, `bench_pgd_step_normalized.py`, `bench_random_start.py`.

    python benchmarks/bench_pgd_ops.py [--device cuda] [--out FILE.csv]

For gpu_check.sh: PyTorch and its compiler start once instead of three times; each start takes 10 s and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import bench_pgd_step
import bench_pgd_step_normalized
import bench_random_start
import harness
from harness import Case


def cases(device: str, quick: bool) -> Iterator[Case]:
    for benchmark in (bench_pgd_step, bench_pgd_step_normalized, bench_random_start):
        yield from benchmark.cases(device, quick)


main = partial(harness.main, cases, __doc__, devices=tuple(bench_pgd_step.SHAPES))


if __name__ == "__main__":
    main()
