"""The Square attack: a random search that changes one square of the image at a time and needs no gradients."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from sparse_adv.argument_types import check_count, shortened
from sparse_adv.attacks.as_module import Model
from sparse_adv.attacks.ball import Ball, ball_around, into_ball
from sparse_adv.attacks.generators import private_generator
from sparse_adv.attacks.geometry import per_image
from sparse_adv.attacks.host_attack import SeededAttack, count_setting
from sparse_adv.attacks.losses import cross_entropy
from sparse_adv.attacks.options import BasicOptions, check_settings
from sparse_adv.attacks.queries import Queries, run_search
from sparse_adv.attacks.success import advantage, robust_images
from sparse_adv.ops.arguments import check_flags

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The share of changed pixels is halved after these numbers of queries, out of `_QUERIES`."""
_QUERIES = 10000


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "linf",
    eps: float | Tensor = 8 / 255,
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    resc_schedule: bool = True,
    loss: str = "margin",
    targeted: bool = False,
    generator: torch.Generator | None = None,
    lo: float | Tensor = 0.0,
    hi: float | Tensor = 1.0,
    check: bool = True,
    engine: bool = True,
) -> Tensor:
    """Square attack: keep a random change of one square wherever it lowers z_y - max_{k!=y} z_k.

    The side of the square is the rounded root of p * height * width. p starts at p_init and is halved after 10, 50,
    200, 500, 1000, 2000, 4000, 6000 and 8000 queries, in ten thousandths of `queries`. For linf, a change sets each
    channel of the square to x - eps or x + eps, and the search starts with vertical stripes. For l2, it moves mass of
    the perturbation into the square, with values that fall off from two centres. An image is queried until it is
    adversarial. If targeted, cross-entropy with the target is lowered instead.

    Args:
        model: maps images in [lo, hi] to logits [N, classes]; no gradient of it is needed.
        images: float tensor [N, channels, height, width], the clean images.
        labels: integer tensor [N]: the true classes, or the classes to reach if targeted.
        norm: "linf" or "l2", also written "Linf" or "L2".
        eps: radius of the ball around each image, in units of the images: a number, or a float tensor [N] of one for
            each image.
        queries: forward passes for each image and restart, including the one at the start.
        p_init: share of the pixels that the first squares change, in (0, 1].
        restarts: number of searches for each image; a restart attacks the images that are still robust.
        resc_schedule: whether to scale the numbers above to `queries`; AutoAttack does not.
        loss: "margin" lowers z_y - max_{k!=y} z_k, "ce" raises the cross-entropy; both end when the class changes.
        targeted: search for images of the classes `labels` instead of images of other classes.
        generator: one number is drawn from it; None for PyTorch's global generator.
        lo, hi: range of pixel values: a number, or a float tensor [C] of one for each channel.
        check: check the values of images and labels.
        engine: whether the engine may compute the logits, see `sparse_adv.engine`.

    Returns:
        The adversarial images, detached, with shape, dtype and memory format of `images`, without slack in the ball and
        in [lo, hi]. If the search failed, the best image that it found; if the clean image is adversarial, the clean
        image.

    Raises:
        TypeError: if model cannot be called, images are not floating point or labels not integers.
        ValueError: if a value, shape or name is out of range.

    Source: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via random search"
    (ECCV 2020), algorithms 1 to 3 and equation 2. The paper does not list the halving after 500 queries, which
    torchattacks and AutoAttack have. As in the paper, a square may lie at any position; torchattacks never draws the
    last row and column, which matters on small images.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> model = models.build("digits_cnn", width=8)
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        >>> adv = attacks.square(model, images, labels, eps=0.2, queries=20)
        >>> adv.shape, bool((adv - images).abs().max() <= 0.2)
        (torch.Size([4, 1, 8, 8]), True)
    """
    check_flags(targeted=targeted, resc_schedule=resc_schedule)
    ball = ball_around(images, eps, norm, lo, hi)
    check_has_squares(images)
    check_count("queries", queries, least=1)
    check_count("restarts", restarts, least=1)
    check_settings(p_init=p_init)
    if not isinstance(loss, str) or loss not in ("margin", "ce"):
        raise ValueError(f'loss must be "margin" or "ce", got {shortened(loss)}')
    by_margin = loss == "margin" and not targeted
    draw, span = private_generator(generator, images), queries if resc_schedule else _QUERIES

    def search(model: Queries, images: Tensor, labels: Tensor) -> Tensor:
        best, least = images.clone(), images.new_full(labels.shape, torch.inf, dtype=torch.float64)
        left = robust_images(model.logits(images), labels, targeted)
        for _ in range(restarts):
            if not len(left):
                break
            attacked = images[left], labels[left], targeted, by_margin, ball.of(left)
            adv, loss, broken = _one_search(model, *attacked, queries, p_init, draw, span)
            better = broken | (loss < least[left])
            best[left[better]], least[left[better]] = adv[better], loss[better]
            left = left[~broken]
        return best

    return run_search(search, model, images, labels, lo, hi, check, engine)


class Square(SeededAttack):
    """`attacks.square` bound to a model, with the interface of torchattacks.Square.

    Args:
        model, norm, eps, p_init, loss, resc_schedule, options: as in `attacks.square`.
        n_queries, n_restarts: `queries` and `restarts` of `attacks.square`.
        seed: of the search; each call draws the same numbers.
        verbose: accepted, and without effect.

    Raises:
        ValueError: if n_queries or n_restarts is out of range; when called, as `attacks.square`.

    Examples:
        >>> import torch
        >>> from sparse_adv import attacks, models
        >>> attack = attacks.Square(models.build("digits_cnn", width=8), eps=0.2, n_queries=20)
        >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
        torch.Size([2, 1, 8, 8])
    """

    _function = staticmethod(square)
    n_queries = count_setting("n_queries", least=1)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        resc_schedule: bool = True,
        seed: int = 0,
        verbose: bool = False,
        **options: Unpack[BasicOptions],
    ) -> None:
        super().__init__(model, **options)
        self.norm, self.eps, self.p_init, self.seed = norm, eps, p_init, seed
        self.n_queries, self.n_restarts, self.resc_schedule, self.loss = n_queries, n_restarts, resc_schedule, loss

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"queries": self.n_queries}


def _one_search(
    model: Queries,
    images: Tensor,
    labels: Tensor,
    targeted: bool,
    by_margin: bool,
    ball: Ball,
    queries: int,
    p_init: float,
    draw: torch.Generator,
    span: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search once, with the schedule of `span` queries; return images, losses [N], whether they are adversarial [N]."""
    start, propose = (_start_linf, _propose_linf) if ball.norm == "linf" else (_start_l2, _propose_l2)
    adv = start(images, ball, draw)
    loss, broken = _score(model, adv, labels, targeted, by_margin)
    for query in range(1, queries):
        left = (~broken).nonzero().squeeze(1)
        if not len(left):
            break
        share = p_init / 2 ** sum(query * _QUERIES // span > halving for halving in _HALVINGS)
        current = adv[left]
        new = propose(current, images[left], share, ball.of(left), draw)
        new_loss, new_broken = _score(model, new, labels[left], targeted, by_margin)
        better = new_broken | (new_loss < loss[left])
        adv[left] = new.where(per_image(better, new), current)
        loss[left] = new_loss.where(better, loss[left])
        broken[left] = new_broken
    return adv, loss, broken


def check_has_squares(images: object) -> None:
    """Raise ValueError if this is a tensor, but not of the shape [N, channels, height, width]."""
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be [N, channels, height, width] for square, got shape {tuple(images.shape)}")


def _score(model: Queries, adv: Tensor, labels: Tensor, targeted: bool, by_margin: bool) -> tuple[Tensor, Tensor]:
    """The loss that the search lowers, in float64, and whether the images are adversarial."""
    logits = model.logits(adv).double()
    gain = advantage(logits, labels, targeted)
    entropy = cross_entropy(logits, labels)
    return -gain if by_margin else entropy if targeted else -entropy, gain > 0


def _start_linf(images: Tensor, ball: Ball, draw: torch.Generator) -> Tensor:
    """Vertical stripes, one pixel wide: each column of a channel at x - eps or x + eps."""
    count, channels, _, width = images.shape
    return into_ball(images + ball.eps * _signs((count, channels, 1, width), images, draw), images, ball)


def _propose_linf(adv: Tensor, images: Tensor, share: float, ball: Ball, draw: torch.Generator) -> Tensor:
    """Each channel of one square at x - eps or x + eps (algorithm 2)."""
    side = min(max(round(math.sqrt(share * images[0, 0].numel())), 1), *images.shape[2:])
    inside = _window(_corners(images, side, draw), images, side)
    moved = images + ball.eps * _signs((*images.shape[:2], 1, 1), images, draw)
    return into_ball(moved.where(inside, adv), images, ball)


def _start_l2(images: Tensor, ball: Ball, draw: torch.Generator) -> Tensor:
    """A grid of tiles, five along the shorter side, each a bump of the shape of the squares with a random sign."""
    count, channels, height, width = images.shape
    side = max(1, min(height, width) // 5)
    rows, columns = height // side, width // side
    signs = _signs((count, channels, rows, columns), images, draw)
    tiles = signs.repeat_interleave(side, 2).repeat_interleave(side, 3) * _bumps(side, images).repeat(rows, columns)
    top, left = (height - rows * side) // 2, (width - columns * side) // 2
    offset = torch.zeros_like(images)
    offset[:, :, top : top + rows * side, left : left + columns * side] = tiles
    return into_ball(images + ball.eps * _unit(offset, (1, 2, 3)), images, ball)


def _propose_l2(adv: Tensor, images: Tensor, share: float, ball: Ball, draw: torch.Generator) -> Tensor:
    """Move mass of the perturbation from one square, and mass that eps leaves unused, into another (algorithm 3)."""
    count, channels, height, width = images.shape
    side = min(max(round(math.sqrt(share * height * width)), 3) // 2 * 2 + 1, height, width)
    offset = adv - images
    first, second = (_corners(images, side, draw) for _ in range(2))
    either = _window(first, images, side) | _window(second, images, side)
    unused = (ball.eps**2 - offset.square().sum((1, 2, 3), keepdim=True)).clamp_min(0)
    available = ((offset.square() * either).sum((2, 3), keepdim=True) + unused / channels).sqrt()
    bumps = _unit(_bumps(side, images), (0, 1))
    upright = _signs((count, 1, 1, 1), images, draw) > 0
    bumps = bumps.where(upright, bumps.T) * _signs((count, channels, 1, 1), images, draw)
    pixels = _pixels(first, images, side)
    mass = _unit(bumps + _unit(offset[pixels], (2, 3)), (2, 3)) * available
    offset = offset.where(~_window(second, images, side), 0)
    offset[pixels] = mass
    return into_ball(images + offset, images, ball)


def _corners(images: Tensor, side: int, draw: torch.Generator) -> Tensor:
    """The upper left corner of one square in each image: row and column, int64 [2, N]."""
    room = [extent - side + 1 for extent in images.shape[2:]]
    return torch.stack([torch.randint(n, (len(images),), generator=draw, device=images.device) for n in room])


def _window(corners: Tensor, images: Tensor, side: int) -> Tensor:
    """Whether a pixel is in its image's square, bool [N, 1, height, width]."""
    inside = []
    for corner, extent in zip(corners, images.shape[2:], strict=True):
        offset = torch.arange(extent, device=images.device) - corner[:, None]
        inside.append((offset >= 0) & (offset < side))
    return inside[0][:, None, :, None] & inside[1][:, None, None, :]


def _pixels(corners: Tensor, images: Tensor, side: int) -> tuple[Tensor, ...]:
    """The index of the squares in the images: images[index] is [N, channels, side, side]."""
    count, channels = images.shape[:2]
    steps = torch.arange(side, device=images.device)
    rows, columns = corners[..., None] + steps
    index = torch.arange(count, device=images.device), torch.arange(channels, device=images.device)
    return index[0][:, None, None, None], index[1][:, None, None], rows[:, None, :, None], columns[:, None, None, :]


def _signs(shape: tuple[int, ...], images: Tensor, draw: torch.Generator) -> Tensor:
    bits = torch.randint(2, shape, generator=draw, device=images.device)
    return bits.to(images.dtype) * 2 - 1


def _unit(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x divided by its l2 norm over these dimensions; zeros stay zeros."""
    length = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return x / length.where(length > 0, 1)


def _bumps(side: int, images: Tensor) -> Tensor:
    """The shape of a change in l2, [side, side]: two adjacent bumps of opposite sign (equation 2)."""
    left = _bump(side, side // 2)
    return torch.cat([left, -_bump(side, side - side // 2)], 1).to(images)


def _bump(height: int, width: int) -> Tensor:
    """eta[r, s] = sum of 1 / (n + 1 - k)^2 over k = 0 ... M, n = height // 2, M = n - the distance from the centre."""
    n = height // 2
    heights = (1 / torch.arange(n + 1, 0, -1, dtype=torch.float64, device="cpu").square()).cumsum(0)
    rows, columns = (torch.arange(extent, device="cpu") - extent // 2 for extent in (height, width))
    return heights[(n - torch.maximum(rows.abs()[:, None], columns.abs())).clamp_min(0)]
