"""The bodies of the CUDA kernels, compiled for the host and run thread by thread (cuda_on_host.cpp).

This proves indices, tails and arithmetic where there is no GPU; `benchmarks/gpu_check.sh` proves the rest on one.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.tolerances import assert_close, assert_equal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_adv.ops import reference

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # numbered as in cuda_on_host.cpp


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler: the native part could not have been built without one"
    library = tmp_path_factory.mktemp("host") / "cuda_on_host.so"
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    source = str(Path(__file__).with_name("cuda_on_host.cpp"))
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized"]
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]  # alignment and overflow included
    command = [compiler, "-std=c++20", "-O0", *warnings, *checks, "-shared", "-fPIC", *include, source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def at_an_address(images: Tensor, aligned: bool) -> Tensor:
    """A contiguous copy that lies on 16 bytes, or just beside."""
    memory = images.new_empty(images.numel() + 1)
    return memory[0 if aligned else 1 :][: images.numel()].view(images.shape).copy_(images)


def numbers(dtype: torch.dtype) -> ctypes.c_int:
    return ctypes.c_int(DTYPES.index(dtype))


def doubles(*values: float) -> ctypes.Array:
    return (ctypes.c_double * len(values))(*values)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 300))
dtypes = st.sampled_from(DTYPES)


@given(shapes, dtypes, dtypes, st.booleans(), st.booleans(), st.integers(0, 1000))
def test_the_linf_step_is_the_reference_bit_for_bit(host, shape, image_dtype, grad_dtype, aligned, in_place, seed):
    generator = torch.Generator().manual_seed(seed)
    clean, adv = (torch.rand(2, *shape, generator=generator) * 1.2 - 0.1).to(image_dtype)
    grad = torch.randn(shape, generator=generator).to(grad_dtype)
    grad.view(-1)[seed % grad.numel()] = (0.0, torch.nan, torch.inf, -torch.inf)[seed % 4]
    clean.view(-1)[seed // 2 % clean.numel()] = (0.5, torch.nan)[seed % 2]
    sizes = (0.03, 0.07, 0.0, 1.0)
    expected = reference.pgd_step(adv, grad, clean, *sizes[:2], "linf", *sizes[2:])
    adv, grad, clean = (at_an_address(images, aligned) for images in (adv, grad, clean))
    out = adv if in_place else at_an_address(torch.empty_like(adv), aligned)
    step = map(pointer, (adv, grad, clean, out))
    count = ctypes.c_int64(shape[1])
    host.host_pgd_step(
        numbers(image_dtype), numbers(grad_dtype), aligned, -1, *step, ctypes.c_int64(shape[0]), count, doubles(*sizes)
    )
    assert_equal(out, expected)


@given(shapes, dtypes, dtypes, st.booleans(), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_the_l2_step_is_the_reference(host, shape, image_dtype, grad_dtype, cached, whole, in_place, seed):
    images, count = shape[0], shape[1] // 8 * 8 + 8 if whole else shape[1]
    generator = torch.Generator().manual_seed(seed)
    clean, adv = torch.rand(2, images, count, generator=generator).to(image_dtype)
    grad = torch.randn(images, count, generator=generator).to(grad_dtype)
    grad[0, seed % count] = (0.5, torch.nan, torch.inf, -torch.inf)[seed % 4]
    grad[-1] *= seed % 3  # 0: no direction, nothing moves
    sizes = (0.8, (0.5, 5.0, float("inf"))[seed % 3], 0.0, 1.0)
    expected = reference.pgd_step(adv, grad, clean, *sizes[:2], "l2", *sizes[2:])
    adv, grad, clean = (at_an_address(tensor, whole) for tensor in (adv, grad, clean))
    out = adv if in_place else at_an_address(torch.empty_like(adv), whole)
    step = map(pointer, (adv, grad, clean, out))
    cached_vectors = 4 if cached and count <= 4 * 32 else 0
    host.host_pgd_step(
        numbers(image_dtype),
        numbers(grad_dtype),
        whole,
        cached_vectors,
        *step,
        ctypes.c_int64(images),
        ctypes.c_int64(count),
        doubles(*sizes),
    )
    assert_close(out, expected, "elementwise")


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 30), dtypes, st.booleans())
def test_the_step_that_normalises_is_the_reference(host, images, channels, area, grad_dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    adv, clean, grad = (torch.rand(3, images, channels, area, 1) - 0.1).unbind()
    grad = (grad - 0.5).to(grad_dtype)
    adv, clean, grad = (tensor.contiguous(memory_format=layout) for tensor in (adv, clean, grad))
    mean, std = torch.rand(2, channels) + 0.1
    sizes = (0.03, 0.07, 0.0, 1.0)
    out, normalized = torch.empty_like(adv), torch.empty(images, area, channels, dtype=torch.bfloat16)
    host.host_pgd_step_normalized(
        numbers(grad_dtype),
        channels_last,
        *map(pointer, (adv, grad, clean, out, mean, std, normalized)),
        *map(ctypes.c_int64, (images, channels, area)),
        doubles(*sizes),
    )
    expected = reference.pgd_step_normalized(adv, grad, clean, mean, std, *sizes)
    assert_equal(out, expected[0])
    assert_equal(normalized.transpose(1, 2).unsqueeze(3), expected[1])


@given(shapes, dtypes, st.booleans(), st.sampled_from(("linf", "l2")), st.integers(-(2**63), 2**62))
def test_random_starts_are_those_of_the_cpu(host, shape, dtype, aligned, norm, key):
    clean = at_an_address(torch.rand(shape, generator=torch.Generator().manual_seed(key % 1000)).to(dtype), aligned)
    seed = torch.tensor([key, key // 3])
    expected = torch.ops.sparse_adv.random_start(clean, seed, 0.3, norm == "l2", 0.0, 1.0)
    out = at_an_address(torch.empty_like(clean), aligned)
    host.host_random_start(
        numbers(dtype),
        aligned,
        norm == "l2",
        pointer(clean),
        pointer(out),
        ctypes.c_int64(shape[0]),
        ctypes.c_int64(shape[1]),
        (ctypes.c_int64 * 2)(*seed.tolist()),
        doubles(0.3, 0.0, 1.0),
    )
    if norm == "linf" and dtype != torch.float64:  # there an FMA may round otherwise
        assert_equal(out, expected)
    else:
        assert_close(out, expected, "elementwise")
