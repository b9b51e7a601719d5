"""`shrink`: remove the channels that no kept weight feeds or reads. The smaller model computes the same function.

This kind of sparsity also makes the activations between the layers smaller. The result is dense, and fast on every
device.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_adv.argument_types import check_count, checks_types
from sparse_adv.kernels.layout import in_layout_of
from sparse_adv.masks.channel_operations import BATCH_NORMS
from sparse_adv.masks.dependency_graph import DependencyGraph, DependencyGroup, build_dependency_graph
from sparse_adv.masks.layers import Layer, device_of, masks_by_module
from sparse_adv.masks.same_function import check_same_function
from sparse_adv.nn.conversion import densify, sparsify
from sparse_adv.nn.masked_layer import masked_layers
from sparse_adv.ops.arguments import read_pair

log = logging.getLogger(__name__)

_NOT_CONSTANT = math.nan
_MANY = 0.1
"""If more than this share of the pruned filters stays, a message says so."""


@dataclass(frozen=True)
class ShrinkResult:
    """The result of `shrink`."""

    model: nn.Module
    """The smaller model."""
    widths: dict[str, tuple[int, int]]
    """Number of output channels before and after, for each layer whose output was traced."""
    retained: dict[str, int]
    """For each layer that has some, the number of constant channels that could not be removed: a convolution with zero
    padding reads a constant other than 0, the width is fixed from outside, or it is rounded up to a multiple."""


@checks_types
def shrink(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None,
    example_input: Sequence[int] | Tensor,
    multiple: int = 1,
) -> ShrinkResult:
    """Remove the channels that are constant or that no layer reads, with all parameters that belong to them.

    A filter is removed with its bias, the BatchNorm channels after it, and the inputs of all layers that read it; a
    residual sum keeps the union of the channels that its summands need. If a constant other than 0 is read, its effect
    is added to the reader's bias where that is exact: in linear layers and convolutions without padding. Removed
    channels may make others constant or unread, so this is repeated until nothing changes. In eval mode the function is
    unchanged up to rounding. So it is in training mode if BatchNorm outputs 0 for the removed channels
    (`nn.zero_dead_channels`).

    Masks of whole filters come from `masks.prune(..., block="filter", example_input=images)`. The result is an
    ordinary model with Parameters of its own: make a new optimiser for it.

    Args:
        model: dense or sparse; it is not changed.
        masks: bool masks keyed by module name; None takes those of a sparse model.
        example_input: a batch of the model's input, or the shape [N, C, H, W] of one.
        multiple: widths are rounded up to multiples of this if there are enough channels; use 8 or more on a GPU.

    Returns:
        The small model, the widths, and the channels that could not be removed. Layers that still have pruned weights
        are masked layers; all others are plain ones.

    Raises:
        TypeError: if a mask is not a bool tensor, or is for a module that is no Conv2d or Linear.
        ValueError: if torch.fx cannot trace the model, a mask does not fit its layer, multiple is not positive, or the
            small model's output on the example input differs from the model's.

    Source: Lym et al., "PruneTrain" (SC 2019), section 3, for removal with a union at residual sums.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> mask = torch.ones(4, 1, 3, 3, dtype=torch.bool)
        >>> mask[2:] = False
        >>> shrink(model, {"0": mask}, (1, 1, 8, 8)).widths
        {'0': (4, 2), '2': (2, 2)}
    """
    check_count("multiple", multiple, least=1)
    if masks is None:
        masks = {name: layer.weight_mask for name, layer in masked_layers(model).items()}
    small = densify(copy.deepcopy(model))
    own_masks = _checked(small, masks)
    with torch.no_grad():
        for name, mask in own_masks.items():
            _module(small, name).weight.masked_fill_(~mask, 0)
    pruned = sum(int((~mask.flatten(1).any(1)).sum()) for mask in own_masks.values())
    whole = copy.deepcopy(small)
    before = _widths(build_dependency_graph(small, example_input).groups, small)
    while True:
        traced = build_dependency_graph(small, example_input)
        constants = _Constants(small, traced, own_masks)
        plans = {group: _channels_to_keep(small, group, own_masks, constants, multiple) for group in _free(traced)}
        changing = {group: channels for group, channels in plans.items() if not channels.all()}
        if not changing:
            break
        for group, channels in changing.items():
            _cut(small, group, channels, own_masks, constants)
        check_same_function(whole, small, example_input, "removing channels")
    _warn_of_kept_channels(sum(_stuck(small, group, own_masks, constants) for group in _free(traced)), pruned)
    partly_pruned = {name: mask for name, mask in own_masks.items() if not mask.all()}
    after = _widths(traced.groups, small)
    retained = {name: count for name, count in constants.counts().items() if count}
    if partly_pruned:
        small = sparsify(small, partly_pruned)
    return ShrinkResult(small, {name: (width, after[name]) for name, width in before.items()}, retained)


def _checked(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the masks on their weights' devices, under the first name of each module, as in a traced graph.

    Raises:
        TypeError, ValueError: as for `masks_by_module`.
    """
    first_names = {module: name for name, module in model.named_modules()}
    return {
        first_names[module]: mask.to(module.get_parameter("weight").device, copy=True)
        for module, mask in masks_by_module(model, masks).items()
    }


def _widths(groups: Sequence[DependencyGroup], model: nn.Module) -> dict[str, int]:
    return {name: len(_module(model, name).weight) for group in groups for name in group.producers}


def _free(traced: DependencyGraph) -> list[DependencyGroup]:
    """The groups whose width may change, because all members are known."""
    return [group for group in traced.groups if not group.fixed and group.producers]


class _Constants(fx.Interpreter):
    """Finds the channels of each activation that are constant, that is, have the same value for every input.

    Runs the traced graph on tensors [1, C, 1, 1] that hold the value of each constant channel and NaN for all others.
    NaN propagates through the model's operations, so everything that depends on a varying channel is NaN too.
    """

    def __init__(self, model: nn.Module, traced: DependencyGraph, masks: Mapping[str, Tensor]) -> None:
        super().__init__(model, graph=traced.graph)
        self.traced, self.masks = traced, masks
        self.device = device_of(model)
        self.inputs: dict[str, Tensor] = {}
        """The constants that each convolution and linear layer reads, the same in all its calls."""
        self.outputs: dict[str, Tensor] = {}
        """The constants that each convolution and linear layer outputs, the same in all its calls."""
        with torch.no_grad():
            self.run(*[None] * sum(node.op == "placeholder" for node in traced.graph.nodes))

    def counts(self) -> dict[str, int]:
        """How many output channels of each layer are constant."""
        return {name: int(values.isfinite().sum()) for name, values in self.outputs.items()}

    def run_node(self, n: fx.Node) -> Any:
        kind = self.traced.kinds[n]
        if n not in self.traced.shapes:
            # No image: a parameter has its value, and results computed from images are unknown.
            return super().run_node(n) if n.op == "get_attr" else None
        width = self.traced.shapes[n][1]
        if kind in ("input", "unknown"):
            return self._unknown(width)
        source = self._of(n.all_input_nodes[0])
        if kind in ("convolution", "linear"):
            return self._layer(str(n.target), source)
        if kind == "flatten":
            return source.flatten().repeat_interleave(width // source.numel()).view(1, -1, 1, 1)
        if kind == "spatial":
            return self._spatial(source, width)
        if kind == "norm":
            return self._norm(_module(self.module, str(n.target)), source)
        operands = [self.env.get(source) for source in n.all_input_nodes]
        if not all(isinstance(operand, Tensor) and operand.numel() == width for operand in operands):
            return self._unknown(width)
        values = super().run_node(n)
        # More values than channels mean that an operand of another shape was broadcast over pixels.
        return values.view(1, -1, 1, 1) if values.numel() == width else self._unknown(width)

    def _of(self, node: object) -> Tensor:
        value = self.env.get(node) if isinstance(node, fx.Node) else None
        return value if isinstance(value, Tensor) else self._unknown(1)

    def _unknown(self, width: int) -> Tensor:
        return torch.full((1, width, 1, 1), _NOT_CONSTANT, device=self.device)

    def _spatial(self, source: Tensor, width: int) -> Tensor:
        """Pooling and resizing: padding may add zeros, so only the constant 0 is certain to stay constant."""
        return source.where(source == 0, _NOT_CONSTANT) if source.numel() == width else self._unknown(width)

    def _layer(self, name: str, source: Tensor) -> Tensor:
        layer = _module(self.module, name)
        mask = _mask_of(layer, name, self.masks)
        values = source.flatten()
        if getattr(layer, "groups", 1) > 1:
            varies = mask.flatten(1).any(1)
        else:
            # Channels that are always 0 add nothing to a filter's output.
            varies = (_by_taps(mask).any(2) & (values != 0)).any(1)
        bias = layer.bias if layer.bias is not None else layer.weight.new_zeros(len(layer.weight))
        results = bias.detach().where(~varies, _NOT_CONSTANT)
        for constants, of_call in ((self.inputs, values), (self.outputs, results)):
            known = constants.get(name, of_call)
            constants[name] = known.where(known == of_call, _NOT_CONSTANT)
        return results.view(1, -1, 1, 1)

    def _norm(self, norm: _BatchNorm, source: Tensor) -> Tensor:
        if norm.running_mean is None or norm.running_var is None:
            return self._unknown(source.numel())
        values = source.flatten()
        values = (values - norm.running_mean) * (norm.running_var + norm.eps).rsqrt()
        if norm.affine:
            values = values * norm.weight + norm.bias
        return values.view(1, -1, 1, 1)


def _channels_to_keep(
    model: nn.Module, group: DependencyGroup, masks: Mapping[str, Tensor], constants: _Constants, multiple: int
) -> Tensor:
    """bool [width]: the channels of a group that a reader needs, and more of them up to a multiple."""
    needed = torch.zeros(group.width, dtype=torch.bool, device=constants.device)
    for name, features in group.consumers:
        layer = _module(model, name)
        values = constants.inputs[name]
        replaceable = values.isfinite() if _is_exact(layer) else values == 0
        reads = _by_taps(_mask_of(layer, name, masks)).any(2).any(0)
        needed |= (reads & ~replaceable).view(group.width, features).any(1)
    count = int(needed.sum())
    spare = min(group.width, math.ceil(max(1, count) / multiple) * multiple) - count
    return needed | ((~needed).cumsum(0) <= spare)


def _is_exact(layer: Layer) -> bool:
    """Whether a constant adds the same number to all pixels of the layer's outputs, so that its bias can include it."""
    return isinstance(layer, nn.Linear) or not any(_padding(layer))


def _stuck(model: nn.Module, group: DependencyGroup, masks: Mapping[str, Tensor], constants: _Constants) -> int:
    """How many channels of a group are a nonzero constant that a convolution with padding reads."""
    stuck = torch.zeros(group.width, dtype=torch.bool, device=constants.device)
    for name, _ in group.consumers:
        layer = _module(model, name)
        if not _is_exact(layer):
            values = constants.inputs[name]
            reads = _by_taps(_mask_of(layer, name, masks)).any(2).any(0)
            stuck |= reads & values.isfinite() & (values != 0)
    return int(stuck.sum())


def _warn_of_kept_channels(stuck: int, pruned: int) -> None:
    if stuck > _MANY * pruned:
        log.warning(
            "shrink keeps %d channels (the masks prune %d filters) that are a constant other than 0, the bias of a "
            "pruned filter or of the BatchNorm after it, because convolutions with padding read them: "
            "call nn.zero_dead_channels(model, masks, example_input) first, which sets those of BatchNorm to 0",
            *(stuck, pruned),
        )


def _module(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _mask_of(layer: Layer, name: str, masks: Mapping[str, Tensor]) -> Tensor:
    """The layer's mask. Without a mask all weights count, even zeros, because training may change them."""
    return masks[name] if name in masks else torch.ones_like(layer.weight, dtype=torch.bool)


def _by_taps(weight: Tensor) -> Tensor:
    """[K, C, R, S] as [K, C, R S]; a linear layer has one tap."""
    return weight.reshape(*weight.shape[:2], -1)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """The padding of a convolution; "same" counts as padding wherever the filter has more than one tap."""
    if isinstance(layer.padding, str):
        rows, cols = (int(layer.padding == "same" and size > 1) for size in layer.kernel_size)
        return rows, cols
    return read_pair("padding", layer.padding)


@torch.no_grad()
def _cut(
    model: nn.Module, group: DependencyGroup, channels: Tensor, masks: dict[str, Tensor], constants: _Constants
) -> None:
    """Remove a group's channels from all its members."""
    for name, features in group.consumers:
        layer = _module(model, name)
        columns = channels.repeat_interleave(features)
        _fold(layer, constants.inputs[name], columns)
        _replace(layer, "weight", layer.weight[:, columns])
        if name in masks:
            masks[name] = masks[name][:, columns]
        size = "in_features" if isinstance(layer, nn.Linear) else "in_channels"
        setattr(layer, size, int(columns.sum()))
    for name in (*group.producers, *group.depthwise):
        layer = _module(model, name)
        _replace(layer, "weight", layer.weight[channels])
        if layer.bias is not None:
            _replace(layer, "bias", layer.bias[channels])
        if name in masks:
            masks[name] = masks[name][channels]
        size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
        setattr(layer, size, int(channels.sum()))
        if name in group.depthwise:
            layer.in_channels = layer.groups = layer.out_channels
    for name, features in group.norms:
        norm = _module(model, name)
        assert isinstance(norm, BATCH_NORMS)
        entries = channels.repeat_interleave(features)
        for parameter in ("weight", "bias"):
            if norm.affine:
                _replace(norm, parameter, getattr(norm, parameter)[entries])
        for buffer in ("running_mean", "running_var"):
            if getattr(norm, buffer) is not None:
                setattr(norm, buffer, getattr(norm, buffer)[entries])
        norm.num_features = int(entries.sum())


def _fold(layer: Layer, values: Tensor, columns: Tensor) -> None:
    """Add to the bias the constant that the removed columns contribute to every output."""
    lost = ~columns & (values != 0) & values.isfinite()
    weight = _by_taps(layer.weight).sum(2)
    if not (weight[:, lost] != 0).any():
        return
    added = weight[:, lost] @ values[lost].to(weight.dtype)
    _replace(layer, "bias", added if layer.bias is None else layer.bias + added)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a Parameter by a new one in its memory layout."""
    old = getattr(module, name)
    trained = (module.get_parameter("weight") if old is None else old).requires_grad
    setattr(module, name, nn.Parameter(value if old is None else in_layout_of(old, value), trained))
