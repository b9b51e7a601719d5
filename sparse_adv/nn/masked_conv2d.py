"""`MaskedConv2d`: a convolution layer whose weight is sparse under a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NotRequired, Self, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.common_types import _size_2_t
from torch.optim import Optimizer

from sparse_adv.masks.blocks import largest_obeyed_block
from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.compiled_mask_check import header_of_mask, is_exporting
from sparse_adv.nn.dense_gradients import convolve, is_collecting, with_dense_gradient
from sparse_adv.nn.layer_checks import check_own_parameters, check_plain, check_values, check_writable
from sparse_adv.nn.masked_layer import CompiledMask, MaskedLayer, mode_of
from sparse_adv.ops import PASSES, PassPlan, Pattern, Plan, masked_conv2d, plan, set_kernels
from sparse_adv.ops.arguments import read_pair
from sparse_adv.ops.conv_geometry import geometry_of
from sparse_adv.ops.masked_conv2d_mask import Block, check_block, check_mask, check_obeys, check_shape, obeys
from sparse_adv.ops.masked_conv2d_pattern import compile_checked, pack_checked
from sparse_adv.ops.masked_conv2d_plan import REQUESTED, ROOFLINE, TABLE
from sparse_adv.ops.transforms import is_transformed


class Choice(TypedDict):
    """The kernel that `nn.tune` fixed for one pass, and the times that it measured."""

    kernel: str
    sparse_ms: NotRequired[float]
    dense_ms: NotRequired[float]


LayerChoices = dict[str, Choice]
"""The choice for each pass: "forward", "grad_input" and "grad_weight"."""


def reason_of(choice: Choice) -> str:
    """Return why `nn.tune` fixed a kernel: "tuned: 1.2 ms, dense 3.4 ms", or "given" if there are no times."""
    if "sparse_ms" not in choice or "dense_ms" not in choice:
        return "given"
    sparse, dense = f"{choice['sparse_ms']:.3g} ms", f"{choice['dense_ms']:.3g} ms"
    return f"tuned: {sparse}, dense {dense}" if choice["kernel"] == "sparse" else f"tuned: {dense}, sparse {sparse}"


@dataclass(eq=False)
class CompiledConvMask(CompiledMask):
    """A mask with its pattern in three variants, of which `MaskedConv2d.pattern` selects one."""

    pattern: Pattern
    """A static table chooses the kernel of each pass, on CUDA a roofline."""
    deterministic: Pattern
    """grad_weight always uses the sparse kernel: the bits of oneDNN's dense one depend on the number of threads."""
    tuned: Pattern | None = None
    """With the kernels that `nn.tune` fixed."""


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """`nn.Conv2d` with only the weights that a mask keeps; sparse kernels skip the others where that is faster.

    `y = conv2d(x, weight * weight_mask) + bias`. The Parameter is `weight`, as in `nn.Conv2d`, with zeros where
    pruned; the mask is the bool buffer `weight_mask`, true = kept. Pruned weights, their gradients and the momentum of
    `torch.optim`'s optimisers stay exactly zero (`sparse_adv/nn/optimizer_hook.py` explains how), also where another
    module reads `weight`. Values written into `weight` by hand where it is pruned have no effect on the layer; they are
    zeroed when `state_dict()` is read, before an optimiser's next step, or at once by `set_mask(layer.weight_mask)`.

    Loading a dense state dict keeps the mask and zeroes the pruned weights; a state dict of `nn.utils.prune` loads too.
    `torch.optim.swa_utils.AveragedModel` works, but not with `use_buffers=True`: it cannot average bool tensors.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in `nn.Conv2d`.
        block: the mask's block shape `(bo, bi)` or `(bo, bi, br, bs)`, see `sparse_adv.ops.compile_pattern`; None takes
            the largest supported one that the mask obeys.
        mask: bool tensor [K, C/groups, R, S]; None keeps everything.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if the mask has another shape than the weight, or does not obey the block; if kernel_size is 0.

    Examples:
        >>> layer = MaskedConv2d(3, 8, 3, padding=1, mask=torch.rand(8, 3, 3, 3) < 0.1)
        >>> layer(torch.rand(1, 3, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
        >>> bool((layer.weight[~layer.weight_mask] == 0).all())
        True
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    block: Block
    choices: LayerChoices | None
    """The choices that `nn.tune` fixed; None before that, and after a new mask: they were measured with the old one."""

    _dense = nn.Conv2d
    _own = ("block", "choices")

    _compiled: CompiledConvMask | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        block: Sequence[int] | None = None,
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
        block4 = check_conv_mask(self, mask, block)
        self._set_mask(mask, block4, compile_mask(self, mask, block4))

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor, block: Sequence[int] | None = None) -> Self:
        """Make a masked layer from a dense one, with the same Parameter objects; pruned weights become 0 in place.

        Args:
            conv: the dense layer, or a masked one, which gets the new mask.
            mask: bool tensor of the weight's shape.
            block: the mask's block; None takes the largest supported one that the mask obeys.

        Raises:
            TypeError: if `conv` is not a plain Conv2d with its own weight.
            ValueError: if the mask has another shape than the weight, or does not obey the block.
        """
        check_convertible(conv)
        block4 = check_conv_mask(conv, mask, block)
        return cls.from_compiled(conv, mask, block4, compile_mask(conv, mask, block4))

    @classmethod
    def from_compiled(cls, conv: nn.Conv2d, mask: Tensor, block: Block, compiled: CompiledConvMask | None) -> Self:
        """`from_dense` for a mask that has been checked and compiled; a masked layer gets the new mask."""
        layer = cls._sharing_state_of(conv)
        layer._set_mask(mask, block, compiled)
        return layer

    def set_mask(self, mask: Tensor, optimizer: Optimizer | None = None, block: Sequence[int] | None = None) -> None:
        """Change the mask: weights that it prunes become 0, weights that it revives start at 0.

        Layers that share their weight need the same mask: `sparsify` gives it to all of them.

        Args:
            mask: bool tensor of the weight's shape.
            optimizer: its momentum (and whatever else it stores) for pruned weights becomes 0 now; without it, that
                happens before its next step.
            block: the mask's block; None keeps the present block if the mask obeys it, else takes the largest supported
                one that the mask obeys.

        Raises:
            TypeError: if the weight is parametrized.
            ValueError: if the mask has another shape than the weight, or does not obey the block.
        """
        check_own_parameters(self)
        block4 = check_conv_mask(self, mask, block, self.block)
        self._set_mask(mask, block4, compile_mask(self, mask, block4))
        if optimizer is not None:
            optimizer_hook.settle(optimizer)

    @property
    def pattern(self) -> Pattern:
        """The compiled mask, with the kernels that are requested for the passes.

        Under `torch.use_deterministic_algorithms` the choices of `nn.tune` are ignored, because measured times differ
        from run to run, and grad_weight always uses the sparse kernel.
        """
        assert self._compiled is not None, "a layer on the meta device has no pattern"
        if torch.are_deterministic_algorithms_enabled():
            return self._compiled.deterministic
        return self._compiled.tuned or self._compiled.pattern

    def choose_kernels(self, choices: Mapping[str, Choice]) -> None:
        """Fix the kernel of each pass: `choices[pass]["kernel"]` is "sparse" or "dense"; see `nn.tune`."""
        assert self._compiled is not None, "a layer on the meta device has no pattern"
        kernels = {name: choices[name]["kernel"] for name in PASSES}
        self._compiled.tuned = set_kernels(self._compiled.pattern, **kernels)
        self.choices = dict(choices)
        self._frozen = {}

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `[N, C, H, W]`, or `[C, H, W]`."""
        if isinstance(input, fx.Proxy):
            return self._node(input)
        if is_transformed():  # then a mask may be batched, and has no pattern
            frozen = self.frozen_operands
            weight, bias = frozen[:2] if frozen else (self._masked_weight(), self.bias)
            return self._conv_forward(input, weight, bias)
        self.refresh()
        frozen = self.frozen_operands
        if self._compiled is None:
            return super().forward(input)
        if input.dim() == 3:
            return self.forward(input.unsqueeze(0)).squeeze(0)
        weight, bias, pattern = frozen or (self.weight, self.bias, self.pattern)
        if torch.compiler.is_compiling() and not is_exporting():
            header = header_of_mask(pattern.header, self.weight_mask, pattern.mask)
            pattern = replace(pattern, header=header)
        input, padding = self.padded(input)
        convolution = self.stride, padding, self.dilation, self.groups
        if frozen or not is_collecting(self):
            return masked_conv2d(input, weight, pattern, bias, *convolution)
        return convolve(input, with_dense_gradient(self, self._masked_weight()), bias, pattern, convolution)

    def plan(self, input: Tensor) -> Plan:
        """Which kernel each pass uses for an input, why, and how many MACs it executes: `ops.plan` for this layer.

        The reason for a kernel that `nn.tune` fixed is "tuned: 1.2 ms, dense 3.4 ms", or "given" if it came without
        times; under `torch.use_deterministic_algorithms` it is "deterministic".
        """
        x, padding = self.padded(input if input.dim() == 4 else input.unsqueeze(0))
        passes = plan(self.pattern, x, self.stride, padding, self.dilation)
        return Plan(*(self._with_reason(name, planned) for name, planned in passes._asdict().items()))

    def padded(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Apply padding that the op cannot apply: with other values than zeros, or with different widths on two sides.

        As in `nn.Conv2d`, the number of zeros is read from `padding` in each call, because code that adapts a network
        to other images sets it after construction.

        Returns:
            The input, and the padding (rows, columns) that is left for the op.
        """
        if self.padding_mode != "zeros":
            return F.pad(input, list(self._reversed_padding_repeated_twice), mode=self.padding_mode), (0, 0)
        if self.padding == "same":
            steps = read_pair("dilation", self.dilation)
            rows, cols = (step * (size - 1) for step, size in zip(steps, self.kernel_size, strict=True))
            if rows % 2 or cols % 2:
                return F.pad(input, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2)), (0, 0)
        return input, geometry_of(self).padding

    def extra_repr(self) -> str:
        density = "" if self.weight_mask.is_meta else f", density={self.density:.4g}"
        return f"{super().extra_repr()}{density}, block={self.block}"

    def _with_reason(self, pass_: str, planned: PassPlan) -> PassPlan:
        if planned.reason not in (REQUESTED, TABLE, ROOFLINE):
            return planned
        if torch.are_deterministic_algorithms_enabled():
            return planned._replace(reason="deterministic")
        if planned.reason == REQUESTED and self.choices is not None:
            return planned._replace(reason=reason_of(self.choices[pass_]))
        return planned

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if state["choices"] is not None and self._compiled is not None:
            self.choose_kernels(state["choices"])

    def _set_mask(self, mask: Tensor, block: Block, compiled: CompiledConvMask | None) -> None:
        self._write_mask(mask)
        self.block = block
        self._install(compiled)

    def _install(self, compiled: CompiledMask | None) -> None:
        if self._installed is None or compiled is not self._installed[1]:
            self.choices = None  # they were measured with another mask or on another device
        if compiled is not None:
            self.block = cast(CompiledConvMask, compiled).pattern.block
        super()._install(compiled)

    def _compile(self) -> CompiledConvMask | None:
        mask = self.weight_mask
        if mask.is_meta:
            return None
        return compile_mask(self, mask, self.block if obeys(mask, self.block) else largest_obeyed_block(mask))

    def _frozen_operands(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Pattern]:
        return weight, bias, pack_checked(self.pattern, weight)


def check_conv_mask(conv: nn.Conv2d, mask: Tensor, block: Sequence[int] | None, default: Block | None = None) -> Block:
    """Check that a mask fits a convolution.

    Args:
        block: the mask's block; None takes `default` if the mask obeys it, else the largest supported one that the mask
            obeys.

    Returns:
        The block as (bo, bi, br, bs).

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if it has another shape than the weight or no values, does not obey the block, or cannot be applied
            to the weight here; if the layer has no filter.
    """
    if 0 in conv.kernel_size:  # PyTorch can make such a layer, but not run it
        raise ValueError(f"kernel_size must be positive, got {conv.kernel_size}")
    check_mask(mask)
    check_shape(mask, conv.weight)
    check_values(mask, conv.weight)
    check_writable(conv.weight)
    if block is not None:
        block4 = check_block(block)
        if not mask.is_meta:
            check_obeys(mask, block4)
        return block4
    if mask.is_meta:  # it has no values yet; once it has, `_compile` looks for a block again
        return default or largest_obeyed_block(torch.ones(mask.shape, dtype=torch.bool, device="cpu"))
    if default is not None and obeys(mask, default):
        return default
    return largest_obeyed_block(mask)


def compile_mask(conv: nn.Conv2d, mask: Tensor, block: Block) -> CompiledConvMask | None:
    """Compile a mask that `check_conv_mask` has checked, on the layer's device; None on the meta device."""
    if conv.weight.is_meta:
        return None
    with mode_of(conv.weight):
        pattern = compile_checked(mask.to(conv.weight.device), block, conv.groups)
        return CompiledConvMask(pattern.mask, pattern, set_kernels(pattern, grad_weight="sparse"))


def check_convertible(conv: nn.Module) -> None:
    """Raises TypeError if a masked layer cannot replace this module."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"only a Conv2d can become a MaskedConv2d, got {type(conv).__name__}")
    if not isinstance(conv, MaskedConv2d):
        check_plain(conv, nn.Conv2d)
    check_own_parameters(conv)
    if conv.weight.is_complex():
        raise TypeError(f"the weight of a masked convolution is real, got {conv.weight.dtype}")
