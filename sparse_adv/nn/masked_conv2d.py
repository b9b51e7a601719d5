"""`MaskedConv2d`: a convolution layer whose weight is sparse under a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t
from torch.optim import Optimizer

from sparse_adv.masks import largest_block
from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.masked_layer import MaskedLayer, check_own_weight, check_shape
from sparse_adv.ops import Pattern, chosen_paths, compile_pattern, masked_conv2d, pack_pattern, set_kernels
from sparse_adv.ops.masked_conv2d_mask import check_block, check_mask, obeys

PASSES = ("forward", "grad_input", "grad_weight")


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """`nn.Conv2d` that keeps only the weights under a mask, and takes time accordingly.

    `y = conv2d(x, weight * weight_mask) + bias`. The Parameter is `weight`, as in `nn.Conv2d`, with zeros where
    pruned; the mask is the bool buffer `weight_mask`, true = kept. Pruned weights, their gradients and the momentum of
    `torch.optim`'s optimisers stay exactly zero (`sparse_adv/nn/optimizer_hook.py` says how). Whoever writes values
    into `weight` by hand calls `set_mask(layer.weight_mask)` afterwards.

    Loading a dense state dict keeps the mask and zeroes the weight by it; one of `nn.utils.prune` loads too.
    `torch.optim.swa_utils.AveragedModel` works as it is; its `use_buffers=True` cannot average bool tensors.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in `nn.Conv2d`.
        block: the mask's block shape `(bo, bi)` or `(bo, bi, br, bs)`: see `sparse_adv.ops.compile_pattern`.
        mask: bool tensor [K, C/groups, R, S]; None keeps everything.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    block: tuple[int, int, int, int]
    choices: dict[str, Any] | None
    """What `nn.tune` measured here, None before; it holds for one mask, so a new mask drops it."""

    _dense = nn.Conv2d
    _derived = ("_pattern", "_tuned_pattern", "_deterministic_pattern", "_seen", "_constant")
    _own = ("block", "choices")

    _pattern: Pattern | None
    _tuned_pattern: Pattern | None
    _deterministic_pattern: Pattern | None
    _constant: tuple[Tensor, Tensor | None, Pattern] | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: str | _size_2_t = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        block: Sequence[int] = (1, 1),
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        self._adopt(mask, check_block(block))

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor, block: Sequence[int] = (4, 4)) -> Self:
        """Make a masked layer of a dense one, with the same Parameter objects; pruned weights become 0 in place.

        Raises:
            TypeError: if `conv` is not a plain Conv2d with its own weight.
            ValueError: if the mask has another shape than the weight, or does not obey the block.
        """
        check_convertible(conv)
        block4 = check_block(block)
        return cls.around(conv, mask, block4, pattern_of(conv, mask, block4))

    @classmethod
    def around(cls, conv: nn.Conv2d, mask: Tensor, block: tuple[int, int, int, int], pattern: Pattern) -> Self:
        """`from_dense` after all checks, with the pattern at hand; a masked layer is kept and takes the mask over."""
        layer = cls._shell(conv)
        layer._adopt(mask, block, pattern)
        return layer

    def set_mask(self, mask: Tensor, optimizer: Optimizer | None = None, block: Sequence[int] | None = None) -> None:
        """Change the mask: weights that it prunes become 0, weights that it revives start at 0.

        Args:
            mask: bool tensor of the weight's shape.
            optimizer: its momentum (and whatever else it keeps) of pruned weights becomes 0 now; without it, that
                happens before its next step.
            block: the mask's block; None keeps the present one if the mask obeys it, else takes the largest
                supported one that it obeys.

        Raises:
            ValueError: if the mask has another shape than the weight, or does not obey the block.
        """
        check_mask(mask)
        block4 = check_block(block) if block is not None else self._fitting_block(mask)
        self._adopt(mask, block4, pattern_of(self, mask, block4))
        if optimizer is not None:
            optimizer_hook.settle(optimizer)

    @property
    def pattern(self) -> Pattern:
        """The compiled mask, with the choice of kernels.

        Under `torch.use_deterministic_algorithms` nothing measured counts, and grad_weight is always the sparse kernel:
        oneDNN's dense one gives other bits with another number of threads.
        """
        assert self._pattern is not None, "a layer on the meta device has no pattern"
        if torch.are_deterministic_algorithms_enabled():
            assert self._deterministic_pattern is not None
            return self._deterministic_pattern
        return self._tuned_pattern or self._pattern

    def choose_paths(self, choices: Mapping[str, Any]) -> None:
        """Fix which kernel each pass takes: `choices[pass]["path"]` is "sparse" or "dense"; see `nn.tune`."""
        assert self._pattern is not None, "a layer on the meta device has no pattern"
        self._tuned_pattern = set_kernels(self._pattern, **{name: choices[name]["path"] for name in PASSES})
        self.choices = dict(choices)
        self._constant = None

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]`, or `[C, H, W]`."""
        if not torch.compiler.is_compiling():
            self._refresh()
        if self._pattern is None:
            return super().forward(input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        weight, bias, pattern = self._constant or (self.weight, self.bias, self.pattern)
        input, padding = self.padded(input)
        return masked_conv2d(input, weight, pattern, bias, self.stride, padding, self.dilation, self.groups)

    def paths(self, input: Tensor) -> dict[str, str]:
        """Which kernel each pass takes for an input: "sparse" or "dense"."""
        device = self.weight.device.type
        reduced = self.weight.dtype != torch.float32 or torch.is_autocast_enabled(device)
        if device not in ("cpu", "cuda") or (device == "cpu" and reduced):
            return dict.fromkeys(PASSES, "dense")
        x, padding = self.padded(input)
        shape = x.shape if x.dim() == 4 else (1, *x.shape)
        return chosen_paths(self.pattern, shape, self.stride, padding, self.dilation)

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with whatever padding is not plain zeros, the same on both sides; and the padding that is."""
        left, right, top, bottom = widths = list(self._reversed_padding_repeated_twice)
        if self.padding_mode != "zeros":
            return F.pad(input, widths, mode=self.padding_mode), (0, 0)
        if left != right or top != bottom:
            return F.pad(input, widths), (0, 0)
        return input, (top, left)

    def extra_repr(self) -> str:
        density = "" if self.weight_mask.is_meta else f", density={self.density:.4g}"
        return f"{super().extra_repr()}{density}, block={self.block}"

    def _constants(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Pattern]:
        device = weight.device.type
        if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            # Cast here, and autocast has nothing left to cast in each pass.
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return weight, bias, pack_pattern(self.pattern, weight)

    def _fitting_block(self, mask: Tensor) -> tuple[int, int, int, int]:
        return self.block if obeys(mask, self.block) else largest_block(mask)

    def _adopt(self, mask: Tensor, block: tuple[int, int, int, int], pattern: Pattern | None = None) -> None:
        """Take a mask over, with its pattern if that is at hand."""
        self._store_mask(mask)
        self.block = block
        if pattern is None and not self.weight_mask.is_meta:
            pattern = pattern_of(self, mask, block)
        self._pattern, self._tuned_pattern, self.choices = pattern, None, None
        self._settle()

    def _compiled_mask(self) -> Tensor | None:
        return self._pattern.mask if self._pattern else None

    def _compile(self) -> None:
        if self._pattern is not None:
            self.choices = None
        self.block = self._fitting_block(self.weight_mask)
        self._pattern, self._tuned_pattern = pattern_of(self, self.weight_mask, self.block), None
        if self.choices is not None:
            self.choose_paths(self.choices)

    def _forget(self) -> None:
        self._pattern = self._tuned_pattern = None

    def _settle(self) -> None:
        self._deterministic_pattern = (
            None if self._pattern is None else set_kernels(self._pattern, grad_weight="sparse")
        )
        super()._settle()


def pattern_of(conv: nn.Conv2d, mask: Tensor, block: Sequence[int]) -> Pattern:
    """The pattern of a mask for this convolution, on its device; raises ValueError if they do not fit."""
    check_mask(mask)
    check_shape(mask, conv.weight)
    # A copy, or the pattern would share the buffer's memory and never be seen to differ from it.
    return compile_pattern(mask.to(conv.weight.device, copy=True), block, conv.groups)


def check_convertible(conv: nn.Module) -> None:
    """Raises TypeError if no masked layer can stand in for this module."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"only a Conv2d can become a MaskedConv2d, got {type(conv).__name__}")
    kind = type(conv)
    if not isinstance(conv, MaskedConv2d) and (
        kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise TypeError(f"{kind.__name__} computes its output in its own way, only plain Conv2d layers can be masked")
    check_own_weight(conv)
