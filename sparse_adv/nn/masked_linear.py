"""`MaskedLinear`: a linear layer whose weight is sparse under a mask; the product itself is dense."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer

from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.dense_gradients import is_collecting, with_dense_gradient
from sparse_adv.nn.layer_checks import check_own_parameters, check_plain, check_values, check_writable
from sparse_adv.nn.masked_layer import CompiledMask, MaskedLayer, mode_of
from sparse_adv.ops.masked_conv2d_mask import check_mask, check_shape


class MaskedLinear(MaskedLayer, nn.Linear):
    """`nn.Linear` that keeps only the weights under a mask. It saves no time: the product is dense.

    `y = x @ (weight * weight_mask).T + bias`. A pruned weight counts as 0 and gets gradient 0, whatever its value is.
    Weight, mask, optimisers, copies and state dicts are handled as in `MaskedConv2d`.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        mask: bool tensor [K, C]; None keeps everything.

    Raises:
        TypeError: if the mask is not a bool tensor.
        ValueError: if it has another shape than the weight.

    Examples:
        >>> layer = MaskedLinear(2, 1, bias=False, mask=torch.tensor([[True, False]]))
        >>> layer.density, layer.weight[0, 1].item()
        (0.5, 0.0)
    """

    _dense = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        if mask is None:
            mask = torch.ones_like(self.weight, dtype=torch.bool)
        check_linear_mask(self, mask)
        self._set_mask(mask)

    @classmethod
    def from_dense(cls, linear: nn.Linear, mask: Tensor) -> Self:
        """Make a masked layer from a dense one, with the same Parameter objects; pruned weights become 0 in place.

        Raises:
            TypeError: if `linear` is not a plain Linear with its own weight.
            ValueError: if the mask has another shape than the weight.
        """
        check_linear(linear)
        check_linear_mask(linear, mask)
        return cls.from_checked(linear, mask)

    @classmethod
    def from_checked(cls, linear: nn.Linear, mask: Tensor) -> Self:
        """`from_dense` for a mask that has been checked; an already masked layer gets the new mask."""
        layer = cls._sharing_state_of(linear)
        layer._set_mask(mask)
        return layer

    def set_mask(self, mask: Tensor, optimizer: Optimizer | None = None) -> None:
        """Change the mask: weights that it prunes become 0, weights that it revives start at 0.

        Layers that share their weight need the same mask: `sparsify` gives it to all of them.

        Args:
            mask: bool tensor of the weight's shape.
            optimizer: its momentum (and whatever else it stores) for pruned weights becomes 0 now; without it, that
                happens before its next step.

        Raises:
            TypeError: if the weight is parametrized.
            ValueError: if the mask has another shape than the weight.
        """
        check_own_parameters(self)
        check_linear_mask(self, mask)
        self._set_mask(mask)
        if optimizer is not None:
            optimizer_hook.settle(optimizer)

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., C]` to `[..., K]`."""
        if isinstance(input, fx.Proxy):
            return self._node(input)
        self.refresh()
        frozen = self.frozen_operands
        weight, bias = frozen or (self._masked_weight(), self.bias)
        if not frozen and is_collecting(self):
            weight = with_dense_gradient(self, weight)
        return F.linear(input, weight, bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.weight_mask.is_meta else f", density={self.density:.4g}")

    def _set_mask(self, mask: Tensor) -> None:
        self._write_mask(mask)
        self._install(self._compile())

    def _compile(self) -> CompiledMask | None:
        if self.weight_mask.is_meta:
            return None
        with mode_of(self.weight):
            return CompiledMask(self.weight_mask.clone())

    def _frozen_operands(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


def check_linear_mask(linear: nn.Linear, mask: Tensor) -> None:
    """Raises TypeError or ValueError if this mask does not fit the layer's weight, or cannot be applied to it here."""
    check_mask(mask, linear=True)
    check_shape(mask, linear.weight)
    check_values(mask, linear.weight)
    check_writable(linear.weight)


def check_linear(linear: nn.Module) -> None:
    """Raises TypeError if a masked layer cannot replace this module."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"only a Linear can become a MaskedLinear, got {type(linear).__name__}")
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise TypeError("MultiheadAttention reads this layer's weight and never calls it, so its gradient has no mask")
    if not isinstance(linear, MaskedLinear):
        check_plain(linear, nn.Linear)
    check_own_parameters(linear)
