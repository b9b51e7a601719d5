"""The Square attack: inside the ball, no image queried in vain, stronger with more radius, one seed one result."""

import math

import pytest
import torch
from helpers.attacked import generator
from helpers.searched import (
    assert_leaves_all_as_found,
    assert_works_at_the_edges,
    broken,
    classified,
    distances,
    least_distance,
    linear_problem,
)
from torch import nn

from sparse_adv.attacks import Square, losses, square
from sparse_adv.attacks.square import _bumps
from sparse_adv.ops.pgd_step import NORMS


@pytest.mark.parametrize("norm", NORMS)
def test_results_lie_in_ball_and_box_without_slack(norm):
    model, images, _ = classified(16)
    images[:4] = images[:4].round()  # pixels at both ends
    labels = model(images).argmax(1)
    for eps in (0.0, 8 / 255, 0.031, 0.3):
        adv = square(model, images, labels, norm=norm, eps=eps, queries=15, generator=generator())
        assert (distances(adv, images, norm) <= eps).all()
        assert adv.min() >= 0 and adv.max() <= 1
    wide = images * 4 - 2
    shifted = square(model, wide, model(wide).argmax(1), norm=norm, queries=15, lo=-2.0, hi=2.0, generator=generator())
    assert (distances(shifted, wide, norm) <= 8 / 255).all()


@pytest.mark.parametrize(("norm", "enough"), [("linf", 2.0), ("l2", 2.5)])
def test_a_linear_model_falls_soon_after_its_least_distance_and_not_before(norm, enough):
    model, images, labels = linear_problem()
    least = least_distance(model, images, labels, norm)
    for factor, expected in ((0.99, 0), (enough, len(images))):
        adv = square(model, images, labels, norm=norm, eps=factor * least, queries=2000, generator=generator())
        assert broken(model, adv, labels).sum() == expected, factor


@pytest.mark.parametrize("norm", NORMS)
def test_more_queries_and_more_restarts_break_no_fewer_images(norm):
    model, images, labels = classified(48)
    eps = 0.05 if norm == "linf" else 0.6

    def count(**budget: int) -> int:
        adv = square(model, images, labels, norm=norm, eps=eps, generator=generator(), **budget)
        return int(broken(model, adv, labels).sum())

    counts = [count(queries=queries) for queries in (1, 30, 300)]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert count(queries=10) <= count(queries=10, restarts=4)


def test_only_images_that_stand_are_queried():
    asked = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear_problem()[0]

        def forward(self, x):
            asked.append(len(x))
            return self.inner(x)

    _, images, labels = linear_problem()
    labels[:3] = (labels[:3] + 1) % 4
    adv = square(Counting(), images, labels, eps=0.1, queries=50, generator=generator(), engine=False)
    assert torch.equal(adv[:3], images[:3])
    assert asked[:2] == [8, 5] and asked == sorted(asked, reverse=True)
    assert len(asked) <= 51


def test_targets_are_reached():
    model, images, labels = linear_problem()
    targets = (labels + 1) % 4
    adv = square(model, images, targets, eps=0.3, queries=1000, targeted=True, generator=generator())
    assert torch.equal(model(adv).argmax(1), targets)


def test_one_seed_gives_one_result():
    model, images, labels = classified()
    results = [square(model, images, labels, queries=20, generator=generator()) for _ in range(2)]
    assert torch.equal(*results)
    torch.manual_seed(1)
    first = square(model, images, labels, queries=20)
    assert not torch.equal(square(model, images, labels, queries=20), first)
    torch.manual_seed(1)
    assert torch.equal(square(model, images, labels, queries=20), first)


@pytest.mark.parametrize("norm", NORMS)
def test_model_random_state_and_inputs_stay_as_they_are(norm):
    def attack(model, images, labels):
        return square(model, images, labels, norm=norm, queries=5, generator=generator())

    assert_leaves_all_as_found(attack)
    assert_works_at_the_edges(attack)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 5), (2, 9, 4)])
@pytest.mark.parametrize("norm", NORMS)
def test_images_may_be_small_and_need_not_be_square(norm, shape):
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 3))
    images = torch.rand(5, *shape)
    adv = square(model, images, torch.tensor([0, 1, 2, 0, 1]), norm=norm, eps=0.2, queries=30)
    assert (distances(adv, images, norm) <= 0.2).all()


def test_bumps_are_those_of_equation_2():
    for side in (1, 3, 5, 7):
        expected = torch.zeros(side, side)
        for first, width, sign in ((0, side // 2, 1), (side // 2, side - side // 2, -1)):
            for r in range(1, side + 1):
                for s in range(1, width + 1):
                    n = side // 2
                    m = n - max(abs(r - side // 2 - 1), abs(s - width // 2 - 1))
                    expected[r - 1, first + s - 1] = sign * sum(1 / (n + 1 - k) ** 2 for k in range(m + 1))
        assert torch.allclose(_bumps(side, torch.zeros(1)), expected)


def test_wrong_arguments_are_named():
    model, images, labels = classified()
    for words, arguments in (
        ("norm must be", {"norm": "l1"}),
        ("eps must not be negative", {"eps": -1.0}),
        ("queries must be an integer of at least 1, got 0", {"queries": 0}),
        (r"p_init must lie in \(0, 1\], got 2", {"p_init": 2}),
        ("restarts must be an integer of at least 1, got 0", {"restarts": 0}),
    ):
        with pytest.raises(ValueError, match=words):
            square(model, images, labels, **arguments)
    with pytest.raises(ValueError, match=r"images must be \[N, channels, height, width\]"):
        square(model, images.flatten(1), labels)
    with pytest.raises(ValueError, match="labels must lie in"):
        square(model, images, labels + 5)
    with pytest.raises(TypeError, match="model must be an nn"):
        square(None, images, labels)


def test_the_object_computes_what_the_function_computes():
    model, images, labels = classified()
    attack = Square(model, norm="L2", eps=0.5, n_queries=20, seed=5)
    expected = square(model, images, labels, norm="l2", eps=0.5, queries=20, generator=generator())
    assert torch.equal(attack(images, labels), expected)
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    expected = square(model, images, targets, norm="l2", eps=0.5, queries=20, targeted=True, generator=generator())
    assert torch.equal(attack(images, targets), expected)
    with pytest.raises(ValueError, match='loss must be "margin" or "ce", got \'dlr\''):
        Square(model, loss="dlr")(images, labels)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_the_result_is_the_queried_image_of_the_lowest_loss(norm, targeted):
    model, images, right = linear_problem(6)
    eps = 0.3 * least_distance(model, images, right, norm)
    with torch.no_grad():
        model.fc.weight.mul_(0.01)  # with logits so near to each other the two losses choose different images
    targets = (right + 1) % 4 if targeted else right
    chosen = []
    for x, y, radius in zip(images.split(1), targets.split(1), eps.tolist(), strict=True):
        asked = []
        result = square(
            lambda z, asked=asked: asked.append(z.clone()) or model(z),
            *(x, y),
            norm=norm,
            eps=radius,
            queries=40,
            restarts=2,
            targeted=targeted,
            generator=generator(),
        )
        queried = torch.cat(asked[1:])  # without the clean image
        assert len(queried) == 80
        margin, entropy = (loss(model(queried), y.expand(80)) for loss in (losses.margin, losses.cross_entropy))
        best, other = (entropy.argmin(), margin.argmin()) if targeted else (margin.argmax(), entropy.argmax())
        assert result.equal(queried[best][None]) and best > 0
        chosen.append(best != other)
    assert any(chosen) or not targeted


def queried(images: torch.Tensor, norm: str, share: float, **options) -> torch.Tensor:
    """[queries, N, ...]: the images of one search in which nothing is better than the start, which is the first."""
    asked = []

    def model(x):
        asked.append(x.clone())
        return torch.eye(2)[:1].expand(len(x), 2)

    labels = torch.zeros(len(images), dtype=torch.int64)
    square(model, images, labels, norm=norm, p_init=share, generator=generator(), **options)
    return torch.stack(asked[1:])  # without the clean images


@pytest.mark.parametrize(("share", "side"), [(0.8, 9), (0.25, 5), (0.05, 2), (1e-6, 1)])
def test_a_proposal_for_linf_moves_one_square_with_that_share_of_the_pixels(share, side):
    """Each channel of it to one end of the ball. With so many of them each column of the square moves in one."""
    images = torch.full((2, 32, 10, 10), 0.5)
    start, *proposals = queried(images, "linf", share, eps=0.1, queries=9, resc_schedule=False)
    for proposal in proposals:
        for before, after in zip(start, proposal, strict=True):
            rows, columns = ((before != after).any(0).any(dim).nonzero().flatten().tolist() for dim in (1, 0))
            assert len(rows) == len(columns) == side
            assert rows[-1] - rows[0] == columns[-1] - columns[0] == side - 1
            inside = after[:, rows][:, :, columns] - 0.5
            assert inside.eq(inside[:, :1, :1]).all() and inside.abs().allclose(torch.tensor(0.1))


def test_the_squares_shrink_as_the_queries_are_used():
    """In the start all rows are the same: the rows that differ from it are those of the square."""
    start, *proposals = queried(torch.full((1, 8, 64, 64), 0.5), "linf", 0.4, eps=1e-2, queries=1000)
    sides = [int((proposal != start).any(3).any(1).sum()) for proposal in proposals]
    halved = [n + 1 for n in range(1, len(sides)) if sides[n] < sides[n - 1]]
    assert len(sides) == 999 and halved == [2, 6, 21, 51, 101, 201, 401, 601, 801]  # 0.1, 0.5, 2, ... 80 % were used
    assert sorted(set(sides), reverse=True) == [round(math.sqrt(0.4 / 2**n) * 64) for n in range(10)]


def test_a_proposal_for_l2_moves_its_two_squares_alone_and_uses_what_the_range_left_unused_of_the_radius():
    """In the start the first column is cut to the range: until a square touches it, the radius is used up elsewhere."""
    images = torch.full((8, 3, 9, 9), 0.5, dtype=torch.float64)
    images[..., 0] = 1
    start, *proposals = queried(images, "l2", 0.11, eps=0.4, queries=9, resc_schedule=False)
    assert (distances(start, images, "l2") < 0.395).all()
    one = torch.ones(3, 3, dtype=torch.bool)
    squares = torch.stack([nn.functional.pad(one, (c, 6 - c, r, 6 - r)) for r in range(7) for c in range(7)])
    pairs = squares[:, None, :, 1:] | squares[..., 1:]
    away = 0
    for proposal in proposals:
        for before, after, image in zip(start, proposal, images, strict=True):
            moved = ((before - after).abs() > 1e-12).any(0)
            assert pairs.eq(moved[:, 1:]).all((2, 3)).any()
            if not moved[:, 0].any():
                torch.testing.assert_close((after - image).norm().item(), 0.4)
                away += 1
    assert away > 10
