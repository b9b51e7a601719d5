"""The convolution and its epilogue on each instruction set, each in a process, which chooses the set only once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_adv.ops import cpu_capability

SETS = {"portable": "default", "avx2": "avx2", "avx512": "avx512"}  # the values that PyTorch's variable takes
TESTS = str(Path(__file__).resolve().parents[1])


def sweep() -> None:
    """Compare all passes with the reference, for many blocks, filters and strides."""
    import torch
    from helpers.convolution_cases import BLOCKS, FILTERS, LAYOUTS, Case, block_mask
    from helpers.tolerances import assert_close, assert_equal
    from helpers.written_passes import check_forward, check_grad_input

    from sparse_adv.ops import (
        compile_pattern,
        masked_winograd_conv2d_out,
        masked_winograd_conv2d_weight,
        winograd_conv2d,
    )

    torch.set_num_threads(1)
    layouts = sorted(LAYOUTS)
    for i, filter in enumerate(FILTERS):
        for j, block in enumerate(BLOCKS):
            block = tuple({"R": filter[0], "S": filter[1]}.get(size, size) for size in block)
            case = Case(
                batch=(3, 16, 21)[j % 3],
                groups=1 + (i + j) % 2,
                group_in=9,
                group_out=10,
                filter=filter,
                stride=(1 + i % 3, 1 + j % 3),
                padding=(3, 2),
                dilation=(1 + j % 2, 1),
                block=block,
                layout=layouts[j % len(layouts)],
                seed=len(BLOCKS) * i + j,
            )
            actual, expected = case.results(case.pattern("sparse")), case.expected()
            for name, value in expected.items():
                assert_equal(actual[name], value)
    for tile in (2, 4):
        for channels in (3, 16, 37):
            x, weight = torch.randn(2, channels, 7, 9), torch.randn(channels + 1, channels, 3, 3)
            assert_close(winograd_conv2d(x, weight, tile=tile), torch.conv2d(x.double(), weight.double(), padding=1))
    for size in ((8, 32), (9, 28), (8, 8), (7, 9), (4, 4)):
        for oc_block in (1, 2, 4):
            block = oc_block, 2, 3, 3
            mask = block_mask((9, 6, 3, 3), block, 0.5)
            x, weight, out = torch.randn(3, 6, *size), torch.randn(9, 6, 3, 3), torch.empty(3, 9, *size)
            masked_winograd_conv2d_out(
                x, masked_winograd_conv2d_weight(weight, compile_pattern(mask, block)), relu=True, out=out
            )
            assert_close(out, torch.conv2d(x.double(), weight.double() * mask, padding=1).relu())
    for width in (3, 4, 7, 8, 14, 15, 24, 33):
        for layout in ("contiguous", "channels_last"):
            case = Case(18, 1, 5, 9, (5, width), layout=layout)
            check_forward(case, case.pattern("sparse"), "another tensor", relu=True)
            check_grad_input(case, case.pattern("sparse"), "out", gated=True)
            check_forward(case, case.pattern("dense"), "out", relu=True)  # ends with pointwise_out
            check_grad_input(case, case.pattern("dense"), "another tensor", gated=True)
    case = Case(37, 1, 40, 24, (19, 30), density=0.2).with_real_numbers()
    actual, expected = case.results(case.pattern("sparse")), case.expected()
    for name, value in expected.items():
        assert_close(actual[name], value)
    print(cpu_capability())


@pytest.mark.parametrize("name", SETS)
def test_forced_instruction_set_equals_the_reference(name):
    def skip_if_more_than(used: str) -> None:
        if list(SETS).index(name) > list(SETS).index(used):
            pytest.skip(f"this CPU has no {name}: {used} was used")

    if "ATEN_CPU_CAPABILITY" not in os.environ:
        skip_if_more_than(cpu_capability())
    result = subprocess.run(
        [sys.executable, "-c", "from ops.test_instruction_sets import sweep; sweep()"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": SETS[name], "PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    used = result.stdout.split()[-1]
    skip_if_more_than(used)
    assert used == name


def test_the_set_that_is_told_is_that_of_the_kernels_whatever_changes_later():
    command = (
        "import os, torch; from sparse_adv import ops; "
        "ops.random_start(torch.rand(1, 4), 0.1); "  # the first call of an op chooses
        "os.environ['ATEN_CPU_CAPABILITY'] = 'default'; print(ops.cpu_capability())"
    )
    assert subprocess.check_output([sys.executable, "-c", command], text=True).strip() == cpu_capability()


@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="ATEN_CPU_CAPABILITY chooses the set of all tests")
def test_an_unknown_name_changes_nothing():
    command = "from sparse_adv.ops import cpu_capability as f; print(f())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx1024"}
    used = subprocess.check_output([sys.executable, "-c", command], env=environment, text=True).strip()
    assert used == cpu_capability() and used in SETS
