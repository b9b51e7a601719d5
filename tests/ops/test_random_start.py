"""The random start: values, independence of layout and threads, distribution, errors."""

import math

import numpy as np
import pytest
import torch
from helpers.tolerances import assert_close
from torch import Tensor

from sparse_adv.ops import random_start, reference
from sparse_adv.ops.pgd_step import NORMS

EPS = 8 / 255
SHAPES = [(3, 5, 9, 7), (1, 1, 1, 1), (70, 3, 16, 16), (5, 3), (7,), ()]
SEEDS = [(0, 0), (-1, 3), (123456789012345, 2**32 - 2), (2**63 - 1, -2)]


def clean_images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def middle_grey(*shape: int) -> Tensor:
    """Images that noise does not move out of the range, so that the noise can be computed from the difference."""
    return torch.full(shape, 0.5, dtype=torch.float64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_reference_is_philox(counter, key, expected):
    """The test vectors that the authors of Philox4x32-10 publish with Random123."""
    words, keys = ([torch.tensor([word]) for word in words] for words in (counter, key))
    assert reference.philox_rounds(words, keys).tolist() == [expected]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linf_equals_the_reference_bit_for_bit(dtype, shape, seed):
    clean, words = clean_images(*shape, dtype=dtype), torch.tensor(seed)
    assert torch.equal(random_start(clean, EPS, seed=words), reference.random_start(clean, words, EPS))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_l2_equals_the_reference(dtype, shape, seed):
    clean, words = clean_images(*shape, dtype=dtype), torch.tensor(seed)
    assert_close(random_start(clean, 0.5, norm="l2", seed=words), reference.random_start(clean, words, 0.5, "l2"))


def test_linf_in_float64_equals_the_reference():
    clean, words = clean_images(3, 5, 9, 7, dtype=torch.float64), torch.tensor([1, 2])
    assert_close(random_start(clean, EPS, seed=words), reference.random_start(clean, words, EPS))


@pytest.mark.parametrize("norm", NORMS)
def test_layout_does_not_change_the_values(norm):
    clean = clean_images(3, 5, 9, 7)
    expected = random_start(clean, EPS, norm=norm)
    sliced = torch.cat([clean, clean], dim=3)[..., :7]
    for other in (clean.to(memory_format=torch.channels_last), clean.permute(3, 1, 0, 2).clone().permute(2, 1, 3, 0)):
        start = random_start(other, EPS, norm=norm)
        assert torch.equal(start, expected) and start.stride() == other.stride()
    assert torch.equal(random_start(sliced, EPS, norm=norm), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_result_does_not_depend_on_the_number_of_threads(norm):
    clean = clean_images(70, 3, 33, 31)
    threads = torch.get_num_threads()
    try:
        starts = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            starts.append(random_start(clean, EPS, norm=norm))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_keeps_its_noise_in_a_larger_batch(norm):
    clean = clean_images(9, 3, 5, 5)
    assert torch.equal(random_start(clean, EPS, norm=norm)[:4], random_start(clean[:4], EPS, norm=norm))


def test_an_offset_skips_blocks_of_the_stream():
    clean = middle_grey(1, 40)
    here, further = (random_start(clean, EPS, seed=torch.tensor([5, offset])) for offset in (0, 3))
    assert torch.equal(here[:, 12:], further[:, :-12])


def test_equal_seeds_give_equal_starts_and_others_do_not():
    clean = clean_images(2, 3, 8, 8)
    assert torch.equal(random_start(clean, EPS, seed=7), random_start(clean, EPS, seed=torch.tensor([7, 0])))
    for seed in (np.int64(7), np.uint8(7)):
        assert torch.equal(random_start(clean, EPS, seed=seed), random_start(clean, EPS, seed=7))
    for norm in NORMS:
        assert not torch.equal(random_start(clean, EPS, norm=norm, seed=7), random_start(clean, EPS, norm=norm, seed=8))


def test_one_number_is_drawn_from_a_generator():
    clean = clean_images(2, 3, 8, 8)
    before = torch.get_rng_state()
    generator, twin = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    start = random_start(clean, EPS, seed=generator)
    assert torch.equal(start, random_start(clean, EPS, seed=twin))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(start, random_start(clean, EPS, seed=generator))


def kolmogorov(sample: Tensor) -> float:
    """sqrt(n) times the largest distance between the sample's distribution and U(0, 1); above 1.95 once in 1000."""
    ordered = sample.flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    return (len(ordered) ** 0.5 * (ordered - steps).abs().max()).item()


def test_linf_noise_is_uniform():
    clean = middle_grey(64, 3, 16, 16)
    noise = random_start(clean, EPS, seed=11) - clean
    assert kolmogorov((noise / EPS + 1) / 2) < 1.95
    neighbours = torch.corrcoef(noise.flatten()[: 49152 - 1].unfold(0, 2, 1).T)[0, 1]
    assert abs(neighbours) < 4 / 49152**0.5


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 2), (3, 8, 8)])
def test_l2_noise_is_uniform_in_the_ball(size):
    clean = middle_grey(4000, *size)
    noise = (random_start(clean, 0.25, norm="l2", seed=11) - clean).flatten(1)
    radius = noise.norm(dim=1) / 0.25
    assert_close(radius.clamp(min=1), torch.ones_like(radius))
    assert kolmogorov(radius ** noise.shape[1]) < 1.95  # the share of the ball's volume inside
    if noise.shape[1] == 2:
        assert kolmogorov(torch.atan2(noise[:, 1], noise[:, 0]) / (2 * math.pi) + 0.5) < 1.95
    assert (noise.mean(0).abs() < 5 * 0.25 / (4000 * noise.shape[1]) ** 0.5).all()


def test_noise_stays_in_the_ball_and_the_range():
    clean = clean_images(16, 3, 16, 16)
    start = random_start(clean, EPS)
    eps = torch.tensor(EPS)
    assert ((start >= clean - eps) & (start <= clean + eps)).all()
    assert start.min() >= 0 and start.max() <= 1
    wide = random_start(clean, 2 * EPS, lo=-math.inf, hi=math.inf)
    assert wide.min() < 0 and wide.max() > 1


@pytest.mark.parametrize("norm", NORMS)
def test_empty_batch_and_detached_output(norm):
    assert random_start(torch.empty(0, 3, 8, 8), EPS, norm=norm).shape == (0, 3, 8, 8)
    assert not random_start(torch.rand(2, 3, requires_grad=True), EPS, norm=norm).requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    clean, seed = clean_images(2, 3, 5, 4), torch.tensor([1, 2])
    for images in (clean, clean.to(memory_format=torch.channels_last), clean[..., ::2]):
        torch.library.opcheck(torch.ops.sparse_adv.random_start.default, (images, seed, EPS, norm == "l2", 0.0, 1.0))


def test_compiles_as_one_graph():
    clean, seed = clean_images(2, 3, 8, 8), torch.tensor([1, 2])
    compiled = torch.compile(lambda x, s: random_start(x, EPS, seed=s), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(clean, seed), random_start(clean, EPS, seed=seed))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"clean": torch.zeros(2, 3, dtype=torch.uint8)}, TypeError, "clean must be a floating point tensor"),
        ({"eps": -1.0}, ValueError, "eps must not be negative or NaN, got -1.0"),
        ({"eps": math.inf}, ValueError, "eps must be finite, got inf"),
        ({"norm": "inf"}, ValueError, 'norm must be "linf" or "l2", got \'inf\''),
        ({"lo": 2.0}, ValueError, "lo must not exceed hi, got lo=2.0 and hi=1.0"),
        ({"seed": 2**64}, ValueError, "seed must fit in a signed 64-bit integer, got 18446744073709551616"),
        ({"seed": 0.5}, TypeError, "seed must be an int, an int64 tensor .* got 0.5"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[2\] .* got \(3,\)"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must be an int64 tensor, got torch.float32"),
    ],
)
def test_bad_input_is_reported_by_name_and_value(change, error, message):
    with pytest.raises(error, match=message):
        random_start(**{"clean": torch.rand(2, 3), "eps": EPS, **change})


@pytest.mark.parametrize("seed", [torch.zeros(1, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1).long()])
def test_the_raw_op_refuses_unsafe_arguments(seed):
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor"):
        torch.ops.sparse_adv.random_start(torch.rand(2, 3), seed, EPS, False, 0.0, 1.0)
