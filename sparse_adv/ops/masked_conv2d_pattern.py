"""Patterns: masks compiled into the index lists that the sparse kernels walk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.utils import _pair

from sparse_adv.ops._library import host
from sparse_adv.ops.masked_conv2d_live_blocks import blocks_fit, live_blocks

Pattern = list[Tensor]
"""A compiled mask: what `compile_pattern` returns and `masked_conv2d` takes. Its layout: csrc/pattern_layout.h."""

_HEADER = host.header_fields
_FORMAT_OF_BLOCKS = 2
_PLAIN_LENGTH = 6  # without packed values
PATHS = ("auto", "sparse", "dense")


def compile_pattern(mask: Tensor, block: Sequence[int] = (1, 1), groups: int = 1) -> Pattern:
    """Compile a mask into the index lists that the sparse kernels walk; do it once per mask change, not per call.

    Args:
        mask: bool tensor [K, C/groups, R, S], true = kept.
        block: `(bo, bi)` or `(bo, bi, br, bs)`: all weights in a group of bo consecutive output channels x bi
            consecutive input channels x br x bs filter taps share their fate; `(bo, bi)` means one tap at a time.
            Blocks at an edge are smaller.
        groups: the convolution's groups.

    Returns:
        The pattern: a list of index tensors that name channels and taps, never image sizes.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if its shape, the block or the groups do not fit, or the mask does not obey the block.
    """
    block4 = check_block(block)
    check_mask(mask)
    if groups < 1 or mask.shape[0] % groups:
        raise ValueError(f"groups must divide the mask's {mask.shape[0]} output channels, got {groups}")
    if not obeys(mask, block4):
        raise ValueError(f"mask does not obey block {block}: some block is neither kept nor pruned as a whole")
    try:
        # A copy: the pattern keeps the mask, and must not change with the caller's.
        kept = mask.detach().clone(memory_format=torch.contiguous_format).cpu()
        arrays = host.compile_pattern(kept.numpy(), block4, groups)
    except ValueError as error:
        raise ValueError(f"mask of shape {tuple(mask.shape)} cannot be compiled: {error}") from error
    header, *lists = (torch.from_numpy(array) for array in arrays)
    pattern = [header, *(tensor.to(mask.device) for tensor in lists)]
    return block_pattern(pattern) if mask.device.type == "cuda" and blocks_fit(block4, groups, mask.shape) else pattern


def block_pattern(pattern: Pattern) -> Pattern:
    """The pattern with the lists of live blocks that the Triton kernels walk, where `blocks_fit`: format 2.

    Its tensors: header, mask, rows, blocks, grad_rows, grad_order (see `live_blocks`), and where `pack_pattern` was
    called the blocks' values [n, bo, bi].
    """
    blocks, rows, grad_rows, grad_order = live_blocks(pattern[1], block_of(pattern), groups_of(pattern))
    header = _with_header(pattern, "format", [_FORMAT_OF_BLOCKS])[0]
    return [header, pattern[1], rows, blocks, grad_rows, grad_order]


def pack_pattern(pattern: Pattern, weight: Tensor) -> Pattern:
    """Promise that the weight is 0 where pruned and stays as it is, so that calls need not mask it again.

    Where there are sparse kernels for it (float32 on the CPU, blocks on CUDA), the pattern also gets the kept values in
    the kernels' order, and calls read them instead of gathering. The result stands for this weight as long as the
    weight does not change: use it for the passes between two optimiser steps.

    Args:
        pattern: what `compile_pattern` returned for the weight's mask.
        weight: float tensor [K, C/groups, R, S] on the pattern's device, 0 where pruned.
    """
    check_pattern(pattern)
    if weight.shape != pattern[1].shape:
        raise ValueError(
            f"pattern was made for a weight of shape {tuple(pattern[1].shape)}, weight has shape {tuple(weight.shape)}"
        )
    if weight.device != pattern[1].device:
        raise ValueError(f"weight is on {weight.device}, pattern on {pattern[1].device}")
    plain = without_values(pattern)
    packable = has_blocks(plain) or (weight.device.type == "cpu" and weight.dtype == torch.float32)
    values = torch.ops.sparse_adv.pack_values(weight.detach(), plain) if packable else []
    return [_with_header(plain, "weight_is_masked", [1])[0], *plain[1:], *values]


def has_blocks(pattern: Pattern) -> bool:
    """Whether it lists live blocks, for the Triton kernels."""
    return int(pattern[0][_HEADER["format"]]) == _FORMAT_OF_BLOCKS


def block_of(pattern: Pattern) -> tuple[int, ...]:
    """(bo, bi, br, bs)."""
    return tuple(pattern[0][_HEADER["block"] : _HEADER["block"] + 4].tolist())


def groups_of(pattern: Pattern) -> int:
    return int(pattern[0][_HEADER["groups"]])


def asked_path(pattern: Pattern, pass_: int) -> str:
    """What `set_paths` fixed for a pass (0 forward, 1 grad_input, 2 grad_weight)."""
    return PATHS[int(pattern[0][_HEADER["path"] + pass_])]


def kept_of(pattern: Pattern) -> int:
    """The number of weights kept."""
    return int(pattern[0][_HEADER["kept"]])


def weight_is_masked(pattern: Pattern) -> bool:
    """Whether the caller has promised, by `pack_pattern`, that pruned entries of the weight are 0."""
    return bool(pattern[0][_HEADER["weight_is_masked"]])


def set_paths(pattern: Pattern, forward: str = "auto", grad_input: str = "auto", grad_weight: str = "auto") -> Pattern:
    """A copy of the pattern that fixes which kernel each pass takes: "sparse", "dense", or "auto", a static table.

    A pass for which there is no sparse kernel (float64, 16-bit) stays dense.
    """
    check_pattern(pattern)
    paths = (forward, grad_input, grad_weight)
    for name, path in zip(("forward", "grad_input", "grad_weight"), paths, strict=True):
        if path not in PATHS:
            raise ValueError(f"{name} must be one of {', '.join(PATHS)}, got {path!r}")
    return _with_header(pattern, "path", [PATHS.index(path) for path in paths])


def chosen_paths(
    pattern: Pattern,
    input_shape: Sequence[int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> dict[str, str]:
    """The kernel that each pass takes for input of shape [N, C, H, W]: {"forward": "sparse", ...}.

    That is for float32 on the CPU, where all other dtypes are dense, and for 16-bit images on CUDA.
    """
    check_pattern(pattern)
    groups = groups_of(pattern)
    if len(input_shape) != 4 or input_shape[1] != pattern[1].shape[1] * groups:
        raise ValueError(
            f"input_shape must be [N, {pattern[1].shape[1] * groups}, H, W] for this pattern, got {list(input_shape)}"
        )
    paths = torch.ops.sparse_adv.chosen_paths(
        pattern, list(input_shape), list(_pair(stride)), list(_pair(padding)), list(_pair(dilation))
    )
    return {name: PATHS[path] for name, path in zip(("forward", "grad_input", "grad_weight"), paths, strict=True)}


def _with_header(pattern: Pattern, field: str, values: Sequence[int]) -> Pattern:
    header = pattern[0].clone()
    start = _HEADER[field]
    header[start : start + len(values)] = torch.tensor(values)
    return [header, *pattern[1:]]


def without_values(pattern: Pattern) -> Pattern:
    """The pattern without what `pack_pattern` added, for a call in which another tensor takes the weight's place."""
    return _with_header(pattern[:_PLAIN_LENGTH], "weight_is_masked", [0])


def check_block(block: Sequence[int]) -> tuple[int, int, int, int]:
    """The block as (bo, bi, br, bs); raises ValueError if it is none."""
    sizes = tuple(block) if isinstance(block, Sequence) else ()
    if len(sizes) == 2:
        sizes = (*sizes, 1, 1)
    if len(sizes) != 4 or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"block must be 2 or 4 positive integers (bo, bi) or (bo, bi, br, bs), got {block!r}")
    return sizes


def check_mask(mask: Tensor, linear: bool = False) -> None:
    """Raises TypeError or ValueError if this is no convolution mask; `linear` allows [K, C] too."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (true = kept), got {found}")
    if mask.dim() != 4 and not (linear and mask.dim() == 2):
        shapes = "[K, C/groups, R, S] or [K, C]" if linear else "[K, C/groups, R, S]"
        raise ValueError(f"mask must have the weight's shape {shapes}, got {tuple(mask.shape)}")


def check_pattern(pattern: Pattern) -> None:
    """Raises ValueError if this is no compiled pattern."""
    if not _PLAIN_LENGTH <= len(pattern) <= _PLAIN_LENGTH + 2:
        raise ValueError(f"pattern must be what compile_pattern returned, got a list of {len(pattern)} tensors")


def check_groups(pattern: Pattern, groups: int) -> None:
    """Raises ValueError if the pattern was compiled for other groups; traced code leaves that to the op."""
    if torch.compiler.is_compiling() or pattern[0].numel() <= _HEADER["groups"]:
        return
    compiled_for = groups_of(pattern)
    if compiled_for != groups:
        raise ValueError(f"pattern was compiled for groups={compiled_for}, got groups={groups}")


def obeys(mask: Tensor, block: Sequence[int]) -> bool:
    """Whether all weights of each block of the mask share their fate; a mask [K, C] is one of single taps."""
    for dim, (length, size) in enumerate(zip(mask.shape, check_block(block), strict=False)):
        if size == 1 or length == 0:
            continue
        first = torch.arange(length, device=mask.device) // size * size
        if not torch.equal(mask, mask.index_select(dim, first)):
            return False
    return True
