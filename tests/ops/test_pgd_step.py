"""The attack step: values, layouts, threads and instruction sets, errors."""

import math
import os
import subprocess
import sys

import pytest
import torch
from helpers.tolerances import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_adv.ops import pgd_step, pgd_step_, random_start, reference
from sparse_adv.ops.pgd_step import NORMS

ALPHA, EPS = 2 / 255, 8 / 255
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1),
    "sliced": lambda x: torch.cat([x, torch.full_like(x, -7)], dim=3)[..., : x.shape[3]],
}


def images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """adv, grad and clean, with zeros and NaNs in grad and some of adv outside the ball."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.rand(shape, generator=generator, dtype=torch.float64)
    adv = (clean + 0.03 * torch.randn(shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad[torch.rand(shape, generator=generator) < 0.05] = 0
    grad[torch.rand(shape, generator=generator) < 0.05] = math.nan
    return adv.to(dtype), grad.to(dtype), clean.to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_linf_equals_the_reference_bit_for_bit(dtype, layout):
    adv, grad, clean = (LAYOUTS[layout](t) for t in images(3, 5, 9, 7, dtype=dtype))
    expected = reference.pgd_step(adv, grad, clean, ALPHA, EPS)
    assert torch.equal(pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_equals_the_reference(dtype, layout):
    adv, grad, clean = (LAYOUTS[layout](t) for t in images(3, 5, 9, 7, dtype=dtype))
    for alpha, eps in ((0.2, 0.5), (0.2, 100.0), (-0.2, 0.0), (0.2, math.inf)):
        expected = reference.pgd_step(adv, grad, clean, alpha, eps, "l2")
        assert_close(pgd_step(adv, grad, clean, alpha=alpha, eps=eps, norm="l2"), expected)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=5),
    norm=st.sampled_from(NORMS),
    alpha=st.floats(-1, 1),
    eps=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_every_shape_equals_the_reference(shape, norm, alpha, eps, seed):
    adv, grad, clean = images(*shape, seed=seed)
    step = pgd_step(adv, grad, clean, alpha=alpha, eps=eps, norm=norm)
    expected = reference.pgd_step(adv, grad, clean, alpha, eps, norm)
    if norm == "linf":
        assert torch.equal(step, expected)
    else:
        assert_close(step, expected)


def test_many_images_equal_the_reference():
    adv, grad, clean = images(70, 3, 33, 31)
    assert torch.equal(
        pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS), reference.pgd_step(adv, grad, clean, ALPHA, EPS)
    )
    assert_close(
        pgd_step(adv, grad, clean, alpha=0.2, eps=0.5, norm="l2"), reference.pgd_step(adv, grad, clean, 0.2, 0.5, "l2")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradient_of_another_dtype_equals_the_reference(dtype):
    adv, grad, clean = images(2, 3, 8, 8)
    grad = grad.to(dtype)
    assert torch.equal(
        pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS), reference.pgd_step(adv, grad, clean, ALPHA, EPS)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", ["adv", "grad", "clean"])
def test_values_that_are_not_finite_are_treated_as_in_the_reference(place, value, norm):
    tensors = dict(zip(("adv", "grad", "clean"), images(2, 3, 5, 5), strict=True))
    tensors[place][0, 0] = value
    step, expected = (f(**tensors, alpha=ALPHA, eps=EPS, norm=norm) for f in (pgd_step, reference.pgd_step))
    tolerance = 0 if norm == "linf" else 1e-6
    torch.testing.assert_close(step, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_without_a_gradient_images_do_not_move(norm, value):
    _, _, clean = images(2, 3, 5, 5)
    assert torch.equal(pgd_step(clean, torch.full_like(clean, value), clean, alpha=ALPHA, eps=EPS, norm=norm), clean)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e38])
def test_l2_direction_does_not_depend_on_the_gradients_size(size):
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, 8, 8, generator=generator)
    grad = torch.randint(-2, 3, clean.shape, generator=generator).float()
    assert_close(
        pgd_step(clean, grad * size, clean, alpha=0.2, eps=0.5, norm="l2"),
        pgd_step(clean, grad, clean, alpha=0.2, eps=0.5, norm="l2"),
    )


@pytest.mark.parametrize("norm", NORMS)
def test_an_infinite_eps_projects_nothing(norm):
    clean = torch.full((1, 1, 2, 2), 0.5)
    adv = clean + 0.25
    moved = pgd_step(adv, torch.ones_like(adv), clean, alpha=0.125, eps=math.inf, norm=norm)
    assert torch.equal(moved, adv + (0.125 if norm == "linf" else 0.0625))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_strides_of_empty_like(norm, layout):
    adv, grad, clean = images(3, 5, 9, 7)
    adv = LAYOUTS[layout](adv)
    step = pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS, norm=norm)
    assert step.stride() == torch.empty_like(adv).stride()
    assert_close(step, pgd_step(adv.contiguous(), grad, clean, alpha=ALPHA, eps=EPS, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_in_place_writes_what_the_function_returns(norm, layout, dtype):
    adv, grad, clean = images(3, 5, 9, 7, dtype=dtype)
    adv = LAYOUTS[layout](adv)
    expected = pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS, norm=norm)
    assert pgd_step_(adv, grad, clean, alpha=ALPHA, eps=EPS, norm=norm) is adv
    assert torch.equal(adv, expected)


def test_the_op_in_place_writes_nothing_outside_a_slice():
    _, grad, clean = images(3, 5, 9, 7)
    whole = torch.full((3, 5, 9, 14), -7.0)
    pgd_step_(whole[..., ::2], grad, clean, alpha=ALPHA, eps=EPS)
    assert (whole[..., 1::2] == -7).all() and (whole[..., ::2] != -7).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["clean", "grad"])
def test_adv_may_be_clean_or_grad_itself(norm, layout, dtype, name):
    both, other, _ = (LAYOUTS[layout](image.nan_to_num().to(dtype)) for image in images(2, 3, 8, 8))
    grad, clean = (other, both) if name == "clean" else (both, other)
    expected = pgd_step(both.clone(), grad.clone(), clean.clone(), alpha=20 * EPS, eps=EPS, norm=norm)
    assert torch.equal(pgd_step_(both, grad, clean, alpha=20 * EPS, eps=EPS, norm=norm), expected)


def test_autograd_detects_the_write_in_place():
    adv, grad, clean = images(2, 3, 8, 8)
    weight = torch.ones_like(adv, requires_grad=True)
    product = weight * adv
    pgd_step_(adv, grad, clean, alpha=ALPHA, eps=EPS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_output_is_detached():
    adv, grad, clean = images(2, 3, 8, 8)
    assert not pgd_step(adv.requires_grad_(), grad, clean, alpha=ALPHA, eps=EPS).requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch(norm):
    empty = torch.empty(0, 3, 8, 8)
    assert pgd_step(empty, empty, empty, alpha=ALPHA, eps=EPS, norm=norm).shape == empty.shape
    assert pgd_step_(empty, empty, empty, alpha=ALPHA, eps=EPS, norm=norm) is empty


@pytest.mark.parametrize("norm", NORMS)
def test_result_does_not_depend_on_the_number_of_threads(norm):
    tensors = images(70, 3, 33, 31)
    threads = torch.get_num_threads()
    try:
        steps = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            steps.append(pgd_step(*tensors, alpha=ALPHA, eps=EPS, norm=norm))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(steps[0], steps[1]) and torch.equal(steps[0], steps[2])


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_sets_equal_the_reference(capability):
    """Runs the comparisons with the reference, also those of random_start, in a process with fewer instructions."""
    run = (
        "import sys, pytest; from sparse_adv.ops import cpu_capability\n"
        "print('uses', cpu_capability())\n"
        "chosen = ['-k', 'equal and reference and not sets', '-q', '-p', 'no:cacheprovider']\n"
        "sys.exit(pytest.main([*chosen, *sys.argv[1:]]))"
    )
    here = os.path.dirname(os.path.abspath(__file__))
    files = [os.path.join(here, f"test_{op}.py") for op in ("pgd_step", "random_start")]
    variable = {"portable": "default"}.get(capability, capability)
    result = subprocess.run(
        [sys.executable, "-c", run, *files],
        env={**os.environ, "ATEN_CPU_CAPABILITY": variable, "HYPOTHESIS_PROFILE": "few"},
        capture_output=True,
        text=True,
        cwd=os.path.dirname(here),
    )
    if f"uses {capability}\n" not in result.stdout and result.returncode == 0:
        pytest.skip(f"this processor has no {capability}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(norm, layout):
    tensors = [LAYOUTS[layout](t) for t in images(2, 3, 5, 4)]
    numbers = (ALPHA, EPS, norm == "l2", 0.0, 1.0)
    torch.library.opcheck(torch.ops.sparse_adv.pgd_step.default, (*tensors, *numbers))
    torch.library.opcheck(torch.ops.sparse_adv.pgd_step_.default, (*tensors, *numbers))


def test_compiles_as_one_graph():
    adv, grad, clean = images(2, 3, 8, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(adv: Tensor, grad: Tensor, clean: Tensor) -> Tensor:
        return pgd_step_(pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS), grad, clean, alpha=ALPHA, eps=EPS)

    once = pgd_step(adv, grad, clean, alpha=ALPHA, eps=EPS)
    assert torch.equal(twice(adv, grad, clean), pgd_step(once, grad, clean, alpha=ALPHA, eps=EPS))


X = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": X[:1]}, ValueError, r"grad has shape \(1, 3, 4, 4\)"),
        ({"clean": X[..., :2]}, ValueError, r"clean has shape \(2, 3, 4, 2\)"),
        ({"adv": X.long()}, TypeError, "adv must be a floating point tensor, got torch.int64"),
        ({"grad": X.long()}, TypeError, "grad must be a floating point tensor, got torch.int64"),
        ({"grad": None}, TypeError, "grad must be a tensor, got NoneType"),
        ({"clean": X.double()}, TypeError, "clean is torch.float64, adv is torch.float32"),
        ({"grad": X.to("meta")}, ValueError, "grad is on meta, adv on cpu"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite, got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite, got inf"),
        ({"eps": -0.1}, ValueError, "eps must not be negative or NaN, got -0.1"),
        ({"eps": math.nan}, ValueError, "eps must not be negative or NaN, got nan"),
        ({"alpha": 10**400}, ValueError, "alpha must be finite, got 1000.*000, which no float holds"),
        ({"alpha": "0.1"}, TypeError, "alpha must be a number, got '0.1'"),
        ({"alpha": True}, TypeError, "alpha must be a number, got True"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"eps": torch.ones(2)}, TypeError, r"eps must be a number, got a tensor of shape \(2,\)"),
        ({"eps": "a" * 5000}, TypeError, "eps must be a number, got .{0,40}$"),
        ({"hi": 1j}, TypeError, "hi must be a number, got 1j"),
        ({"norm": "l1"}, ValueError, 'norm must be "linf" or "l2", got \'l1\''),
        ({"lo": 1.0, "hi": 0.0}, ValueError, r"lo must not exceed hi, got lo=1.0 and hi=0.0"),
    ],
)
@pytest.mark.parametrize("step", [pgd_step, pgd_step_])
def test_bad_input_is_reported_by_name_and_value(step, change, error, message):
    arguments = {"adv": X.clone(), "grad": X, "clean": X, "alpha": ALPHA, "eps": EPS}
    with pytest.raises(error, match=message):
        step(**{**arguments, **change})


def test_the_op_in_place_refuses_tensors_that_it_cannot_write():
    x = torch.rand(20)
    for overlapping in (x[:4].expand(3, 4), x.as_strided((3, 4), (2, 1)), x.as_strided((3, 4), (3, 2))):
        with pytest.raises(ValueError, match=r"several elements of adv share memory \(strides \(\d, \d\)\): clone"):
            pgd_step_(overlapping, torch.rand(3, 4), torch.rand(3, 4), alpha=ALPHA, eps=EPS)
    with pytest.raises(ValueError, match="adv requires grad"):
        pgd_step_(X.clone().requires_grad_(), X, X, alpha=ALPHA, eps=EPS)


@pytest.mark.parametrize("norm", NORMS)
def test_the_op_in_place_refuses_operands_that_it_would_change(norm):
    memory, other = torch.rand(3, 8), torch.rand(2, 8)
    for name, tensors in {"clean": (other, memory[1:]), "grad": (memory[1:], other)}.items():
        with pytest.raises(ValueError, match=f"adv and {name} share a part of their memory: clone one"):
            pgd_step_(memory[:2], *tensors, alpha=ALPHA, eps=EPS, norm=norm)
    elements = torch.rand(31)
    ends = elements[:16].view(2, 8), elements[15:].view(2, 8)  # one element is shared
    for adv, clean in (ends, ends[::-1]):
        with pytest.raises(ValueError, match="adv and clean share a part"):
            pgd_step_(adv, other, clean, alpha=ALPHA, eps=EPS, norm=norm)
    with pytest.raises(ValueError, match="adv and grad share a part"):
        pgd_step_(memory[:2], memory.flatten()[:16].view(8, 2).T, other, alpha=ALPHA, eps=EPS, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
def test_the_op_in_place_takes_operands_beside_adv_in_one_memory(norm):
    memory = torch.rand(2, 8, 3)
    adv, grad, clean = (memory[..., i] for i in range(3))
    expected = pgd_step(adv, grad, clean, alpha=0.2, eps=0.5, norm=norm)
    assert torch.equal(pgd_step_(adv, grad, clean, alpha=0.2, eps=0.5, norm=norm), expected)
    interleaved = torch.rand(8).as_strided((2, 2), (3, 2))  # elements 0, 2, 3 and 5
    expected = pgd_step(interleaved, other := torch.rand(2, 2), other, alpha=0.2, eps=0.5, norm=norm)
    assert torch.equal(pgd_step_(interleaved, other, other, alpha=0.2, eps=0.5, norm=norm), expected)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_views_with_the_negative_bit(norm, place):
    plain = [torch.rand(2, 3) for _ in range(3)]
    tensors = list(plain)
    tensors[place] = torch.complex(torch.zeros(2, 3), -plain[place]).conj().imag
    assert tensors[place].is_neg()
    expected = pgd_step(*plain, alpha=0.2, eps=0.5, norm=norm)
    assert torch.equal(pgd_step(*tensors, alpha=0.2, eps=0.5, norm=norm), expected)
    assert torch.equal(pgd_step_(*tensors, alpha=0.2, eps=0.5, norm=norm), expected)
    assert torch.equal(tensors[0], expected)


@pytest.mark.parametrize(
    "tensors", [(X, X[:1], X), (X, X, X[..., :2]), (X, X.long(), X), (X.long(), X, X), (X.bool(), X, X)]
)
def test_the_raw_op_refuses_unsafe_arguments(tensors):
    for op in (torch.ops.sparse_adv.pgd_step, torch.ops.sparse_adv.pgd_step_):
        with pytest.raises(RuntimeError, match="sparse_adv: "):
            op(*tensors, ALPHA, EPS, False, 0.0, 1.0)


@pytest.mark.parametrize(("name", "norm"), [("Linf", "linf"), ("L2", "l2")])
def test_a_norm_has_both_spellings(name, norm):
    adv, grad, clean = torch.rand(3, 2, 3, 4, 4)
    stepped = pgd_step(adv, grad, clean, alpha=0.1, eps=0.2, norm=norm)
    assert pgd_step(adv, grad, clean, alpha=0.1, eps=0.2, norm=name).equal(stepped)
    assert pgd_step_(adv.clone(), grad, clean, alpha=0.1, eps=0.2, norm=name).equal(stepped)
    assert random_start(clean, 0.2, norm=name, seed=5).equal(random_start(clean, 0.2, norm=norm, seed=5))
