"""The base class of masked layers: the mask is a buffer, and the weight is always 0 where the mask is false."""

from __future__ import annotations

import copy
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sparse_adv.nn import optimizer_hook
from sparse_adv.nn.layer_checks import check_parameter, check_replaceable, has_values
from sparse_adv.nn.mask_agreement import compare_in_first_pass
from sparse_adv.nn.optimizer_hook import version_of
from sparse_adv.ops.masked_conv2d_autocast import dtype_under_autocast
from sparse_adv.ops.masked_conv2d_mask import check_mask, check_shape
from sparse_adv.ops.transforms import is_transformed


@dataclass(eq=False)
class CompiledMask:
    """Everything that a masked layer derives from the content of its buffer `weight_mask`."""

    mask: Tensor
    """A copy of the buffer, so that a write to the buffer shows as a difference."""
    _source: tuple[Tensor, object] | None = field(default=None, init=False)
    """The buffer whose content is known to equal `mask`, and the version of that content."""

    def attach(self, buffer: Tensor) -> None:
        """Note that the buffer's present content equals `mask`."""
        self._source = buffer, version_of(buffer)

    def detach(self) -> None:
        """Let `matches` compare the elements again: the buffer may get another tensor's content and version."""
        self._source = None

    def matches(self, buffer: Tensor) -> bool:
        """Whether the buffer's content equals `mask`; elements are compared only after a write."""
        if self._source is not None and buffer is self._source[0] and version_of(buffer) == self._source[1]:
            return True
        if self.mask.device != buffer.device or not torch.equal(self.mask, buffer):
            return False
        self.attach(buffer)
        return True


class _FrozenOperands:
    """What a layer's forward pass uses in place of weight and bias while these do not change.

    There is one set for each dtype, because a region without autocast needs other ones than the layers around it.
    """

    def __init__(self, layer: MaskedLayer) -> None:
        # Pruned entries may have been written by hand. They are zeroed in a copy: the weight may be part of a graph.
        with mode_of(layer.weight):
            self._weight = torch.where(layer.weight_mask, layer.weight.detach(), 0)
        self._bias = None if layer.bias is None else layer.bias.detach()
        self._parameters = tuple(map(layer._parameters.get, ("weight", "bias")))
        self._make = layer._frozen_operands
        self._made: dict[torch.dtype, Any] = {}
        self.in_current_dtype()  # now, because the first pass may run in a transform

    def are_of(self, layer: MaskedLayer) -> bool:
        """Whether the layer has these parameters now; `torch.func.functional_call` gives it others for a pass."""
        return all(map(operator.is_, map(layer._parameters.get, ("weight", "bias")), self._parameters))

    def in_current_dtype(self) -> Any:
        """The operands in autocast's present dtype; they are cast once, not in each pass."""
        dtype = dtype_under_autocast(self._weight)
        if dtype not in self._made:
            with mode_of(self._weight):
                bias = None if self._bias is None else self._bias.to(dtype_under_autocast(self._bias))
                self._made[dtype] = self._make(self._weight.to(dtype), bias)
        return self._made[dtype]


class MaskedLayer(nn.Module, ABC):
    """A layer whose weight is 0 wherever its bool buffer `weight_mask` is false.

    A mask becomes effective in three steps: a subclass checks and compiles it, `_write_mask` writes it to the buffer,
    and `_install` applies it to the weight and the optimisers. Any other write to the buffer (loading, averaging,
    moving to another device) makes `_compiled` outdated; `_derive` then compiles the buffer's content.

    Subclasses name this class before the dense layer that they replace, and implement `_compile` and
    `_frozen_operands`.
    """

    weight: Tensor
    bias: Any  # torch declares it differently in Conv2d and Linear
    weight_mask: Tensor

    _dense: ClassVar[type[nn.Module]]
    """The class of the dense layer."""
    _own: ClassVar[tuple[str, ...]] = ()
    """Attributes that the dense layer does not have, except those in `DERIVED`."""

    _compiled: CompiledMask | None
    """None on the meta device; there the layer computes what the dense one does."""
    _installed: tuple[Tensor, CompiledMask] | None = None
    """The layer's own buffer and mask, installed last; `torch.func.functional_call` may put others in their place."""
    _frozen: dict[int, _FrozenOperands]
    """The operands inside of `nn.frozen_weights`.

    The key is the thread's number: another thread may train the same model and needs the gradients of the weights.
    """

    DERIVED: ClassVar = ("_compiled", "_installed", "_frozen")
    """Attributes that are computed again after copying or unpickling."""

    @abstractmethod
    def set_mask(self, mask: Tensor, optimizer: Optimizer | None = None) -> None:
        """Change the mask: weights that it prunes become 0, weights that it revives start at 0."""

    @abstractmethod
    def _compile(self) -> CompiledMask | None:
        """Compile the content of the buffer `weight_mask`; None on the meta device, because there it has no content."""

    @abstractmethod
    def _frozen_operands(self, weight: Tensor, bias: Tensor | None) -> tuple[object, ...]:
        """Return the operands that the forward pass uses in place of weight and bias while these do not change."""

    @classmethod
    def _sharing_state_of(cls, dense: nn.Module) -> Self:
        """Return a layer with the attributes of `dense` and without a mask; a masked layer is returned as it is."""
        if isinstance(dense, cls):
            return dense
        layer = cls.__new__(cls)
        layer.__dict__ = _shared_state(dense)
        return layer

    def to_dense(self) -> nn.Module:
        """Make a plain layer from this one, with the same Parameter objects and zeros where pruned.

        Raises:
            TypeError: if `check_replaceable` does.
        """
        check_replaceable(self)
        self._derive()
        dense = self._dense.__new__(self._dense)
        dense.__dict__ = _shared_state(self)
        for name in (*self.DERIVED, *self._own):
            del dense.__dict__[name]
        del dense._buffers["weight_mask"]
        optimizer_hook.unwatch(self.weight)
        return dense

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`: it would put the module that this method returns into the model."""
        raise TypeError("torch.jit.script cannot compile masked layers: script `densify(copy.deepcopy(model))`")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight_orig":  # prune and spectral_norm register this first; spectral_norm has removed the weight
            self._parameters.setdefault("weight", param)
            raise TypeError(
                "torch.nn.utils.prune and spectral_norm cannot change a masked layer: give it another mask by set_mask"
            )
        if type(param).__module__.startswith("torchao."):  # operators of quantized weights know no masks
            raise TypeError("torchao cannot quantize masked layers: `densify` the model first")
        has_mask = name == "weight" and "weight_mask" in self._buffers
        if has_mask and type(param) is nn.Parameter:
            check_parameter(self.weight_mask, param, self)
        super().register_parameter(name, param)
        if has_mask and type(param) is nn.Parameter:
            self._derive()

    @property
    def qconfig(self) -> None:
        """Absent: `torch.ao.quantization` would set it, and then leave masked layers unquantized."""
        raise AttributeError("masked layers have no qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise TypeError("torch.ao.quantization cannot quantize masked layers: `densify` the model first")

    def _node(self, proxy: fx.Proxy) -> fx.Proxy:
        """The layer as one node of a graph that `torch.fx.symbolic_trace` records, as for the layers of torch.nn."""
        tracer = proxy.tracer
        assert isinstance(tracer, fx.Tracer)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (proxy,), {})

    @property
    def density(self) -> float:
        """The fraction of weights kept."""
        return int(self.weight_mask.count_nonzero()) / max(1, self.weight_mask.numel())

    def register_buffer(self, name: str, tensor: Any, persistent: bool = True) -> None:
        is_new_mask = name == "weight_mask" and name in self._buffers  # assigning to `weight_mask` also comes here
        if is_new_mask:
            check_mask(tensor, linear=self._dense is nn.Linear)
            check_shape(tensor, self.weight)
        super().register_buffer(name, tensor, persistent)
        if is_new_mask:
            self._derive()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if "weight_mask" in self._buffers:  # the dense layer's constructor calls this before there is a mask
            self._derive()

    @property
    def frozen_operands(self) -> Any:
        """What the forward pass uses in place of weight and bias in this thread; None without `nn.frozen_weights`.

        Compiled code never uses it, because the same code serves all threads.
        """
        if torch.compiler.is_compiling() or not self._frozen:
            return None
        frozen = self._frozen.get(get_ident())
        return None if frozen is None or not frozen.are_of(self) else frozen.in_current_dtype()

    def freeze(self) -> bool:
        """Start `nn.frozen_weights` for this layer and thread; False if it had started or the weight is not in memory.

        FSDP1 makes the weight anew in each pass, as a view that is not a Parameter, and then frees its memory.
        """
        if get_ident() in self._frozen or "weight" not in self._parameters or not has_values(self.weight):
            return False
        self.refresh()
        self._frozen[get_ident()] = _FrozenOperands(self)
        return True

    def unfreeze(self) -> None:
        """End `nn.frozen_weights` for this layer and this thread."""
        self._frozen.pop(get_ident(), None)

    def _masked_weight(self) -> Tensor:
        """The masked weight, by `where` and not by a product: a pruned NaN must count as 0, also in the gradient."""
        return torch.where(self.weight_mask, self.weight, 0)

    def _write_mask(self, mask: Tensor) -> None:
        """Write the buffer, but only if its content differs: a write would invalidate a backward pass in progress."""
        if "weight_mask" in self._buffers:
            mask = mask.to(self.weight_mask.device)
            if mask.is_meta or not torch.equal(self.weight_mask, mask):
                if not mask.is_meta:
                    self._zero_pruned()  # pruned weights written by hand, so that revived weights start at 0
                self.weight_mask.copy_(mask)
        else:
            with mode_of(self.weight):
                self.register_buffer("weight_mask", mask.to(self.weight.device, copy=True))

    def _adopt(self, compiled: CompiledMask | None) -> None:
        """Compute with the buffer's mask, from which `compiled` was made."""
        self._compiled, self._frozen = compiled, {}
        if compiled is not None:
            compiled.attach(self.weight_mask)

    def _install(self, compiled: CompiledMask | None) -> None:
        """Adopt the buffer's mask, and apply it to the weight and its optimisers."""
        self._adopt(compiled)
        self._installed = None if compiled is None else (self.weight_mask, compiled)
        if compiled is not None:
            self._zero_pruned()
            if "weight" in self._parameters:  # else no optimiser can have it
                optimizer_hook.watch(self.weight, compiled.mask)

    @torch.no_grad()
    def _zero_pruned(self) -> None:
        """Zero weight and gradient where the mask is false; write only if needed, as in `_write_mask`."""
        if not has_values(self.weight):
            return
        if torch.where(self.weight_mask, 0, self.weight).any():
            self.weight.masked_fill_(~self.weight_mask, 0)
        # The gradient may be a sum of micro-batches and be clipped before the next step. FSDP1's view has no gradient.
        grad = self.weight.grad if self.weight.is_leaf else None
        if grad is not None and torch.where(self.weight_mask, 0, grad).any():
            grad.masked_fill_(~self.weight_mask, 0)

    def _derive(self) -> None:
        """Compile the buffer if its content has changed, and install the result in any case."""
        _, own = self._installed or (None, None)
        with mode_of(self.weight):
            valid = own is not None and own.matches(self.weight_mask)
            self._install(own if valid else self._compile())

    def refresh(self) -> None:
        """Before a forward pass, recompile the mask if the buffer was written to; does nothing in traced code."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
            return
        compare_in_first_pass()
        if self._compiled is not None and self._compiled.matches(self.weight_mask):
            return
        buffer, _ = self._installed or (None, None)
        if self._compiled is None or (self.weight_mask is buffer and optimizer_hook.mask_of(self.weight) is not None):
            self._derive()
        else:  # the caller's tensors, for this pass only: do not write to them
            with mode_of(self.weight):
                self._adopt(self._compile())

    def _prepare_swap(self) -> None:
        """Prepare for torch swapping the content of tensors, if that is enabled; `_derive` must follow."""
        if torch.__future__.get_swap_module_params_on_conversion():
            optimizer_hook.unwatch(self.weight)  # torch cannot swap a tensor that has weak references
            if self._installed is not None:
                self._installed[1].detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._prepare_swap()
        super()._apply(fn, recurse)
        if self.weight_mask.dtype != torch.bool:  # `Module.type` casts every buffer
            self._buffers["weight_mask"] = self.weight_mask != 0
        self._derive()
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        # Averaging and copying write the weight without calling this layer, so it is zeroed here.
        if type(self._parameters.get("weight")) is nn.Parameter:
            self._zero_pruned()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        _to_own_keys(state_dict, prefix)
        mask = state_dict.get(f"{prefix}weight_mask", self.weight_mask)
        if not self.weight_mask.is_meta:  # else strict loading names the key that is missing
            state_dict[f"{prefix}weight_mask"] = mask
        if mask.shape == self.weight_mask.shape:
            # Before the weight: assign=True replaces the weight, and the mask is then applied to the new one.
            with mode_of(self.weight), torch.no_grad():
                self.weight_mask.copy_(mask)
        self._prepare_swap()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._derive()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name not in self.DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compiled = self._installed = None
        known = optimizer_hook.mask_of(self.weight)
        if known is not None and CompiledMask(known).matches(self.weight_mask):  # a copy shares the weight
            with mode_of(self.weight):
                self._adopt(self._compile())
        else:
            self._derive()


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name; a layer with several names appears once, under the first."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLayer)}


@contextmanager
def mode_of(weight: Tensor) -> Iterator[None]:
    """Leave `torch.inference_mode` if the weight was made outside of it: training may use tensors made here."""
    if torch.is_inference_mode_enabled() and not weight.is_inference():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield


def _shared_state(module: nn.Module) -> dict[str, object]:
    """A module's attributes for the layer that replaces it.

    Parameters and the tables of hooks are the same objects, so that an old handle can still remove its hook. What
    `module.compile()` stored is left out, because it calls that module.
    """
    own = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    state = {name: copy.copy(value) if name in own else value for name, value in module.__dict__.items()}
    state.pop("_compiled_call_impl", None)
    return state


def _to_own_keys(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Rewrite `nn.utils.prune`'s keys: weight_orig and weight_mask (float), perhaps bias_orig and bias_mask."""
    mask_key = f"{prefix}weight_mask"
    if mask_key in state_dict:
        state_dict[mask_key] = state_dict[mask_key] != 0
    if f"{prefix}weight_orig" in state_dict:
        state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}weight_orig")
    if f"{prefix}bias_orig" in state_dict:
        bias_mask = state_dict.pop(f"{prefix}bias_mask")
        state_dict[f"{prefix}bias"] = torch.where(bias_mask != 0, state_dict.pop(f"{prefix}bias_orig"), 0)
