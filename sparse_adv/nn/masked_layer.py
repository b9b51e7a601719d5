"""What masked layers have in common: the mask is a buffer, and outside it the weight stays zero whatever happens."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparse_adv.nn import optimizer_hook


class MaskedLayer(nn.Module):
    """A layer whose weight is 0 wherever its bool buffer `weight_mask` is false.

    Subclasses name it before the dense layer that they stand in for. They say by `_forget` and `_compile` what follows
    from a mask, and by `_compiled_mask` for which mask they have it.
    """

    weight: Tensor
    bias: Any
    weight_mask: Tensor

    _dense: ClassVar[type[nn.Module]]
    _derived: ClassVar[tuple[str, ...]]
    """Attributes that follow from the weight and the mask: neither pickled nor copied, but computed again."""
    _own: ClassVar[tuple[str, ...]] = ()
    """The other attributes that the dense layer does not have."""

    _seen: tuple[Tensor, int]
    _constant: Any

    @classmethod
    def _shell(cls, dense: nn.Module) -> Self:
        """The layer that takes the place of `dense`, still without a mask; a masked layer stays itself."""
        if isinstance(dense, cls):
            return dense
        layer = cls.__new__(cls)
        layer.__dict__ = _shared_state(dense)
        return layer

    def to_dense(self) -> nn.Module:
        """Make a plain layer of this one, with the same Parameter objects, zeros where pruned."""
        self._derive()
        dense = self._dense.__new__(self._dense)
        dense.__dict__ = _shared_state(self)
        for name in (*self._derived, *self._own):
            del dense.__dict__[name]
        del dense._buffers["weight_mask"]
        optimizer_hook.unwatch(self.weight)
        return dense

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return int(self.weight_mask.count_nonzero()) / max(1, self.weight_mask.numel())

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if "weight_mask" in self._buffers:  # not yet, when the dense layer's constructor calls this
            self._derive()

    @property
    def is_constant(self) -> bool:
        """Whether `nn.constant_weights` holds this layer."""
        return self._constant is not None

    def hold_constant(self) -> bool:
        """Begin what `nn.constant_weights` describes; returns False if it had begun already."""
        if self.is_constant:
            return False
        self._refresh()
        # Zeros are made sure of, in a copy: the weight may be part of a graph.
        weight = torch.where(self.weight_mask, self.weight.detach(), 0)
        self._constant = self._constants(weight, None if self.bias is None else self.bias.detach())
        return True

    def release_constant(self) -> None:
        self._constant = None

    @abstractmethod
    def _constants(self, weight: Tensor, bias: Tensor | None) -> Any:
        """What the forward pass takes in place of weight and bias while they are constant."""

    @abstractmethod
    def _compiled_mask(self) -> Tensor | None:
        """The mask of which `_compile` last made something, as it was then; a tensor of the layer's own."""

    @abstractmethod
    def _compile(self) -> None:
        """Make what follows from the buffer `weight_mask`."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop what followed from a mask."""

    def _store_mask(self, mask: Tensor) -> None:
        if "weight_mask" in self._buffers:
            self.weight_mask.copy_(mask)
        else:
            self.register_buffer("weight_mask", mask.to(self.weight.device, copy=True))

    def _refresh(self) -> None:
        """Notice a mask that was written to, as loading, averaging and copying of buffers do."""
        mask = self.weight_mask
        if mask is self._seen[0] and _version(mask) == self._seen[1]:
            return
        if self._is_compiled():
            self._seen = (mask, _version(mask))
        else:
            self._derive()

    def _is_compiled(self) -> bool:
        known, mask = self._compiled_mask(), self.weight_mask
        return known is not None and known.device == mask.device and torch.equal(known, mask)

    def _derive(self) -> None:
        """Compute anew all that follows from the buffer `weight_mask`."""
        if self.weight_mask.is_meta:
            self._forget()
        elif not self._is_compiled():
            self._compile()
        self._settle()

    def _settle(self) -> None:
        self._constant = None
        self._seen = (self.weight_mask, _version(self.weight_mask))
        mask = self._compiled_mask()
        if mask is not None:
            with torch.no_grad():
                self.weight.masked_fill_(~self.weight_mask, 0)
            optimizer_hook.watch(self.weight, mask)

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
        return {name: value for name, value in self.__dict__.items() if name not in self._derived}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._derive()


def check_own_weight(layer: nn.Module) -> None:
    """Raises TypeError if the layer's weight is no Parameter of its own."""
    if "weight" not in layer._parameters:
        raise TypeError("weight is computed from something else (nn.utils.prune or parametrize): make that permanent")


def check_shape(mask: Tensor, weight: Tensor) -> None:
    """Raises ValueError if the mask is for a weight of another shape."""
    if mask.shape != weight.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, weight has shape {tuple(weight.shape)}")


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
