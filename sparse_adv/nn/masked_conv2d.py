"""`MaskedConv2d`: a convolution layer whose weight is sparse under a mask."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.common_types import _size_2_t
from torch.optim import Optimizer

from sparse_adv.masks import largest_block
from sparse_adv.nn import optimizer_guard
from sparse_adv.ops import Pattern, compile_pattern, masked_conv2d, pack_pattern, set_paths
from sparse_adv.ops.pattern import check_block, check_mask, obeys

PASSES = ("forward", "grad_input", "grad_weight")

_DERIVED = ("_pattern", "_tuned_pattern", "_deterministic_pattern", "_seen", "_constant")
"""Attributes that follow from the weight and the mask: neither pickled nor copied, but computed again."""


class MaskedConv2d(nn.Conv2d):
    """`nn.Conv2d` that keeps only the weights under a mask, and takes time accordingly.

    `y = conv2d(x, weight * weight_mask) + bias`. The Parameter is `weight`, as in `nn.Conv2d`, with zeros where
    pruned; the mask is the bool buffer `weight_mask`, true = kept. Pruned weights, their gradients and the momentum of
    `torch.optim`'s optimisers stay exactly zero (`sparse_adv/nn/optimizer_guard.py` says how). Whoever writes values
    into `weight` by hand calls `set_mask(layer.weight_mask)` afterwards.

    Loading a dense state dict keeps the mask and zeroes the weight by it; one of `nn.utils.prune` loads too.
    `torch.optim.swa_utils.AveragedModel` works as it is; its `use_buffers=True` cannot average bool tensors.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in `nn.Conv2d`.
        block: the mask's block shape `(bo, bi)` or `(bo, bi, br, bs)`: see `sparse_adv.ops.compile_pattern`.
        mask: bool tensor [K, C/groups, R, S]; None keeps everything.
    """

    weight_mask: Tensor
    stride: tuple[int, int]
    dilation: tuple[int, int]
    block: tuple[int, int, int, int]
    choices: dict[str, Any] | None
    """What `nn.tune` measured here, None before; it holds for one mask, so a new mask drops it."""

    _pattern: Pattern | None
    _tuned_pattern: Pattern | None
    _deterministic_pattern: Pattern | None
    _seen: tuple[Tensor, int]
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
        if isinstance(conv, cls):
            layer = conv
        else:
            layer = cls.__new__(cls)
            layer.__dict__ = _shared_state(conv)
        layer._adopt(mask, block, pattern)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """Make a plain `nn.Conv2d` of this layer, with the same Parameter objects, zeros where pruned."""
        self._derive()
        conv = nn.Conv2d.__new__(nn.Conv2d)
        conv.__dict__ = _shared_state(self)
        for name in (*_DERIVED, "block", "choices"):
            del conv.__dict__[name]
        del conv._buffers["weight_mask"]
        optimizer_guard.unwatch(self.weight)
        return conv

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
            optimizer_guard.settle(optimizer)

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return int(self.weight_mask.count_nonzero()) / max(1, self.weight_mask.numel())

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
        self._tuned_pattern = set_paths(self._pattern, **{name: choices[name]["path"] for name in PASSES})
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

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input with whatever padding is not plain zeros, the same on both sides; and the padding that is."""
        left, right, top, bottom = widths = list(self._reversed_padding_repeated_twice)
        if self.padding_mode != "zeros":
            return F.pad(input, widths, mode=self.padding_mode), (0, 0)
        if left != right or top != bottom:
            return F.pad(input, widths), (0, 0)
        return input, (top, left)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "weight_mask" in self._buffers:  # not yet, when nn.Conv2d's constructor calls this
            self._derive()

    def extra_repr(self) -> str:
        density = "" if self.weight_mask.is_meta else f", density={self.density:.4g}"
        return f"{super().extra_repr()}{density}, block={self.block}"

    def hold_constant(self) -> bool:
        """Begin what `nn.constant_weights` describes; returns False if it had begun already."""
        if self._constant is not None:
            return False
        self._refresh()
        # Packed values are taken as they are, so zeros are made sure of, in a copy: the weight may be part of a graph.
        weight = torch.where(self.weight_mask, self.weight.detach(), 0)
        bias = None if self.bias is None else self.bias.detach()
        packable = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._constant = weight, bias, pack_pattern(self.pattern, weight) if packable else self.pattern
        return True

    def release_constant(self) -> None:
        self._constant = None

    def _fitting_block(self, mask: Tensor) -> tuple[int, int, int, int]:
        return self.block if obeys(mask, self.block) else largest_block(mask)

    def _adopt(self, mask: Tensor, block: tuple[int, int, int, int], pattern: Pattern | None = None) -> None:
        """Take a mask over, with its pattern if that is at hand."""
        if "weight_mask" in self._buffers:
            self.weight_mask.copy_(mask)
        else:
            self.register_buffer("weight_mask", mask.to(self.weight.device, copy=True))
        self.block = block
        if pattern is None and not self.weight_mask.is_meta:
            pattern = pattern_of(self, mask, block)
        self._pattern, self._tuned_pattern, self.choices = pattern, None, None
        self._settle()

    def _refresh(self) -> None:
        """Notice a mask that was written to, as loading, averaging and copying of buffers do."""
        mask = self.weight_mask
        if mask is self._seen[0] and _version(mask) == self._seen[1]:
            return
        if self._is_compiled(mask):
            self._seen = (mask, _version(mask))
        else:
            self._derive()

    def _is_compiled(self, mask: Tensor) -> bool:
        known = self._pattern[1] if self._pattern else None
        return known is not None and known.device == mask.device and torch.equal(known, mask)

    def _derive(self) -> None:
        """Compute anew all that follows from the buffer `weight_mask`."""
        mask = self.weight_mask
        if mask.is_meta:
            self._pattern = self._tuned_pattern = None
        elif not self._is_compiled(mask):
            if self._pattern is not None:
                self.choices = None
            self.block = self._fitting_block(mask)
            self._pattern, self._tuned_pattern = pattern_of(self, mask, self.block), None
            if self.choices is not None:
                self.choose_paths(self.choices)
        self._settle()

    def _settle(self) -> None:
        self._constant = None
        self._seen = (self.weight_mask, _version(self.weight_mask))
        self._deterministic_pattern = None
        if self._pattern is not None:
            self._deterministic_pattern = set_paths(self._pattern, grad_weight="sparse")
            with torch.no_grad():
                self.weight.masked_fill_(~self.weight_mask, 0)
            optimizer_guard.watch(self.weight, self._pattern[1])

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._derive()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _to_own_keys(state_dict, prefix)
        state_dict.setdefault(f"{prefix}weight_mask", self.weight_mask)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pattern = self._tuned_pattern = None
        self._derive()


def pattern_of(conv: nn.Conv2d, mask: Tensor, block: Sequence[int]) -> Pattern:
    """The pattern of a mask for this convolution, on its device; raises ValueError if they do not fit."""
    check_mask(mask)
    if mask.shape != conv.weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, weight has shape {tuple(conv.weight.shape)}")
    # A copy, or the pattern would share the buffer's memory and never be seen to differ from it.
    return compile_pattern(mask.to(conv.weight.device, copy=True), block, conv.groups)


def check_convertible(conv: nn.Module) -> None:
    """Raises TypeError if no masked layer can stand in for this module."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"only Conv2d layers can be masked, got {type(conv).__name__}")
    kind = type(conv)
    if not isinstance(conv, MaskedConv2d) and (
        kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward
    ):
        raise TypeError(f"{kind.__name__} computes its output in its own way, only plain Conv2d layers can be masked")
    if "weight" not in conv._parameters:
        raise TypeError("weight is computed from something else (nn.utils.prune or parametrize): make that permanent")


def _shared_state(module: nn.Module) -> dict[str, Any]:
    """A module's attributes for its successor: same Parameters, and same hook tables, so that hooks can be removed."""
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {name: copy.copy(value) if name in own else value for name, value in module.__dict__.items()}


def _to_own_keys(state_dict: dict[str, Any], prefix: str) -> None:
    """Rewrite `nn.utils.prune`'s keys: weight_orig and weight_mask (float), perhaps bias_orig and bias_mask."""
    mask_key = f"{prefix}weight_mask"
    if mask_key in state_dict:
        state_dict[mask_key] = state_dict[mask_key] != 0
    if f"{prefix}weight_orig" in state_dict:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}weight_orig")
    if f"{prefix}bias_orig" in state_dict:
        bias_mask = state_dict.pop(f"{prefix}bias_mask")
        state_dict[f"{prefix}bias"] = torch.where(bias_mask != 0, state_dict.pop(f"{prefix}bias_orig"), 0)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
