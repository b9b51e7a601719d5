"""Patterns: masks compiled into the index lists that the sparse kernels read.

The ops of torch take a pattern as a list of tensors, `flatten`; csrc/common/pattern_layout.h describes the list.
Everywhere else a pattern is an object with named fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from sparse_adv.argument_types import shortened
from sparse_adv.ops._library import host
from sparse_adv.ops.arguments import check_floating, check_integer, is_integer
from sparse_adv.ops.masked_conv2d_live_blocks import blocks_fit, live_blocks
from sparse_adv.ops.masked_conv2d_mask import Block, check_block, check_mask, check_obeys

_FIELDS = host.header_fields
_BLOCK_FORMAT = 2
KERNELS = ("auto", "sparse", "dense")
"""The kernels that may be requested for a pass; the header holds the index."""

CPU_DTYPE = torch.float32
"""The dtype of the sparse kernels on a CPU, and so of packed weights there."""


class Kernels(NamedTuple):
    """The kernel requested for each pass: "sparse", "dense" or "auto"."""

    forward: str = "auto"
    grad_input: str = "auto"
    grad_weight: str = "auto"


PASSES = Kernels._fields
"""The passes of a convolution: forward, grad_input and grad_weight."""


@dataclass(frozen=True, eq=False)
class Pattern(ABC):
    """A compiled mask: `compile_pattern` returns one and `masked_conv2d` takes it.

    It does not depend on the size of the images, so one pattern is valid for inputs of any size. It is either a
    `CsrPattern` or a `BlockPattern`.
    """

    header: Tensor
    """int64 [19] on the CPU: sizes, block, groups, requested kernels. Read it by the properties."""
    mask: Tensor
    """bool [K, C/groups, R, S]: true = kept."""

    @property
    def block(self) -> Block:
        """(bo, bi, br, bs)."""
        start = _FIELDS["block"]
        out, into, rows, cols = self._header[start : start + 4]
        return out, into, rows, cols

    @property
    def groups(self) -> int:
        """The convolution's groups."""
        return self._header[_FIELDS["groups"]]

    @property
    def nonzeros(self) -> int:
        """The number of weights that the mask keeps."""
        return self._header[_FIELDS["kept"]]

    @property
    def requested_kernels(self) -> Kernels:
        """The kernels that `set_kernels` requested."""
        start = _FIELDS["requested_kernel"]
        return Kernels(*(KERNELS[index] for index in self._header[start : start + 3]))

    @property
    def weight_is_masked(self) -> bool:
        """Whether the caller has promised, by `pack_pattern`, that pruned entries of the weight are 0."""
        return bool(self._header[_FIELDS["weight_is_masked"]])

    @abstractmethod
    def flatten(self) -> list[Tensor]:
        """The list of tensors that the ops of torch take; `unflatten` is its inverse."""

    @abstractmethod
    def without_values(self) -> Self:
        """The pattern without the values that `pack_pattern` added, for a call whose weight is another tensor."""

    @cached_property
    def _header(self) -> list[int]:
        return self.header.tolist()

    def _with_header(self, field: str, *values: int) -> Self:
        header, start = self.header.clone(), _FIELDS[field]
        header[start : start + len(values)] = torch.tensor(values, device="cpu")
        return replace(self, header=header)


@dataclass(frozen=True, eq=False)
class CsrPattern(Pattern):
    """The index lists of the CPU kernels: compressed sparse rows.

    Row i of the matrix has the column indices `col_indices[row_offsets[i]:row_offsets[i + 1]]`, each a (channel, tap)
    pair that a block of 1, 2 or 4 output channels reads; csrc/common/pattern_layout.h has the details. For grad_input,
    the channels that are read are the output channels of the convolution.
    """

    row_offsets: Tensor
    """int32 [rows + 1], for forward and grad_weight."""
    col_indices: Tensor
    """int32 [row_offsets[-1]]."""
    grad_input_row_offsets: Tensor
    grad_input_col_indices: Tensor
    values: Tensor | None = None
    """float32, the weight's values in the order of `col_indices`, after `pack_pattern`."""
    grad_input_values: Tensor | None = None

    def flatten(self) -> list[Tensor]:
        forward = [self.row_offsets, self.col_indices]
        grad_input = [self.grad_input_row_offsets, self.grad_input_col_indices]
        packed = [values for values in (self.values, self.grad_input_values) if values is not None]
        return [self.header, self.mask, *forward, *grad_input, *packed]

    def without_values(self) -> Self:
        return replace(self, values=None, grad_input_values=None)._with_header("weight_is_masked", 0)


@dataclass(frozen=True, eq=False)
class BlockPattern(Pattern):
    """The live blocks of a mask, which the Triton kernels read: blocks of 32 or 64 channels on a GPU.

    `LiveBlocks` describes the fields from `rows` to `grad_order`.
    """

    rows: Tensor
    blocks: Tensor
    grad_rows: Tensor
    grad_order: Tensor
    values: Tensor | None = None
    """[blocks, bo, bi], the weight's values in the order of `blocks`, after `pack_pattern`."""

    def flatten(self) -> list[Tensor]:
        packed = [] if self.values is None else [self.values]
        return [self.header, self.mask, self.rows, self.blocks, self.grad_rows, self.grad_order, *packed]

    def without_values(self) -> Self:
        return replace(self, values=None)._with_header("weight_is_masked", 0)


# A pattern may be an argument of an exported function.
torch.export.register_dataclass(CsrPattern)
torch.export.register_dataclass(BlockPattern)


def unflatten(tensors: Sequence[Tensor]) -> Pattern:
    """The pattern from the list of tensors that an op was given.

    This reads only the number of dimensions of the third tensor, because tensors have no values while a graph is
    traced.

    Raises:
        ValueError: if there are fewer than 6 or more than 8 tensors.
    """
    if not 6 <= len(tensors) <= 8:
        raise ValueError(f"pattern must be a list of 6 to 8 tensors, got {len(tensors)}")
    return BlockPattern(*tensors) if tensors[2].dim() == 2 else CsrPattern(*tensors)


def compile_pattern(mask: Tensor, block: Sequence[int] = (1, 1), groups: int = 1) -> Pattern:
    """Compile a mask into the index lists that the sparse kernels read; once per mask, not once per call.

    Args:
        mask: bool tensor [K, C/groups, R, S], true = kept; it is copied.
        block: `(bo, bi)` or `(bo, bi, br, bs)`: the mask keeps or prunes each group of bo consecutive output channels x
            bi consecutive input channels x br x bs filter taps as a whole; `(bo, bi)` means one tap. Blocks at an edge
            are smaller.
        groups: the convolution's groups.

    Returns:
        The pattern, on the mask's device: a `BlockPattern` on CUDA for blocks of 32 or 64 channels, else a
        `CsrPattern`.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if its shape, the block or the groups do not fit, or the mask does not obey the block.

    Source: this library's design page "masked_conv2d"; the lists are those of a CSR matrix.

    Examples:
        >>> mask = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
        >>> mask[0:2, 1] = True
        >>> pattern = compile_pattern(mask, block=(2, 1))
        >>> pattern.block, pattern.nonzeros
        ((2, 1, 1, 1), 18)
    """
    block4 = check_block(block)
    check_mask(mask)
    if mask.is_meta:
        raise ValueError("mask must have values, got one on the meta device")
    if not is_integer(groups) or groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"groups must divide the mask's {mask.shape[0]} output channels, got {shortened(groups)}")
    check_obeys(mask, block)
    return compile_checked(mask, block4, groups)


def compile_checked(mask: Tensor, block: Block, groups: int) -> Pattern:
    """`compile_pattern` of arguments that have been checked; raises ValueError if the mask is too large."""
    try:
        # A clone, because the pattern keeps its mask and must not change with the caller's.
        on_cpu = mask.detach().clone(memory_format=torch.contiguous_format).cpu()
        arrays = host.compile_pattern(on_cpu.numpy(), block, groups)
    except ValueError as error:
        raise ValueError(f"mask of shape {tuple(mask.shape)} cannot be compiled: {error}") from error
    # An empty array gives a tensor of stride 0 without memory, which torch.export cannot save.
    tensors = (torch.from_numpy(array) for array in arrays)
    header, *lists = (tensor if tensor.numel() else tensor.new_empty(tensor.shape) for tensor in tensors)
    pattern = CsrPattern(header, *(tensor.to(mask.device) for tensor in lists))
    return block_pattern(pattern) if mask.device.type == "cuda" and blocks_fit(block, groups, mask.shape) else pattern


def block_pattern(pattern: Pattern) -> BlockPattern:
    """List the live blocks of a pattern whose block `blocks_fit` accepts."""
    lists = live_blocks(pattern.mask, pattern.block, pattern.groups)
    return BlockPattern(pattern.header, pattern.mask, *lists)._with_header("format", _BLOCK_FORMAT)


def pack_pattern(pattern: Pattern, weight: Tensor) -> Pattern:
    """Return a pattern for calls with one weight that is 0 where pruned and does not change.

    The calls then do not mask the weight again. If a sparse kernel can read them (float32 on the CPU, blocks on CUDA),
    the pattern also gets the kept values in the kernel's order, so that calls no longer gather them. Use the result for
    the passes between two optimiser steps: it becomes invalid when the weight changes. `torch.compile` does not trace
    this function.

    Args:
        pattern: what `compile_pattern` returned for the weight's mask.
        weight: float tensor [K, C/groups, R, S] on the pattern's device, 0 where pruned.

    Returns:
        A copy of the pattern, with the values.

    Raises:
        TypeError: if `pattern` is not a `Pattern`, or the weight is not floating.
        ValueError: if the weight has another shape or device than the pattern's mask, or is not 0 where pruned.

    Examples:
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])[:, :, None, None]
        >>> pack_pattern(compile_pattern(weight != 0), weight).values
        tensor([1., 2.])
    """
    check_pattern(pattern)
    check_floating("weight", weight)
    check_fits(pattern, weight)
    if weight.device != pattern.mask.device:
        raise ValueError(f"weight is on {weight.device}, pattern on {pattern.mask.device}")
    if bool((weight.detach() != 0).logical_and_(~pattern.mask).any()):
        raise ValueError("weight must be 0 where the pattern prunes it: multiply it by the mask first")
    return pack_checked(pattern, weight)


def pack_checked(pattern: Pattern, weight: Tensor, scale: Tensor | None = None) -> Pattern:
    """`pack_pattern` for a weight that fits the pattern, without a check of its pruned entries.

    The caller must give the dense kernel a weight whose pruned entries are 0. The sparse kernel does not read them.

    Args:
        scale: factors for the values, one for each output channel, in the weight's dtype.
    """
    promised = promise_masked(pattern)
    packable = isinstance(promised, BlockPattern) or (weight.device.type == "cpu" and weight.dtype == CPU_DTYPE)
    values = torch.ops.sparse_adv.pack_values(weight.detach(), promised.flatten(), scale) if packable else []
    return unflatten([*promised.flatten(), *values])


def promise_masked(pattern: Pattern) -> Pattern:
    """A copy, without values, for calls whose weight is 0 where pruned. They mask nothing, so their plan may differ."""
    return pattern.without_values()._with_header("weight_is_masked", 1)


def set_kernels(
    pattern: Pattern, forward: str = "auto", grad_input: str = "auto", grad_weight: str = "auto"
) -> Pattern:
    """Request a kernel for each pass: "sparse", "dense", or "auto", which lets `plan` choose.

    A pass without a sparse kernel for its dtype always runs the dense one; `plan` tells.

    Args:
        pattern: what `compile_pattern` returned.
        forward, grad_input, grad_weight: the kernel of each pass.

    Returns:
        A copy of the pattern.

    Raises:
        TypeError: if `pattern` is not a `Pattern`.
        ValueError: if a kernel has another name.

    Examples:
        >>> pattern = compile_pattern(torch.ones(4, 2, 3, 3, dtype=torch.bool))
        >>> set_kernels(pattern, forward="sparse").requested_kernels
        Kernels(forward='sparse', grad_input='auto', grad_weight='auto')
    """
    check_pattern(pattern)
    request = Kernels(forward, grad_input, grad_weight)
    for name, kernel in request._asdict().items():
        if not isinstance(kernel, str) or kernel not in KERNELS:
            raise ValueError(f"{name} must be one of {', '.join(KERNELS)}, got {shortened(kernel)}")
    return pattern._with_header("requested_kernel", *(KERNELS.index(kernel) for kernel in request))


def check_pattern(pattern: Pattern) -> None:
    """Raises TypeError unless this is a compiled pattern."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be what compile_pattern returned, got {type(pattern).__name__}")


def check_fits(pattern: Pattern, weight: Tensor) -> None:
    """Raises ValueError unless the weight has the shape of the pattern's mask."""
    if weight.shape != pattern.mask.shape:
        raise ValueError(
            f"pattern was made for a weight of shape {tuple(pattern.mask.shape)}, "
            f"weight has shape {tuple(weight.shape)}"
        )


def check_groups(pattern: Pattern, groups: int) -> None:
    """Raises TypeError unless groups is an integer, and ValueError if the pattern was compiled for other groups.

    In traced code the op compares them instead.
    """
    check_integer("groups", groups)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not traced and pattern.groups != groups:
        raise ValueError(f"pattern was compiled for groups={pattern.groups}, got groups={groups}")
