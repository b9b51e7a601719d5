"""`Ball`: the images that an attack may produce, with numbers for all images or tensors for each image or channel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_adv.attacks.checks import check_has_values
from sparse_adv.attacks.geometry import distance, per_image
from sparse_adv.ops.arguments import check_number, check_tensors
from sparse_adv.ops.pgd_step import check_alpha, check_ball

Values = float | Tensor
"""One number, or a float tensor with one number for each image [N] (eps, alpha) or for each channel [C] (lo, hi)."""

_MARGIN_OF_ROUNDING = 8
"""The radius of the l2 ball is reduced by this many units of rounding, so that a rounded norm does not exceed eps."""


class Ball(NamedTuple):
    """The images that an attack may produce: within eps of the clean images in a norm, pixel values in [lo, hi].

    Its tensors have one dimension, as a user gives them, until `on` shapes them for a batch.
    """

    eps: Values
    norm: str
    lo: Values
    hi: Values

    def on(self, images: Tensor) -> Ball:
        """This ball for a batch [N, ...]: tensors get its dtype and device, and a shape that broadcasts with it.

        Where the dtype cannot hold an eps, it is rounded down.

        Raises:
            ValueError: if eps does not have one value for each image, or lo or hi one for each channel.
        """
        if not isinstance(images, Tensor):  # `check_batch` refuses it with a clearer message
            return self
        check_shapes(images, eps=self.eps, lo=self.lo, hi=self.hi)
        eps = self.eps
        if isinstance(eps, Tensor):
            eps = per_image(_rounded_down(eps.detach().to(images.device), images.dtype), images)
        bounds = (self.lo, self.hi)
        lo, hi = (of_channels(bound, images) if isinstance(bound, Tensor) else bound for bound in bounds)
        return Ball(eps, self.norm, lo, hi)

    def of(self, index: Tensor) -> Ball:
        """The ball for some of the images, selected by an index or a mask."""
        return self._replace(eps=self.eps[index]) if isinstance(self.eps, Tensor) else self

    @property
    def radii(self) -> Values:
        """eps as a number or a tensor [N]."""
        return self.eps.flatten() if isinstance(self.eps, Tensor) else self.eps

    @property
    def eps_in_words(self) -> str:
        """eps as a number, or the range of the values of all images."""
        eps = self.eps
        return f"{eps.min():g} to {eps.max():g}" if isinstance(eps, Tensor) else f"{eps:g}"

    def clamp(self, x: Tensor) -> Tensor:
        """x [n, ...] with its values clamped to [lo, hi]; the ball must be one `on` a batch."""
        lo, hi = self.lo, self.hi
        if isinstance(lo, Tensor) or isinstance(hi, Tensor):
            like_x: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
            return x.clamp(torch.as_tensor(lo, **like_x), torch.as_tensor(hi, **like_x))
        return x.clamp(lo, hi)


def ball_around(images: Tensor, eps: Values, norm: str, lo: Values, hi: Values) -> Ball:
    """Check the values of a ball and shape it for a batch, see `Ball.on`.

    Raises:
        TypeError: if eps, lo or hi is neither a number nor a float tensor of one dimension.
        ValueError: if a value is out of range, or a tensor does not have one value for each image or channel.
    """
    return checked_ball(eps, norm, lo, hi).on(images)


def checked_ball(eps: Values, norm: str, lo: Values, hi: Values) -> Ball:
    """The checked ball that a user describes; its tensors are not shaped for a batch yet.

    Raises:
        TypeError, ValueError: as `ball_around`, except for the length of tensors.
    """
    radii, lows, highs = _extremes("eps", eps), _extremes("lo", lo), _extremes("hi", hi)
    norm = check_ball(radii[0], norm, lows[0], highs[1])
    if not isinstance(lo, Tensor) or not isinstance(hi, Tensor):
        crossed = lows[1] > highs[0]
    elif len(lo) != len(hi):
        raise ValueError(f"lo and hi must have one value for each channel, got {len(lo)} and {len(hi)} values")
    else:
        crossed = bool((lo.cpu() > hi.cpu()).any())
    if crossed:
        raise ValueError(f"lo must not exceed hi, got lo={lo} and hi={hi}")
    return Ball(eps, norm, lo, hi)


def check_radius(eps: Values) -> None:
    """Raise TypeError or ValueError unless this is a radius, or a tensor with one for each image."""
    check_number("eps", _extremes("eps", eps)[0])


def check_finite_radius(eps: Values) -> None:
    """Raise ValueError unless the radius, or each image's radius, is finite."""
    if bool(eps.isinf().any()) if isinstance(eps, Tensor) else eps == torch.inf:
        raise ValueError("eps must be finite, got inf")


def step_sizes(images: Tensor, alpha: Values) -> Values:
    """Check a step size, or a tensor with one for each image; it gets a shape that broadcasts with the images.

    Raises:
        TypeError: if alpha is neither a number nor a float tensor of one dimension.
        ValueError: if a value is not finite, or a tensor does not have one value for each image.
    """
    check_alphas(alpha)
    if not isinstance(alpha, Tensor) or not isinstance(images, Tensor):
        return alpha
    check_shapes(images, alpha=alpha)
    return per_image(alpha.detach().to(images), images)


def check_alphas(alpha: Values) -> None:
    """Raise TypeError or ValueError unless this is a step size, or a tensor of step sizes."""
    for size in _extremes("alpha", alpha):
        check_alpha(size)


def check_shapes(images: Tensor, **values: Values) -> None:
    """Raise ValueError unless tensors have one value for each image (eps, alpha) or for each channel (lo, hi)."""
    for name, value in values.items():
        wanted, of = (images.shape[:1], "image") if name in ("eps", "alpha") else (images.shape[1:2], "channel")
        if isinstance(value, Tensor) and value.shape != wanted:
            raise ValueError(f"{name} must have one value for each {of}, shape {list(wanted)}, got {list(value.shape)}")


def of_channels(values: Tensor, images: Tensor) -> Tensor:
    """One number per channel [C], as a tensor like the images [N, C, ...] in a shape that broadcasts with them."""
    return values.detach().to(images).view(-1, *[1] * (images.dim() - 2))


def into_ball(adv: Tensor, images: Tensor, ball: Ball) -> Tensor:
    """The nearest images in a ball, so that `distance(result, images, norm) <= eps` without slack for rounding.

    That holds in the dtype of the images and in float64.

    Args:
        adv: float tensor [N, ...].
        images: the clean images, within the range of pixel values, with shape and dtype of adv.
        ball: the radius, the norm and the range of pixel values, `on` these images.

    Returns:
        A tensor with shape and dtype of `images`.
    """
    eps = torch.as_tensor(ball.eps, dtype=torch.float64, device=images.device)
    exact, step = images.double(), torch.finfo(images.dtype).eps
    if ball.norm == "linf":
        eps = _rounded_down(eps, images.dtype).double()
        low, high = (exact - eps).to(images.dtype), (exact + eps).to(images.dtype)
        low = low.where(exact - low.double() <= eps, low.nextafter(images))
        high = high.where(high.double() - exact <= eps, high.nextafter(images))
        return ball.clamp(adv.clamp(low, high))
    offset = adv.double() - exact
    length = per_image(torch.linalg.vector_norm(offset.flatten(1), dim=1), images)
    # Rounding the sum can move an image outside again, by more in a dtype with fewer bits.
    units, inside = _MARGIN_OF_ROUNDING, adv
    outside = (length > eps * (1 - units * step)) | (per_image(distance(adv, images, ball.norm), images) > eps)
    while bool(outside.any()):
        scale = (eps * (1 - units * step)).clamp_min(0) / length
        inside = inside.where(~outside, (exact + offset * scale).to(images.dtype))
        outside = per_image(distance(inside, images, ball.norm), images) > eps
        outside |= per_image((inside.double() - exact).flatten(1).norm(dim=1), images) > eps
        units *= 2
    return ball.clamp(inside)


def _rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    return rounded.where(rounded.double() <= values, rounded.nextafter(torch.full_like(rounded, -torch.inf)))


def _extremes(name: str, value: Any) -> tuple[Any, Any]:
    """The least and the greatest value, both NaN if one is NaN; a number counts as both."""
    if not isinstance(value, Tensor):
        return value, value
    check_tensors(**{name: value})
    check_has_values(name, value)
    if not value.is_floating_point() or value.dim() != 1:
        raise TypeError(
            f"{name} must be a number or a float tensor of one dimension, got {value.dtype} {[*value.shape]}"
        )
    if not len(value):  # for a batch without images
        return 0.0, 0.0
    least, greatest = value.detach().double().aminmax()
    return least.item(), greatest.item()
