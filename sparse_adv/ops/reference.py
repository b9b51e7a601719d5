"""The ops in plain PyTorch: the specification.

Tests, benchmarks and `doctor` compare with it, and it runs where a transform of PyTorch needs formulas.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_adv.ops.arguments import Pair


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The convolution with the weights kept by the mask, then scale, bias, residual and ReLU."""
    output = F.conv2d(input, _masked(weight, mask), None, stride, padding, dilation, groups)
    return pointwise(output, scale, bias, residual, relu=relu)


def pointwise(
    input: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    """Scale, bias, residual, then ReLU or a gate, which is a bool tensor here."""
    output = input
    if scale is not None:
        output = output * scale[:, None, None]
    if bias is not None:
        output = output + bias[:, None, None]
    if residual is not None:
        output = output + residual
    if gate is not None:
        output = output.where(gate, 0)
    return output.relu() if relu else output


def batch_norm_act(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """BatchNorm with the statistics of the batch, then residual and ReLU."""
    output = F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return pointwise(output, residual=residual, relu=relu)


def masked_conv2d_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    mask: Tensor,
    input_size: tuple[int, ...],
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """The gradient of the convolution with respect to its input, then residual and gate."""
    grad_input = conv2d_input(input_size, _masked(weight, mask), grad_output, stride, padding, dilation, groups)
    return pointwise(grad_input, residual=residual, gate=gate)


def masked_conv2d_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    mask: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """The gradient of the convolution with respect to its weight, 0 where the mask is false."""
    size = tuple(mask.shape)
    return _masked(conv2d_weight(input, size, grad_output, stride, padding, dilation, groups), mask)


def pgd_step(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    alpha: float,
    eps: float,
    norm: str = "linf",
    lo: float = 0.0,
    hi: float = 1.0,
) -> Tensor:
    """One step of projected gradient ascent; norms are computed in float64, 16-bit images in float32."""
    dtype = _working(adv)
    step, working = (_step_linf, dtype) if norm == "linf" else (_step_l2, torch.float64)
    moved = step(adv.to(working), grad.to(dtype).to(working), clean.to(working), alpha, eps)
    return moved.to(dtype).clamp(lo, hi).to(adv.dtype)


def pgd_step_normalized(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The images after a linf step, and the same images normalised, in bfloat16."""
    moved = pgd_step(adv, grad, clean, alpha, eps, "linf", lo, hi)
    return moved, ((moved - mean[:, None, None]) / std[:, None, None]).bfloat16()


def _step_linf(adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float) -> Tensor:
    return (adv + alpha * grad.sign()).clamp(clean - eps, clean + eps)


def _step_l2(adv: Tensor, grad: Tensor, clean: Tensor, alpha: float, eps: float) -> Tensor:
    slope = grad.where(grad.isfinite(), 0)
    length = _norm(slope)
    moved = adv + alpha * (slope / length).where(length > 0, 0)
    offset = moved - clean
    distance = _norm(offset)
    return moved.where(distance <= eps, clean + offset * (eps / distance))


def random_start(
    clean: Tensor, seed: Tensor, eps: float, norm: str = "linf", lo: float = 0.0, hi: float = 1.0
) -> Tensor:
    """The images with uniform noise in the ball, drawn from Philox with `seed`, int64 [2]: key and offset."""
    dtype = _working(clean)
    key, offset = seed
    elements = _stream(clean.numel(), key, offset, stream=0)
    if norm == "linf":
        radius = torch.tensor(eps, dtype=dtype, device="cpu").double()
        noise = radius * ((elements >> 8).double() * 2.0**-23 - 1)
        return (clean.double() + noise.view(clean.shape)).to(dtype).clamp(lo, hi).to(clean.dtype)
    samples = clean.shape[0] if clean.dim() else 1
    if samples == 0 or clean.numel() == 0:
        return torch.empty_like(clean)
    direction = _normal(clean.numel(), key, offset).view(samples, -1)
    direction = direction / direction.norm(dim=1, keepdim=True)
    radius = eps * _unit(_stream(samples, key, offset, stream=1)) ** (1 / direction.shape[1])
    noise = (radius[:, None] * direction).view(clean.shape)
    return (clean.double() + noise).to(dtype).clamp(lo, hi).to(clean.dtype)


def philox(counter: Tensor, stream: int, key: Tensor) -> Tensor:
    """Philox4x32-10: the words, int64 [n, 4], below 2**32, of counters [n] of 64 bits with `stream` as third word."""
    zeros = torch.zeros_like(counter)
    words = [counter & _LOW32, (counter >> 32) & _LOW32, zeros + stream, zeros]
    return philox_rounds(words, [key & _LOW32, (key >> 32) & _LOW32])


def philox_rounds(words: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Philox's ten rounds on four counter words and two key words, int64 tensors of values below 2**32."""
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, words[0])
        high1, low1 = _multiply32(0xCD9E8D57, words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & _LOW32, (keys[1] + 0xBB67AE85) & _LOW32]
    return torch.stack(words, dim=-1)


_LOW32 = 0xFFFFFFFF


def _multiply32(factor: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low 32 bits of a product, computed in halves: int64 cannot hold an unsigned 64-bit product."""
    high = ((factor >> 16) * words + ((factor & 0xFFFF) * words >> 16)) >> 16
    return high, (factor * words) & _LOW32


def _stream(count: int, key: Tensor, offset: Tensor, stream: int) -> Tensor:
    """The words that elements 0 ... count - 1 read."""
    return philox(torch.arange((count + 3) // 4, device="cpu") + offset, stream, key).flatten()[:count]


def _unit(words: Tensor) -> Tensor:
    return (words.double() + 1) * 2.0**-32


def _normal(count: int, key: Tensor, offset: Tensor) -> Tensor:
    """Normal numbers by Box-Muller on neighbouring words."""
    first, second = _unit(_stream((count + 1) // 2 * 2, key, offset, stream=0)).view(-1, 2).unbind(1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()[:count]


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The masked weight, by `where` and not by a product: a pruned NaN must count as 0."""
    return weight.where(mask, 0)


def _norm(images: Tensor) -> Tensor:
    """The l2 norm of each image of a batch, in a shape that broadcasts against it."""
    dims = tuple(range(1, images.dim()))
    return torch.linalg.vector_norm(images, dim=dims, keepdim=True) if dims else images.abs()


def _working(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32
